"""What a run found, for somebody who has not read the code: a Markdown page, pictures, a summary in the terminal.

Only the files of the run folder are read, so a report can be written on any machine, long after the run. `cka_map` and
`drift_chart` draw arrays of anybody's into matplotlib figures.
"""

from inflection_fast.report.page import write
from inflection_fast.report.similarity import cka_map, drift_chart
from inflection_fast.report.summary import summary

__all__ = ["cka_map", "drift_chart", "summary", "write"]
