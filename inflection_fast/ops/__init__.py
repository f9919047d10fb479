"""Tensors in, tensors out: the operators of the package.

Shape letters: B batch, H heads, Q queries, K keys, L layers, N samples, D features, R basis rank.
"""

from .activation_moments import MOMENT_SUMS, ActivationMoments, activation_moments
from .attention_column_mass import AttentionColumns, attention_column_mass
from .attention_stats import AttentionStats, attention_entropy, attention_stats
from .attention_stats_qk import attention_entropy_qk, attention_stats_qk
from .checks import memory_bytes
from .cka import (
    CkaBasis,
    CkaResult,
    CkaState,
    RowSample,
    cka_jackknife,
    cka_matrix,
    delta_cka,
    feature_rows,
    linear_cka,
)
from .library import build_info
from .qk_arguments import PackedSequences
from .rank import AttentionRank, attention_rank
from .spectrum import PowerLaw, Spectrum, power_law, singular_values, weight_spectrum
from .sum_of_squares import sum_of_squares

__all__ = [
    "MOMENT_SUMS",
    "ActivationMoments",
    "AttentionColumns",
    "AttentionRank",
    "AttentionStats",
    "CkaBasis",
    "CkaResult",
    "CkaState",
    "PackedSequences",
    "PowerLaw",
    "RowSample",
    "Spectrum",
    "activation_moments",
    "attention_column_mass",
    "attention_entropy",
    "attention_entropy_qk",
    "attention_rank",
    "attention_stats",
    "attention_stats_qk",
    "build_info",
    "cka_jackknife",
    "cka_matrix",
    "delta_cka",
    "feature_rows",
    "linear_cka",
    "memory_bytes",
    "power_law",
    "singular_values",
    "sum_of_squares",
    "weight_spectrum",
]
