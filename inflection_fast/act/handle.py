"""The protocol of interventions: apply one, describe what it did, remove it.

An intervention is called with a model and the blocks of a plan or of indices. What is called is the class of its handle
under the name of a function: `head_dropout(model, plan)` applies it and is the handle. The handle is a context manager.
`remove()` restores the model to the bit, or raises if the intervention is permanent. `describe()` returns what plan
files and reports say about it. Handles with a schedule advance by `step()`, once for each optimizer step, or by the
Trainer callback that `callback()` returns.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from ..blocks import Block
from ..decide import Plan
from .planned import Layers, blocks_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Handle", "Scheduled", "Slot", "check_integer", "check_number", "parameters_in", "slots",
]  # fmt: skip

_applied: weakref.WeakKeyDictionary[nn.Module, dict[str, set[int]]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """The place of a parameter in a model. When FSDP2 shards, it replaces the parameters that were there before."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """The current parameter; None if it was parametrised or removed."""
        return self.owner._parameters.get(self.name)

    @property
    def trains(self) -> bool:
        """Whether it requires a gradient."""
        return self.parameter is not None and self.parameter.requires_grad


def parameters_in(held: Sequence[Slot]) -> list[nn.Parameter]:
    """The current parameters of these places."""
    return [parameter for parameter in (slot.parameter for slot in held) if parameter is not None]


def slots(module: nn.Module) -> list[Slot]:
    """The places of all parameters of a module."""
    return [Slot(owner, name) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]


class Handle:
    """An intervention that was applied to a model."""

    name = ""  # of the intervention
    permanent = False  # remove() cannot take it back
    settings: tuple[str, ...] = ()  # attributes that `describe` has, with JSON values

    def __init__(self, model: nn.Module, where: Layers):
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: DataParallel runs replicas, where interventions have no effect; use DistributedDataParallel"
            )
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ValueError("model: it is compiled; apply interventions before compiling")
        self.model = model
        self.blocks: list[Block] = blocks_of(model, where)
        self._attached = ExitStack()  # removes hooks and patches
        held = _applied.setdefault(model, {}).setdefault(self.name, set())
        twice = held & set(self.layers)
        if twice and not self.permanent:
            raise ValueError(
                f"layers: {self.name} is applied already to blocks {sorted(twice)}; call remove() of its handle first"
            )
        self._live = True

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks that are acted on."""
        return [block.index for block in self.blocks]

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.settings}

    def _words(self) -> str:
        return f"{self.name} on blocks {', '.join(map(str, self.layers))}."

    def describe(self) -> dict[str, Any]:
        """ "intervention", "words", "layers", "permanent" and the settings as JSON values, for `Plan.actions`."""
        return {
            "intervention": self.name,
            "words": self._words(),
            "layers": self.layers,
            "permanent": self.permanent,
            **self._settings(),
        }

    def record(self, plan: Plan) -> Plan:
        """The plan with this intervention among its `actions`."""
        return dataclasses.replace(plan, actions=(*plan.actions, self.describe()))

    def _hold(self) -> None:
        """Register these blocks, which refuse a second intervention of this kind until `remove()`. Called last."""
        _applied[self.model][self.name] |= set(self.layers)

    def remove(self) -> None:
        """Restore the model. Safe to repeat. `RuntimeError` if the intervention is permanent."""
        if self.permanent:
            raise RuntimeError(f"{self.name} is permanent: keep a copy of the weights before it to restore them")
        if self._live:
            self._live = False
            _applied.get(self.model, {}).get(self.name, set()).difference_update(self.layers)
            self._remove()

    def _remove(self) -> None:
        self._attached.close()

    def __deepcopy__(self, memo: dict) -> Handle:
        """Returns itself: the hooks of a copied model (an average of weights) refer to it, and do nothing there."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        if not self.permanent:
            self.remove()


class Scheduled(Handle):
    """A handle whose effect depends on the optimizer step."""

    def __init__(self, model: nn.Module, where: Layers):
        super().__init__(model, where)
        self.steps_done = 0

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.set_step(self.steps_done + 1)

    def set_step(self, step: int) -> None:
        """Set the number of optimizer steps that are done, for a training that is resumed."""
        check_integer("step", step, 0)
        self.steps_done = step
        if self._live:
            self._update()

    def _update(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict()`."""
        self.set_step(state["steps_done"])

    def callback(self) -> TrainerCallback:
        """A `transformers.TrainerCallback` that follows the Trainer's optimizer steps, also after a resume."""
        return _Stepping(self)


class _Stepping(TrainerCallback):
    def __init__(self, handle: Scheduled):
        self._handle = handle

    def on_train_begin(self, args, state, control, **kwargs):
        self._handle.load_state_dict({"steps_done": state.global_step})

    def on_step_end(self, args, state, control, **kwargs):
        self._handle.set_step(state.global_step)


def check_integer(name: str, value: int, least: int = 1) -> None:
    """`ValueError` unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


_RANGES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda value: 0 < value < math.inf,
    ">= 0": lambda value: 0 <= value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def check_number(name: str, value: float, accepted: str) -> None:
    """`ValueError` unless `value` is a finite number in the range `accepted`, one of `_RANGES`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _RANGES[accepted](value):
        raise ValueError(f"{name}: expected a number {accepted}, got {value!r}")
