"""What other libraries print while a run goes on."""

from __future__ import annotations

import sys
import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Warnings of libraries stay; their chatter goes, and their progress bars where nobody watches."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|datasets)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
