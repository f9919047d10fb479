"""Target modules for any peft configuration, from a measurement on a few batches without a training step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ..decide import Plan, SelectConfig, select
from ..measure import Monitor, MonitorConfig
from ..measure.hooks import gradients_set_aside
from .handle import check_integer
from .planned import unwrapped

__all__ = ["find_inflection_target_modules"]

logger = logging.getLogger(__name__)


def find_inflection_target_modules(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]],
    *,
    steps: int = 16,
    config: MonitorConfig | None = None,
    select_config: SelectConfig | None = None,
    wanted: str | list[str] | None = None,
) -> dict[str, list[str]]:
    """`{"target_modules": [...]}` for any peft configuration: the layers chosen from a short measurement.

    Similar to peft's `find_kappa_target_modules`: `LoraConfig(**find_inflection_target_modules(model, loader))`.
    `steps` batches of `dataloader` go forward and backward. No weight is updated; gradients and `requires_grad` are
    restored. The model is measured in its current mode and on its device; batches are moved there.

    Args:
        model: returns a loss for a batch (`model(**batch).loss` or `["loss"]`).
        dataloader: batches as mappings of tensors, with labels.
        steps: number of batches, at least 2, because one does not show the noise.
        config: what is measured, and on how many rows; `every` is 1. None: entropy and activation gradients.
        select_config: how layers are chosen; None: `SelectConfig()`.
        wanted: as `target_modules` of `inject`.

    Raises:
        ValueError: a batch gives no loss, there are fewer than 2 batches, or no layer was chosen (the message says why;
            `SelectConfig(method="top", k=...)` takes the highest scores).
    """
    check_integer("steps", steps, 2)
    if unwrapped(model) is not model:
        raise ValueError("model: it carries adapters already; pass the base model")
    config = config or MonitorConfig(every=1, quantities=("attention", "activation_grad"))
    plan = select(_measured(model, dataloader, steps, config), select_config or SelectConfig())
    if not plan.layers:
        raise ValueError(
            f"dataloader: no layer was chosen. {plan.summary} Measure more steps, or take the highest scores with "
            "SelectConfig(method='top', k=...)"
        )
    logger.info("find_inflection_target_modules: %s", plan.summary)
    return {"target_modules": Plan.target_modules(plan, model, wanted)}


def _measured(model: nn.Module, dataloader: Iterable, steps: int, config: MonitorConfig):
    device = next(model.parameters()).device
    with _undisturbed(model), Monitor(model, config) as monitor:
        count = 0
        for batch in islice(dataloader, steps):
            if not isinstance(batch, Mapping):
                raise TypeError(f"dataloader: expected mappings of tensors, got {type(batch).__name__}")
            output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if not isinstance(loss, Tensor):
                raise ValueError("dataloader: the model returned no loss for a batch; add labels to the batches")
            loss.backward()
            monitor.step()
            model.zero_grad(set_to_none=True)
            count += 1
        if count < 2:
            raise ValueError(f"dataloader: expected at least 2 batches, got {count}")
        return monitor.timeline


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore gradients at the end. If all parameters are frozen, let one of them require a gradient until then."""
    with gradients_set_aside(model), torch.enable_grad():
        numbers = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
        if numbers and not any(p.requires_grad for p in model.parameters()):
            numbers[-1].requires_grad_(True)
        yield
