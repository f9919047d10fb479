"""Target modules for any peft configuration, measured on a few batches without a training step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ..decide import Plan, SelectConfig, select
from ..measure import Monitor, MonitorConfig
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
    """`{"target_modules": [...]}` for any peft configuration: the layers that a short measurement points at.

    In the manner of peft's `find_kappa_target_modules`: `LoraConfig(**find_inflection_target_modules(model, loader))`.
    `steps` batches of `dataloader` go forward and backward; nothing is updated, and gradients, `requires_grad` and
    mode of the model are as before. The model is measured in the mode it is in, on the device it is on; batches are
    moved there.

    Args:
        model: returns a loss for a batch (`model(**batch).loss` or `["loss"]`).
        dataloader: batches as mappings of tensors, labels included.
        steps: how many batches; at least 2, because one does not show what is noise.
        config: what is measured, and on how many rows; `every` is 1. None: entropy and activation gradients.
        select_config: how layers are chosen; None: `SelectConfig()`.
        wanted: as `target_modules` of `inject`.

    Raises:
        ValueError: a batch gives no loss, there are no batches, or no layer stands out (the sentence says why, and
            `SelectConfig(method="top", k=...)` takes the best ones nevertheless).
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise ValueError(f"steps: expected an integer >= 2, got {steps!r}")
    base = unwrapped(model)
    if base is not model:
        raise ValueError("model: it carries adapters already; pass the base model")
    config = config or MonitorConfig(every=1, quantities=("attention", "activation_grad"))
    plan = select(_measured(model, dataloader, steps, config), select_config or SelectConfig())
    if not plan.layers:
        raise ValueError(
            f"dataloader: no layer stands out. {plan.summary} More steps may show one; "
            "SelectConfig(method='top', k=...) takes the best ones nevertheless"
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
                raise ValueError("dataloader: a batch gave no loss; put labels into the batches")
            loss.backward()
            monitor.step()
            model.zero_grad(set_to_none=True)
            count += 1
        if count < 2:
            raise ValueError(f"dataloader: expected at least 2 batches, got {count}")
        return monitor.timeline


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients as they were, and one parameter to differentiate where all are frozen."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    frozen = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    lent = [] if any(p.requires_grad for p in model.parameters()) else frozen[-1:]
    was_enabled = torch.is_grad_enabled()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for parameter in lent:
            parameter.requires_grad_(True)
        torch.set_grad_enabled(True)
        yield
    finally:
        torch.set_grad_enabled(was_enabled)
        for parameter in lent:
            parameter.requires_grad_(False)
        for parameter, gradient in gradients:
            parameter.grad = gradient
