"""What is measured, and of what shape it is."""

from __future__ import annotations

import numpy as np

__all__ = ["HEAD_SIGNALS", "LAYER_SIGNALS", "STEP_SIGNALS", "checked", "signal_shapes"]

# Of the training batch, and those that begin with "probe_" of the probe set: [S, L, H], float32; [S, L], float64
HEAD_SIGNALS = ("entropy", "entropy_se", "max_logit", "collision", "sink", "probe_entropy")
LAYER_SIGNALS = ("activation_grad", "parameter_grad", "delta_cka", "delta_cka_se", "probe_activation_grad")
# [S], as float64, the same in all rows of a step
STEP_SIGNALS = ("loss", "skipped", "missing_ranks", "measure_ms", "probe_ms")


def signal_shapes(layers: int, heads: int) -> dict[str, tuple[int, ...]]:
    """The shape of each signal of one step."""
    return {
        **dict.fromkeys(HEAD_SIGNALS, (layers, heads)),
        **dict.fromkeys(LAYER_SIGNALS, (layers,)),
        **dict.fromkeys(STEP_SIGNALS, ()),
    }


def checked(signals: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Every signal in memory of its own, NaN where it is missing. `ValueError` names one that is unknown or unfit."""
    unknown = sorted(set(signals) - set(shapes))
    if unknown:
        raise ValueError(f"unknown signals {unknown}: expected some of {list(shapes)}")
    values = {}
    for name, shape in shapes.items():
        dtype = np.float32 if name in HEAD_SIGNALS else np.float64
        try:
            values[name] = np.array(signals[name], dtype) if name in signals else np.full(shape, np.nan, dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected numbers, got {type(signals[name]).__name__}") from error
        if values[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {values[name].shape}")
    return values
