"""The report of a run: a page, pictures, a summary in the terminal.

It reads the files of the run folder alone, so it can be written on any machine at any time. The functions that end in
`_map`, `_lines`, `_line` and `_chart` draw timelines, plans and arrays with matplotlib, most of them on a given axis.
"""

from inflection_fast.report.charts import drift_chart
from inflection_fast.report.figures import difference_map, head_map, score_line, signal_lines, signal_map
from inflection_fast.report.heatmap import cka_map
from inflection_fast.report.page import write
from inflection_fast.report.several import write_several
from inflection_fast.report.summary import summary

__all__ = [
    "cka_map", "difference_map", "drift_chart", "head_map", "score_line", "signal_lines", "signal_map", "summary",
    "write", "write_several",
]  # fmt: skip
