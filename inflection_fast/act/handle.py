"""The protocol of interventions: apply one, look at what it did, take it back.

An intervention is an object with its settings; `apply(model, where)` acts on the blocks that a plan or indices name and
returns a handle. The handle is a context manager; `remove()` leaves the model as it was to the bit, or raises where the
intervention is permanent; `describe()` is what a plan file and a report say about it. Handles with a schedule advance
by `step()`, once for each optimizer step, or by the Trainer callback that `callback()` makes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from ..blocks import Block
from ..decide import Plan
from .planned import blocks_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Handle", "Scheduled", "Slot", "check_fraction", "check_steps", "parameters_in", "slots"]

_applied: weakref.WeakKeyDictionary[nn.Module, dict[str, set[int]]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Where a parameter of a model is. FSDP2 puts another one there when it shards: what was held before is dead."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is there now; None once it was parametrised or taken away."""
        return self.owner._parameters.get(self.name)

    @property
    def trains(self) -> bool:
        """Whether it requires a gradient."""
        return self.parameter is not None and self.parameter.requires_grad


def parameters_in(held: Sequence[Slot]) -> list[nn.Parameter]:
    """What is in these places now."""
    return [parameter for parameter in (slot.parameter for slot in held) if parameter is not None]


def slots(module: nn.Module) -> list[Slot]:
    """The places of all parameters of a module."""
    return [Slot(owner, name) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]


class Handle:
    """What an intervention that was applied leaves in the caller's hands."""

    name = ""  # of the intervention
    permanent = False  # remove() cannot take it back

    def __init__(self, model: nn.Module, where: Plan | Sequence[int] | int | None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: DataParallel runs replicas, which interventions do not reach; use DistributedDataParallel"
            )
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ValueError("model: it is compiled; apply interventions before compiling")
        self.model = model
        self.blocks: list[Block] = blocks_of(model, where)
        held = _applied.setdefault(model, {}).setdefault(self.name, set())
        twice = held & set(self.layers)
        if twice and not self.permanent:
            raise ValueError(
                f"layers: {self.name} is applied already to blocks {sorted(twice)}; remove() the handle of that first"
            )
        self._live = True

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks that are acted on."""
        return [block.index for block in self.blocks]

    def _settings(self) -> dict[str, Any]:
        return {}

    def _words(self) -> str:
        return f"{self.name} on blocks {', '.join(map(str, self.layers))}."

    def describe(self) -> dict[str, Any]:
        """ "intervention", "words", "layers", "permanent" and the settings: plain values, for `Plan.actions`."""
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
        """Nothing else of this kind is applied to these blocks until `remove()`. Called last, when all is in place."""
        _applied[self.model][self.name] |= set(self.layers)

    def remove(self) -> None:
        """Leave the model as it was before. Safe to repeat. `RuntimeError` where the intervention is permanent."""
        if self.permanent:
            raise RuntimeError(f"{self.name} is permanent: keep a copy of the weights to go back to")
        if self._live:
            self._live = False
            _applied.get(self.model, {}).get(self.name, set()).difference_update(self.layers)
            self._remove()

    def _remove(self) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict) -> Handle:
        """Itself: a copy of a model (an average of its weights) carries the hooks along, which do nothing there."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        if not self.permanent:
            self.remove()


class Scheduled(Handle):
    """A handle whose effect depends on the optimizer step."""

    def __init__(self, model: nn.Module, where: Plan | Sequence[int] | int | None):
        super().__init__(model, where)
        self.steps_done = 0

    def step(self) -> None:
        """One optimizer step is done."""
        self.set_step(self.steps_done + 1)

    def set_step(self, step: int) -> None:
        """Be as after so many optimizer steps: for a training that is resumed."""
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step: expected an integer >= 0, got {step!r}")
        self.steps_done = step
        if self._live:
            self._update()

    def _update(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken."""
        self.set_step(state["steps_done"])

    def callback(self) -> TrainerCallback:
        """A `transformers.TrainerCallback` that advances with the Trainer's optimizer steps, also when it resumes."""
        return _Stepping(self)


class _Stepping(TrainerCallback):
    def __init__(self, handle: Scheduled):
        self._handle = handle

    def on_train_begin(self, args, state, control, **kwargs):
        self._handle.load_state_dict({"steps_done": state.global_step})

    def on_step_end(self, args, state, control, **kwargs):
        self._handle.set_step(state.global_step)


def check_steps(name: str, value: int, least: int = 1) -> None:
    """`ValueError` unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """`ValueError` unless `value` is a number in [0, 1]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
