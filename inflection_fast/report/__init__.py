"""What a run found, for somebody who has not read the code: a page, pictures, a summary in the terminal.

Only the files of the run folder are read, so a report can be written on any machine, long after the run. The functions
that end in `_map`, `_lines`, `_line` and `_chart` draw timelines, plans and arrays with matplotlib, most of them on an
axis that they are given.
"""

from inflection_fast.report.figures import difference_map, head_map, score_line, signal_lines, signal_map
from inflection_fast.report.page import write
from inflection_fast.report.several import write_several
from inflection_fast.report.similarity import cka_map, drift_chart
from inflection_fast.report.summary import summary

__all__ = [
    "cka_map",
    "difference_map",
    "drift_chart",
    "head_map",
    "score_line",
    "signal_lines",
    "signal_map",
    "summary",
    "write",
    "write_several",
]
