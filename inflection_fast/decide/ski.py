"""SKI, the index that ranks layers: low attention entropy and a low activation gradient score high.

    SKI = alpha * Hn + (1 - alpha) * Gn

with Hn and Gn the normalised inverses of a layer's attention entropy and activation gradient norm (arXiv 2511.00797).
The paper leaves the normalisation and alpha open; here they are named options.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["NORMALISATIONS", "ski"]


def ski(
    entropy: np.ndarray,
    activation_grad: np.ndarray,
    alpha: float = 0.5,
    *,
    normalisation: str = "minmax",
    log_gradient: bool = True,
) -> np.ndarray:
    """Score every layer in [0, 1] from its `entropy` [L] (nats) and `activation_grad` [L] (l2 norm): scores [L].

    `log_gradient` takes the natural logarithm of the norms first: their scale is that of the loss, and layers differ
    by factors. `normalisation` turns a signal x into an inverse in [0, 1], over the layers that have a score:

    * `"minmax"`: (max x - x) / (max x - min x)
    * `"rank"`: the share of the other layers that lie above x, ties counted half
    * `"zscore"`: 1 / (1 + exp(z)), z = (x - mean x) / std x (population standard deviation)

    A constant signal says nothing: it is 0.5 in every layer. A layer has no score (NaN) and does not influence the
    others where a signal is NaN or infinite, or where the logarithm of a zero gradient would be needed. A signal of
    weight 0 is not looked at. `ValueError` for a negative norm, other shapes than [L] twice, an `alpha` outside [0,
    1].
    """
    entropy, gradient = _profile("entropy", entropy), _profile("activation_grad", activation_grad)
    if entropy.shape != gradient.shape:
        raise ValueError(
            f"entropy and activation_grad: expected one shape [L], got {entropy.shape} and {gradient.shape}"
        )
    if (gradient < 0).any():
        raise ValueError(f"activation_grad: a norm is not negative, got {gradient.min()}")
    return score_of(entropy, gradient, alpha, normalisation, log_gradient)(entropy, gradient)


def score_of(
    entropy: np.ndarray, gradient: np.ndarray, alpha: float, normalisation: str, log_gradient: bool
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """SKI with its normalisation fitted on the profiles [L], as a function of values [..., L].

    For the profiles it gives the scores, for single steps their variation, without that of the fit.
    """
    check_options(alpha, normalisation)
    gradient_of = _log if log_gradient else np.asarray
    terms = [(alpha, entropy, np.asarray, 0), (1 - alpha, gradient_of(gradient), gradient_of, 1)]
    terms = [term for term in terms if term[0] > 0]
    valued = np.logical_and.reduce([np.isfinite(signal) for _, signal, _, _ in terms])
    fits = [(w, _fitted(normalisation, signal[valued]), of, i) for w, signal, of, i in terms]

    def score(*signals: np.ndarray) -> np.ndarray:
        total = sum(weight * inverse(of(signals[i])) for weight, inverse, of, i in fits)
        return np.where(valued, total, np.nan)

    return score


def check_options(alpha: float, normalisation: str) -> None:
    """`TypeError` or `ValueError` unless SKI is defined for these options."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.floating)):
        raise TypeError(f"alpha: expected a number, got {alpha!r}")
    if not isinstance(normalisation, str):
        raise TypeError(f"normalisation: expected a name, got {normalisation!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")


def _profile(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name}: expected shape [L], got {values.shape}")
    return values


def _log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(x)


def _fitted(normalisation: str, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    if values.size == 0 or np.ptp(values) == 0:
        return lambda x: np.where(np.isnan(x), np.nan, 0.5)
    return NORMALISATIONS[normalisation](values)


def _minmax(fitted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    low, high = fitted.min(), fitted.max()
    return lambda x: (high - x) / (high - low)


def _rank(fitted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    values, counts = np.unique(fitted, return_counts=True)
    above = fitted.size - np.cumsum(counts)
    shares = (above + (counts - 1) / 2) / (fitted.size - 1)
    return lambda x: np.interp(x, values, shares)  # between the fitted values it is their linear interpolation


def _zscore(fitted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    mean, std = fitted.mean(), fitted.std()
    # tanh is the logistic function that cannot overflow
    return lambda x: 0.5 - 0.5 * np.tanh((x - mean) / std / 2)


NORMALISATIONS = {"minmax": _minmax, "rank": _rank, "zscore": _zscore}
