"""Linear CKA: similarity of two sets of features of the same samples.

`linear`: all rows at once; `state`: rows in batches; `matrix`: all pairs of layers; `jackknife`: with a standard error.
`gram` has the sums that all of them use, `basis` the shared PCA basis, `result` a value with its standard error and
other details, `rows` the choice of rows of a batch.
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
