"""Norms of the weights of each block, and of their change by an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .arguments import check_count
from .dtensors import is_dtensor, local_of
from .quantity import Accumulator, AlertRule, Column, MeasuredModel, Parameters, Quantity, Sums
from .quantity import Update as UpdateSeen

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["Update"]

COPY_BYTES = 256 << 20


_of_layer = partial(Column, "1", ("layer",), scale="log")


class Update(Quantity):
    """Norm of a block's trainable weights, ||theta||, and of their change over it, ||delta theta|| / ||theta||.

    Where the optimizer's state gives the change, no weight is copied: float32 and float64 weights under torch's SGD,
    Adam and AdamW. What was subtracted follows from the moments, the learning rate and the weight decay as they were in
    the step, and is exact up to the rounding of the weights themselves. Everything else (16-bit weights, whose small
    updates are rounded away, other optimizers, fused or wrapped ones that change the state's layout) is compared with a
    copy from just before the step. Copies of more than `copy_bytes` are thinned out: every k-th element of each of
    these weights is kept and its squared change counts k times, an estimate.

    Columns: `weight_norm`, before the step, and `update_ratio`. A step that a gradient scaler drops has no update, and
    one by an optimizer that is not torch's (DeepSpeed) is not seen.

    Cost: two reads of weights and optimizer state. Memory: temporaries of one block's weights, copies of at most
    `copy_bytes` (256 MiB) while the optimizer steps, 32 bytes per layer.
    """

    name = "update"
    accumulators = {name: Accumulator("layer", held="part") for name in ("weights", "changes")} | {
        name: Accumulator("layer", held="alike") for name in ("trained", "stepped")
    }
    columns = {
        "weight_norm": _of_layer(
            "norm of the weights", "Norm of a block's trainable weights before the step.", count="trained"
        ),
        "update_ratio": _of_layer(
            "relative size of the update",
            "Norm of the change of a block's trainable weights in an optimizer step over the norm of these weights.",
            count="stepped",
            alerts=(AlertRule("exploding", 10.0), AlertRule("not_finite")),
        ),
    }

    def __init__(self, copy_bytes: int = COPY_BYTES):
        check_count("copy_bytes", copy_bytes)
        self.copy_bytes = copy_bytes

    def prepare(self, model: MeasuredModel) -> None:
        """Begin without a step under way."""
        self._hooks: list[RemovableHandle] = []
        self._changes: _Changes | None = None

    def before_update(self, sums: Sums, update: UpdateSeen) -> None:
        """Write the norms, and listen for the optimizers that step."""
        parameters = update.parameters
        trained = [
            (layer, p) for layer, p in zip(parameters.layers, parameters.parameters, strict=True) if p.requires_grad
        ]
        if not trained:
            return
        layers, weights = zip(*trained, strict=True)
        sums["weights"].copy_(parameters.squares([p.detach() for p in weights], layers))
        sums["trained"].copy_(parameters.marked(layers))
        self._stop()
        self._changes = changes = _Changes(parameters, dict(zip(weights, layers, strict=True)), self.copy_bytes)
        self._hooks = [
            register_optimizer_step_pre_hook(changes.before),
            register_optimizer_step_post_hook(changes.after),
        ]

    def after_update(self, sums: Sums, update: UpdateSeen) -> None:
        """Write the changes that were seen."""
        changes = self._changes
        self._stop()
        if changes is None or changes.squares is None:
            return
        sums["changes"].copy_(changes.squares)
        sums["stepped"].copy_(sums["trained"])

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._changes = [], None

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Norms."""
        return {"weight_norm": np.sqrt(sums["weights"]), "update_ratio": np.sqrt(sums["changes"] / sums["weights"])}


class _Changes:
    """The hooks of one step; `squares` [L] are the summed squares of the changes, None before an optimizer stepped."""

    def __init__(self, parameters: Parameters, layers: dict[nn.Parameter, int], copy_bytes: int):
        self._parameters, self._layers, self._copy_bytes = parameters, layers, copy_bytes
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._stride = 1
        self.squares: Tensor | None = None

    def before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Copy the weights whose change is not in the optimizer state."""
        wanted = [p for group in optimizer.param_groups for p in group["params"] if p in self._layers]
        wanted = [p for p in wanted if not _change_is_known(optimizer, p)]
        need = sum(local_of(p).nbytes for p in wanted)
        self._stride = -(-need // self._copy_bytes) if need else 1
        with torch.no_grad():
            self._copies = {p: _thinned(p.detach(), self._stride).clone() for p in wanted}

    def after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Add the squares of the changes by this optimizer."""
        by_layer: dict[int, list[tuple[nn.Parameter, dict]]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self._layers:
                    by_layer.setdefault(self._layers[p], []).append((p, group))
        with torch.no_grad():
            for layer, members in by_layer.items():  # one block at a time: its changes are as large as its weights
                known = (change_of(optimizer, p, group) for p, group in members if p not in self._copies)
                told = [change for change in known if change is not None]
                seen = [_difference(p, self._copies.pop(p), self._stride) for p, _ in members if p in self._copies]
                for changes, weight in ((told, 1), (seen, self._stride)):
                    if changes:
                        squares = weight * self._parameters.squares(changes, [layer] * len(changes))
                        self.squares = squares if self.squares is None else self.squares + squares
        if self.squares is None and by_layer:  # all of them without a gradient
            self.squares = self._parameters.squares([], [])
        self._copies = {}


def _thinned(tensor: Tensor, stride: int) -> Tensor:
    """Every `stride`-th element of what this rank holds, placed over ranks like the whole."""
    if stride == 1:
        return tensor
    kept = local_of(tensor).flatten()[::stride]
    if not is_dtensor(tensor):
        return kept
    return type(tensor).from_local(kept, tensor.device_mesh, tensor.placements, run_check=False)


def _difference(after: nn.Parameter, before: Tensor, stride: int) -> Tensor:
    # In float32, because the difference of neighbouring 16-bit numbers need not be one.
    now = _thinned(after.detach(), stride)
    return now - before if now.dtype == torch.float64 else now.float() - before.float()


# ---- changes from the state of an optimizer --------------------------------------------------------------------------


def _change_is_known(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether `change_of` gives the change of `parameter`."""
    kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return type(optimizer) in kinds and parameter.dtype in (torch.float32, torch.float64) and not parameter.is_complex()


def change_of(optimizer: Optimizer, parameter: nn.Parameter, group: dict) -> Tensor | None:
    """The last change of `parameter` by torch's SGD, Adam or AdamW; None without a gradient.

    Weight decay that multiplies the weights is undone exactly: of theta' = theta (1 - lr wd) - lr u the change is
    theta' - theta = -lr / (1 - lr wd) (u + wd theta'). Written over two temporaries, because these are as large as the
    parameter.
    """
    if parameter.grad is None:
        return None
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(optimizer, torch.optim.SGD):
        scale = -lr
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None and not group["nesterov"]:
            return momentum * scale
        gradient = -parameter.grad if group["maximize"] else parameter.grad
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        direction = gradient.clone() if momentum is None else gradient + group["momentum"] * momentum
    else:
        state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
        step = state["step"].to(
            parameter.device, torch.float64, non_blocking=True
        )  # 1 - beta^1 has few digits in float32
        squares = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        denominator = (squares / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = torch.div(state["exp_avg"], denominator, out=denominator)
        scale = -lr / (1 - beta1**step)
        if not (isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)):
            decay = 0.0  # it is in the moments already
    if isinstance(decay, float) and decay == 0.0:
        return direction.mul_(scale)
    kept = 1 - lr * decay
    return direction.mul_(scale / kept).add_(parameter.detach() * (-lr * decay / kept))
