"""The file between measuring and deciding: what was measured, step by step.

`timeline.arrows` is one Arrow IPC stream with a record batch per measured step. Of the formats that hold typed
columns it is the one that can be appended to: Parquet, Feather and NumPy archives write their index at the end, so a
killed process leaves nothing, whereas every prefix of a stream that ends between two batches is a stream. It carries
its own schema and metadata, pandas, polars, DuckDB, R and Arrow itself read it, and reading it executes nothing (a
pickle would).

Each batch goes to the operating system in one piece before `append` returns, so a killed process loses at most the
batch that it was writing; the disk itself is synchronised when the file is created, replaced and closed.
"""

from .arrow import columns_in
from .columns import AlertRule, Column
from .existing import IF_EXISTS, folder_for
from .signals import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS
from .timeline import Timeline
from .writer import TimelineWriter

__all__ = [
    "HEAD_SIGNALS",
    "IF_EXISTS",
    "LAYER_SIGNALS",
    "STEP_SIGNALS",
    "AlertRule",
    "Column",
    "Timeline",
    "TimelineWriter",
    "columns_in",
    "folder_for",
]
