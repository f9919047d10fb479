"""Scans of one checkpoint and comparisons of two, without training.

Models are measured by a `Monitor`; weights are read tensor by tensor.
"""

from .comparison import Comparison, compare
from .scanning import Scan, scan

__all__ = ["Comparison", "Scan", "compare", "scan"]
