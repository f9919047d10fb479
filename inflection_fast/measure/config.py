"""The settings of a monitor."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

from torch import nn

from .. import quantities as registry
from ..blocks import Block
from ..ops.cka import POOLINGS
from ..quantities import Quantity
from .placements import RemoteBlock
from .schedule import ProbeBudget

__all__ = ["MonitorConfig", "meta_of"]

EVERY = 10
FROZEN_SHARE = 1 / 32
_PACKAGES = ("inflection_fast", "torch", "transformers", "peft")  # their versions are stored in the timeline
_FORWARDS = ("trained", "all")
_COMPILED = ("graph", "eager")
_REFERENCES = ("start", "previous", "adapters_off", None)
_MIN_SAMPLED_ROWS = 2  # the standard error comes from differences between neighbouring sampled rows
_MIN_CKA_ROWS = 4  # debiased CKA is undefined below
_MAX_SEED = 2**32 - 1  # torch's generator on the CPU takes no more bits of a seed


class _Names(tuple):
    """The value of `signals`; `dataclasses.replace` passes it on, which must not change `quantities`."""


@dataclass(frozen=True)
class MonitorConfig:
    """Settings of a `Monitor`. `TypeError` or `ValueError` names the field, what came and what is accepted."""

    # Measure optimizer steps 0, every, 2 * every, ...; or a mapping from quantities to such numbers. A quantity with a
    # cadence of its own (Quantity.every) keeps it unless the mapping names it; other quantities that it lacks have 10.
    every: int | Mapping[str, int] = EVERY
    # Query rows sampled per sequence of the batch, stratified over positions; None: all. Sequences packed into one row
    # count as one sequence; each gets rows in proportion to its length.
    rows: int | None = 64
    # What to measure: names (ours: `inflection_fast.quantities.QUANTITIES`; others by entry points) and instances.
    quantities: tuple[str | Quantity, ...] = registry.DEFAULT
    blocks: tuple[str, ...] | None = None  # module names of the blocks in forward order; None: found by structure
    # Run the probe every `probe_every` steps (a multiple of every). None: as `every`, but once its runs have taken a
    # second in all, a run takes at most `probe_share` of the time until the next one. To reach that, fewer rows are
    # compared (every second, third, ...) where comparing features takes longer than the forward passes, and runs are
    # further apart. The columns `probe_every` and `probe_rows` of the timeline have the values in use.
    probe_every: int | None = None
    probe_share: float | None = 0.01  # None: no limit
    # Which forwards under autograd count: "trained", those with a backward pass; "all".
    forwards: str = "trained"
    # Share of the sequences of each micro-batch that is used for activation gradients below the lowest trainable block,
    # which need a backward pass that the training does not have; the default costs less than a tenth of a step from
    # batches of 32 on. At least one sequence; 1.0: all, exactly. Always exact are batches of one, packed sequences,
    # batch norm in a block, several stacks, FSDP2 and tensor parallelism.
    frozen_share: float = FROZEN_SHARE
    cka_rank: int | None = None  # shared PCA basis of this rank; None: full space
    cka_debiased: bool = True  # debiased (may leave [0, 1]) or biased CKA
    cka_pooling: str = "tokens"  # "tokens": every valid token is a row; "mean", "first", "last": a row per sequence
    cka_rows: int = 2048  # feature rows of the probe; memory: layers * cka_rows * width elements, twice while comparing
    # "previous": the snapshot before; "adapters_off": the peft model without its adapters; None: no reference, for
    # quantities without one: half the memory, and one probe run less.
    cka_reference: str | None = "start"
    # Standard error of delta-CKA, by leaving out each sequence of the probe: five times the time, and a wait for the
    # device, because the lengths of the sequences are read on the host.
    cka_se: bool = False
    # A compiled model: "graph" compiles taps into it, again if it has run; "eager": measured steps run uncompiled.
    compiled: str = "graph"
    seed: int = 0  # of the sampled query rows and of the probe's feature rows
    signals: InitVar[tuple[str, ...] | None] = None  # the earlier name of `quantities`

    def __post_init__(self, signals: tuple[str, ...] | None):
        renamed = signals is not None and not isinstance(signals, _Names)
        if renamed:
            object.__setattr__(self, "quantities", signals)
        self._check_quantities("signals" if renamed else "quantities")
        object.__setattr__(self, "signals", _Names(self.names))
        self._check_every()
        _integer(self, "rows", at_least=_MIN_SAMPLED_ROWS, optional=True)
        if self.blocks is not None:
            _names(self, "blocks")
            if not self.blocks:
                raise ValueError("blocks: expected module names, or None to find the blocks by structure; got none")
        _integer(self, "probe_every", at_least=1, optional=True)
        if self.probe_every is not None and isinstance(self.every, int) and self.probe_every % self.every:
            raise ValueError(f"probe_every: expected a multiple of every ({self.every}), got {self.probe_every}")
        _share(self, "probe_share", optional=True)
        _share(self, "frozen_share")
        _choice(self, "forwards", _FORWARDS)
        _choice(self, "compiled", _COMPILED)
        _integer(self, "cka_rank", at_least=1, optional=True)
        if not isinstance(self.cka_debiased, bool):
            raise TypeError(f"cka_debiased: expected True or False, got {self.cka_debiased!r}")
        _choice(self, "cka_pooling", POOLINGS)
        _integer(self, "cka_rows", at_least=_MIN_CKA_ROWS)
        _choice(self, "cka_reference", _REFERENCES)
        if not isinstance(self.cka_se, bool):
            raise TypeError(f"cka_se: expected True or False, got {self.cka_se!r}")
        _integer(self, "seed", at_least=0, at_most=_MAX_SEED)

    def _check_quantities(self, field: str) -> None:
        value = self.quantities
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise TypeError(f"{field}: expected a tuple of names and instances of Quantity, got {value!r}")
        for one in value:
            if isinstance(one, type) and issubclass(one, Quantity):
                raise TypeError(
                    f"{field}: expected an instance of {one.__name__}, got the class; write {one.__name__}()"
                )
            if not isinstance(one, (str, Quantity)):
                raise TypeError(f"{field}: expected names and instances of Quantity, got {one!r}")
        object.__setattr__(self, "quantities", tuple(value))
        names = [one for one in value if isinstance(one, str) and one not in registry.QUANTITIES]
        unknown = [name for name in names if name not in registry.known()]  # which reads the metadata of all packages
        if unknown or not value or len(set(self.names)) < len(value):
            raise ValueError(
                f"{field}: expected distinct names out of {registry.known()}, or instances, at least one, got {value}"
            )

    def _check_every(self) -> None:
        if not isinstance(self.every, Mapping):
            _integer(self, "every", at_least=1)
            return
        unknown = [name for name in self.every if name not in self.names]
        if unknown:
            raise ValueError(f"every: names {unknown}, which are not among the quantities {self.names}")
        for name, value in self.every.items():
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"every: expected integers >= 1, got {value!r} for {name!r}")
            if operator.index(value) < 1:
                raise ValueError(f"every: expected integers >= 1, got {value} for {name!r}")
        object.__setattr__(self, "every", {name: operator.index(value) for name, value in self.every.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantities, in order."""
        return tuple(one if isinstance(one, str) else one.name for one in self.quantities)

    def instances(self) -> list[Quantity]:
        """The quantities."""
        return [registry.made(one) if isinstance(one, str) else one for one in self.quantities]

    def cadence(self, quantity: Quantity) -> int:
        """The cadence of a quantity in steps, before the limit of `probe_share`. `ValueError` below 1."""
        own = quantity.every
        if own is not None and (isinstance(own, bool) or not hasattr(own, "__index__") or operator.index(own) < 1):
            raise ValueError(f"quantity {quantity.name!r}: every is {own!r}, expected an integer >= 1 or None")
        if isinstance(self.every, Mapping):
            return self.every.get(quantity.name, EVERY if own is None else own)
        return self.every if own is None else own

    def probe_budget(
        self, every: Mapping[str, int], first_step: int, *, joined: bool, patience_s: float
    ) -> ProbeBudget:
        """The schedule of the probe, for quantities with the cadences `every`; see `ProbeBudget`."""
        named = self.probe_every
        every = dict.fromkeys(every, named) if named else every
        share = None if named else self.probe_share
        return ProbeBudget(every, share, first_step, joined=joined, patience_s=patience_s)

    def as_dict(self) -> dict:
        """All settings as JSON values; quantities by name."""
        return asdict(replace(self, quantities=("attention",), every=1)) | {
            "quantities": list(self.names),
            "every": dict(self.every) if isinstance(self.every, Mapping) else self.every,
        }


def _share(config: MonitorConfig, field: str, *, optional: bool = False) -> None:
    value = getattr(config, field)
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field}: expected a number{' or None' if optional else ''}, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{field}: expected a share above 0 and up to 1, got {value}")


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


def _choice(config: MonitorConfig, field: str, accepted: tuple[str | None, ...]) -> None:
    value = getattr(config, field)
    if value not in accepted:
        raise ValueError(f"{field}: expected one of {accepted}, got {value!r}")


def meta_of(model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
    """Model, stacks of blocks, configuration and versions, for the metadata of the timeline."""
    inner = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    inner = getattr(inner, "get_base_model", lambda: inner)()
    return {
        "model": {
            "class": type(inner).__name__,
            "model_type": getattr(getattr(inner, "config", None), "model_type", None),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "stacks": _stacks_of(blocks),
        "config": config.as_dict(),
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name)},
    }


def _stacks_of(blocks: Sequence[Block]) -> list[dict]:
    """Each stack: indices of its blocks, its numbers of parameters and of trainable ones."""
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(block.stack, []).append(block)
    described = []
    for name, held in stacks.items():
        parameters = {id(p): p for block in held for p in block.module.parameters()}
        remote_block = [block.module.held for block in held if isinstance(block.module, RemoteBlock)]
        described.append(
            {
                "name": name,
                "layers": [block.index for block in held],
                "parameters": sum(p.numel() for p in parameters.values()) + sum(n for n, _ in remote_block),
                "trainable": sum(p.numel() for p in parameters.values() if p.requires_grad)
                + sum(n for _, n in remote_block),
            }
        )
    return described
