"""Tensors in, tensors out: the operators of the package.

Shape letters: B batch, H heads, Q queries, K keys, L layers, N samples, D features, R basis rank.
"""

from .entropy import attention_entropy, attention_stats
from .library import build_info
from .norms import sum_of_squares
from .stats import AttentionStats

__all__ = ["AttentionStats", "attention_entropy", "attention_stats", "build_info", "sum_of_squares"]
