"""Linear CKA: how alike two sets of features of the same samples are.

`linear` of all rows at once, `state` of rows that come in batches, `matrix` of layers with layers, `jackknife` with a
standard error; `gram` holds the sums that all of them rest on, `basis` the shared PCA basis, `result` a value with what
belongs to it, and `rows` says which rows of a batch are samples.
"""

from .basis import CkaBasis
from .jackknife import cka_jackknife
from .linear import delta_cka, linear_cka
from .matrix import cka_matrix
from .result import CkaResult
from .rows import POOLINGS, RowSample, feature_rows, mean_rows
from .state import CkaState

__all__ = [
    "POOLINGS",
    "CkaBasis",
    "CkaResult",
    "CkaState",
    "RowSample",
    "cka_jackknife",
    "cka_matrix",
    "delta_cka",
    "feature_rows",
    "linear_cka",
    "mean_rows",
]
