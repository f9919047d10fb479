"""Checkpoints that somebody else has trained: what one of them holds, and how two of them differ, without training.

Everything is measured by a `Monitor` and the quantities; weights alone are read tensor by tensor.
"""

from .comparison import Comparison, compare
from .scanning import Scan, scan

__all__ = ["Comparison", "Scan", "compare", "scan"]
