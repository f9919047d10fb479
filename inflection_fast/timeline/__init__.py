"""The file between measuring and deciding, with a row per measured step and layer.

`timeline.arrows` is one Arrow IPC stream with a record batch per measured step. It can be appended to, unlike Parquet,
Feather and NumPy archives, whose index at the end is missing after a process was killed. It contains its schema and
metadata; pandas, polars, DuckDB, R and Arrow read it; reading it executes no code, unlike a pickle.

Each batch is written in one call before `append` returns, so a killed process loses at most the last batch. The file is
synchronised with the disk when it is created, replaced and closed.
"""

from .arrow import columns_in
from .columns import AlertRule, Column
from .signals import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS
from .timeline import Timeline
from .writer import IF_EXISTS, TimelineWriter, folder_for

__all__ = [
    "HEAD_SIGNALS", "IF_EXISTS", "LAYER_SIGNALS", "STEP_SIGNALS", "AlertRule", "Column", "Timeline", "TimelineWriter",
    "columns_in", "folder_for",
]  # fmt: skip
