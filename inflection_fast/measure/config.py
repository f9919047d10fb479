"""What to measure, and when."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from ..ops.cka_rows import POOLINGS

__all__ = ["SIGNALS", "MonitorConfig"]

DEFAULT_SIGNALS = ("attention", "activation_grad", "parameter_grad", "delta_cka")
SIGNALS = (*DEFAULT_SIGNALS, "probe_entropy", "probe_activation_grad")
_REFERENCES = ("start", "previous", "adapters_off")
_MIN_SAMPLED_ROWS = 2  # the standard error comes from differences between neighbouring sampled rows
_MIN_CKA_ROWS = 4  # debiased CKA is undefined below
_MAX_SEED = 2**32 - 1  # torch's generator on the CPU takes no more bits of a seed


@dataclass(frozen=True)
class MonitorConfig:
    """Settings of a `Monitor`. `TypeError` or `ValueError` names the field, what came and what is accepted."""

    every: int = 10  # measure optimizer steps 0, every, 2 * every, ...
    # Query rows sampled per sequence of the batch, stratified over positions; None: all. Sequences that are packed into
    # one row count as one, and share its rows by their lengths.
    rows: int | None = 64
    signals: tuple[str, ...] = DEFAULT_SIGNALS  # which to measure, "probe_entropy" and "probe_activation_grad" too
    blocks: tuple[str, ...] | None = None  # module names of the blocks in forward order; None: found by structure
    probe_every: int | None = None  # delta-CKA on the probe every so many steps (a multiple of every)
    cka_rank: int | None = None  # shared PCA basis of this rank; None: full space
    cka_debiased: bool = True  # debiased (may leave [0, 1]) or biased CKA
    cka_pooling: str = "tokens"  # "tokens": every valid token is a row; "mean", "first", "last": a row per sequence
    cka_rows: int = 2048  # feature rows of the probe; memory: layers * cka_rows * width elements, twice while comparing
    cka_reference: str = "start"  # "previous": the snapshot before; "adapters_off": the peft model without its adapters
    # Standard error of delta-CKA, by leaving out each sequence of the probe: five times its time, and a wait for the
    # device, because the lengths of the sequences are read on the host.
    cka_se: bool = False
    seed: int = 0  # of the sampled query rows and of the probe's feature rows

    def __post_init__(self):
        _integer(self, "every", at_least=1)
        _integer(self, "rows", at_least=_MIN_SAMPLED_ROWS, optional=True)
        _names(self, "signals")
        unknown = [name for name in self.signals if name not in SIGNALS]
        if unknown or not self.signals or len(set(self.signals)) < len(self.signals):
            raise ValueError(f"signals: expected distinct names out of {SIGNALS}, at least one, got {self.signals}")
        if self.blocks is not None:
            _names(self, "blocks")
            if not self.blocks:
                raise ValueError("blocks: expected module names, or None to find the blocks by structure; got none")
        _integer(self, "probe_every", at_least=1, optional=True)
        if self.probe_every is not None and self.probe_every % self.every:
            raise ValueError(f"probe_every: expected a multiple of every ({self.every}), got {self.probe_every}")
        _integer(self, "cka_rank", at_least=1, optional=True)
        if not isinstance(self.cka_debiased, bool):
            raise TypeError(f"cka_debiased: expected True or False, got {self.cka_debiased!r}")
        _choice(self, "cka_pooling", POOLINGS)
        _integer(self, "cka_rows", at_least=_MIN_CKA_ROWS)
        _choice(self, "cka_reference", _REFERENCES)
        if not isinstance(self.cka_se, bool):
            raise TypeError(f"cka_se: expected True or False, got {self.cka_se!r}")
        _integer(self, "seed", at_least=0, at_most=_MAX_SEED)


def _integer(
    config: MonitorConfig, field: str, *, at_least: int, at_most: int | None = None, optional: bool = False
) -> None:
    value = getattr(config, field)
    if optional and value is None:
        return
    accepted = f"expected an integer >= {at_least}" if at_most is None else f"expected {at_least} to {at_most}"
    accepted += " or None" if optional else ""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{field}: {accepted}, got {value!r}")
    if operator.index(value) < at_least or (at_most is not None and operator.index(value) > at_most):
        raise ValueError(f"{field}: {accepted}, got {value}")
    object.__setattr__(config, field, operator.index(value))


def _names(config: MonitorConfig, field: str) -> None:
    value = getattr(config, field)
    if isinstance(value, str) or not isinstance(value, (tuple, list)) or not all(isinstance(n, str) for n in value):
        raise TypeError(f"{field}: expected a tuple of names, got {value!r}")
    object.__setattr__(config, field, tuple(value))


def _choice(config: MonitorConfig, field: str, accepted: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in accepted:
        raise ValueError(f"{field}: expected one of {accepted}, got {value!r}")
