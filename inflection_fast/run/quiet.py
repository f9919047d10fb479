"""Less output of other libraries during a run."""

from __future__ import annotations

import sys
import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Silence messages of other libraries below warnings, and progress bars if stderr is not a terminal."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|datasets)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
