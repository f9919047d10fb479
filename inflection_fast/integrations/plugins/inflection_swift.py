"""A plugin of ms-swift, used by its path: `swift sft ... --external_plugins PATH --callbacks inflection`.

The training is measured into `output_dir`/inflection. PATH is what
`python -c "import inflection_fast.integrations.plugins as p; print(p.__path__[0] + '/inflection_swift.py')"` prints.
Written against the public source of ms-swift 4.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift.callbacks import callbacks_map

from inflection_fast.integrations.callback import ReportedTo

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def measured(args: TrainingArguments, trainer: Trainer) -> Any:
    """Make the callback. ms-swift calls this with its arguments and Trainer."""
    return ReportedTo()


callbacks_map["inflection"] = measured
