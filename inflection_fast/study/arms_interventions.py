"""LoRA on the planned blocks, with an intervention on the same blocks while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from inflection_fast.act.entropy_loss import attention_entropy_loss
from inflection_fast.act.handle import Handle, Scheduled
from inflection_fast.act.head_dropout import head_dropout
from inflection_fast.act.temperature import attention_temperature
from inflection_fast.study.adaptation import Adaptation, NoArm
from inflection_fast.study.arms import Planned, Seen
from inflection_fast.study.training_loop import TrainingHooks

__all__ = ["INTERVENTIONS", "Intervened", "intervention_hooks"]

INTERVENTIONS: dict[str, Callable[..., Handle]] = {
    "temperature": attention_temperature,
    "entropy_floor": attention_entropy_loss,
    "head_dropout": head_dropout,
}
SOFT_SHARE = 0.5  # of the steps, after which the temperature is the model's own


@dataclass(frozen=True)
class Intervened:
    """What `place` trains, and an intervention on its blocks.

    Where the plan is empty `place` takes the best blocks, as it does without the intervention, so the two arms differ
    in the intervention alone.
    """

    intervention: str
    place: Planned
    settings: dict[str, Any] = field(default_factory=dict)
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        chosen = self.place.choose(seen)
        settings = dict(self.settings)
        if self.intervention == "temperature":
            settings["steps"] = max(1, round(SOFT_SHARE * seen.config.train.steps))
        options = {"intervention": self.intervention, "on": list(chosen.layers), "settings": settings}
        try:
            self._apply(seen.model, options).remove()
        except ValueError as error:
            raise NoArm(" ".join(str(error).split())) from error
        return replace(chosen, options=options)

    @staticmethod
    def _apply(model: nn.Module, options: dict[str, Any]) -> Handle:
        return INTERVENTIONS[options["intervention"]](model, layers=list(options["on"]), **options["settings"])


def intervention_hooks(adaptation: Adaptation, model: nn.Module, steps: int) -> TrainingHooks:
    """Arguments of `train` that apply the intervention of an adaptation to `model` and take it back at the end."""
    handle = Intervened._apply(model, dict(adaptation.options))

    def after_step(step: int) -> None:
        if isinstance(handle, Scheduled):
            handle.step()
        if step + 1 >= steps:
            handle.remove()

    return {"after_step": after_step}
