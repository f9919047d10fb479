"""Attention temperature: softer attention at the start of a training, the model's usual attention at its end.

Scores s = q k^T * scale become s / T: queries are divided by T before the model's attention runs, which does not
change. So it works with every implementation (sdpa, eager, flash), and a monitor sees the softer attention. Biases and
masks that are added to the scores are not divided; a softcap is applied after the division.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..measure.attention_observer import interfaces_of
from .handle import Scheduled, check_integer, check_number
from .interface import change_queries
from .planned import Layers

__all__ = ["AttentionTemperature", "attention_temperature"]

_SCHEDULES = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


class AttentionTemperature(Scheduled):
    """Divide the attention scores of blocks by a temperature that changes from `start` to `end` in `steps` steps.

    ::

        with attention_temperature(model, plan) as temperature:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                temperature.step()

    With the Trainer pass `temperature.callback()` instead of calling `step`. With `steps=0` the temperature is always
    `end`. At temperature 1 outputs are equal to the bit; `remove()` removes all hooks. Self-attention and
    cross-attention of a block are scaled alike. Queries are scaled in their own dtype.

    Args:
        model: any model whose blocks use Transformers' attention interface, `F.scaled_dot_product_attention` or
            `nn.MultiheadAttention`; apply before compiling. Compiled models that call the torch functions break the
            graph at every block; models of Transformers do not.
        layers: a plan or indices of blocks; None: all.
        schedule: "linear" or "cosine".

    Raises:
        ValueError: a temperature that is not above 0, attention that cannot be scaled, an index out of range, or blocks
            whose temperature is set already.
    """

    name = "attention temperature"
    settings = ("start", "end", "steps", "schedule")

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        start: float = 1.5,
        end: float = 1.0,
        steps: int = 500,
        schedule: str = "linear",
    ):
        check_number("start", start, "> 0")
        check_number("end", end, "> 0")
        check_integer("steps", steps, 0)
        if schedule not in _SCHEDULES:
            raise ValueError(f"schedule: expected one of {sorted(_SCHEDULES)}, got {schedule!r}")
        super().__init__(model, layers)
        for block in self.blocks:
            if not interfaces_of(block.module) and not _calls_torch(block.module):
                raise ValueError(
                    f"model: the attention of {block.name} uses neither Transformers' attention interface nor torch's "
                    "scaled_dot_product_attention or MultiheadAttention, so it cannot be scaled"
                )
        self.start, self.end, self.steps, self.schedule = start, end, steps, schedule
        device = next(model.parameters()).device
        self._factor = torch.ones((), device=device)  # 1 / T; a tensor, so that a new value does not recompile
        self._modes: list[_ScalingMode] = []
        with ExitStack() as attached:
            self._attach(attached)
            self._update()
            self._attached = attached.pop_all()
        self._hold()

    @property
    def temperature(self) -> float:
        """The temperature of the current step."""
        share = min(self.steps_done / self.steps, 1.0) if self.steps else 1.0
        return self.start + (self.end - self.start) * _SCHEDULES[self.schedule](share)

    def _update(self) -> None:
        self._factor.fill_(1 / self.temperature)

    def _attach(self, attached: ExitStack) -> None:
        inside = {id(module) for block in self.blocks for module in block.module.modules()}
        for interface in interfaces_of(self.model):
            attached.callback(change_queries(interface, inside, lambda call: call.query * self._factor))
        for block in self.blocks:
            if _calls_torch(block.module):
                attached.callback(block.module.register_forward_pre_hook(self._block_begins).remove)
                attached.callback(block.module.register_forward_hook(self._block_ends, always_call=True).remove)

    # The function mode is entered around each block, after that of a monitor around the model. The mode that is entered
    # last gets a call first, so the monitor sees scaled queries.

    def _block_begins(self, module: nn.Module, args: tuple) -> None:
        if not any(module is block.module for block in self.blocks):  # a copy of the model has the hooks, too
            return
        mode = _ScalingMode(self._factor, self.temperature == 1)
        mode.__enter__()
        self._modes.append(mode)

    def _block_ends(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._modes and any(module is block.module for block in self.blocks):
            self._modes.pop().__exit__(None, None, None)

    def _words(self) -> str:
        blocks = ", ".join(map(str, self.layers))
        return (
            f"Attention temperature of blocks {blocks} from {self.start:g} to {self.end:g} in {self.steps} steps "
            f"({self.schedule})."
        )


attention_temperature = AttentionTemperature


# ---- torch -----------------------------------------------------------------------------------------------------------


class _ScalingMode(TorchFunctionMode):
    def __init__(self, factor: Tensor, is_one: bool):
        super().__init__()
        self._factor, self._is_one = factor, is_one

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if args:
                args = (args[0] * self._factor, *args[1:])
            else:
                kwargs["query"] = kwargs["query"] * self._factor
        elif func is F.multi_head_attention_forward and not self._is_one:  # a copied weight may be rounded differently
            args, kwargs = self._scaled_projection(list(args), kwargs)
        return func(*args, **kwargs)

    def _scaled_projection(self, args: list, kwargs: dict) -> tuple[list, dict]:
        """Scale the query weights: the first third of the joint projection, or a separate matrix."""
        width = args[0].shape[-1]
        places = {name: place for place, name in enumerate(_MULTI_HEAD_NAMES)}
        separate = kwargs.get("use_separate_proj_weight", False)
        for name in ("q_proj_weight" if separate else "in_proj_weight", "in_proj_bias"):
            place = places[name]
            given = args[place] if place < len(args) else kwargs[name]
            if given is None:
                continue
            whole = name == "q_proj_weight"
            scaled = given * self._factor if whole else torch.cat([given[:width] * self._factor, given[width:]])
            if place < len(args):
                args[place] = scaled
            else:
                kwargs[name] = scaled
        return args, kwargs


_MULTI_HEAD_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _calls_torch(block: nn.Module) -> bool:
    for module in block.modules():
        code = getattr(type(module).forward, "__code__", None)
        if isinstance(module, nn.MultiheadAttention):
            return True
        if code is not None and "scaled_dot_product_attention" in code.co_names:
            return True
    return False
