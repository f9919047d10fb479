"""Timelines with a planted shape, as a measurement with noise would have written them."""

import numpy as np

from inflection_fast.timeline import TimelineWriter

# Entropy is lowest at block 5; the gradient, on its way down from the last block to the first, falls most at block 0.
ENTROPY = [2.90, 2.85, 2.75, 2.55, 2.20, 1.50, 2.15, 2.45, 2.60, 2.70, 2.80, 2.75]
LOG_GRADIENT = [-5.5, -2.4, -2.2, -2.0, -1.8, -1.6, -1.4, -1.2, -1.0, -0.8, -0.6, -0.4]
BAND = (0, 1, 4, 5, 6)


def timeline(
    entropy, log_gradient, *, steps=20, heads=4, noise=0.02, se=0.01, seed=0, layers=None, meta=None, missing=()
):
    """[L] profiles, repeated over steps and heads with noise; NaN stays NaN."""
    rng, L = np.random.default_rng(seed), len(entropy)
    layers = layers or [f"encoder.layer.{i}" for i in range(L)]
    meta = meta or {"model": {"class": "Toy", "model_type": "toy", "parameters": 1}, "config": {"every": 1}}
    with TimelineWriter(None, layers=layers, heads=heads, meta=meta) as writer:
        for step in range(steps):
            jitter = rng.normal(size=(L, heads)) * noise
            signals = {
                "entropy": np.asarray(entropy, float)[:, None] + jitter,
                "entropy_se": np.full((L, heads), se),
                "activation_grad": np.exp(np.asarray(log_gradient, float) + rng.normal(size=L) * noise),
                "loss": 1.0,
            }
            writer.append(step, **{k: np.asarray(v, np.float32) for k, v in signals.items() if k not in missing})
        return writer.timeline


def planted(**options):
    return timeline(ENTROPY, LOG_GRADIENT, **options)


def pointing_at(layers, L, **options):
    """A profile whose best scores are exactly those of `layers`, for `top`."""
    low = np.isin(np.arange(L), layers)
    return timeline(np.where(low, 1.0, 2.5), np.where(low, -5.0, -1.0), **options)
