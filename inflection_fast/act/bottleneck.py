"""Bottleneck adapters (Houlsby et al. 2019): a small residual network after the output of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import find_blocks

__all__ = ["bottleneck"]


class _Bottleneck(nn.Module):
    """x + up(gelu(down(x))), initialised so that the model is unchanged."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def bottleneck(model: nn.Module, layers: Sequence[int], width: int) -> nn.Module:
    """`model` with a bottleneck adapter of `width` after each of `layers`; all else is frozen except the head.

    peft has no such adapters. They are children of their blocks, so they are saved with the model. `ValueError` if a
    block does not exist, or its output is not a tensor of hidden states.
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    blocks = find_blocks(model)
    if not layers or not set(layers) <= set(range(len(blocks))):
        raise ValueError(f"layers: expected some of 0 to {len(blocks) - 1}, got {list(layers)}")
    hidden = getattr(model.config, "hidden_size", None)
    if hidden is None:
        raise ValueError("model: its configuration has no hidden_size")
    backbone = getattr(model, "base_model_prefix", "")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(f"{backbone}."))
    for layer in layers:
        blocks[layer].module.add_module("bottleneck", _Bottleneck(hidden, width))
        blocks[layer].module.register_forward_hook(_adapt_output)
    return model


def _adapt_output(block: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return block.bottleneck(output)
    if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
        return (block.bottleneck(output[0]), *output[1:])
    raise ValueError(f"model: the output of a block is {type(output).__name__}, not a tensor of hidden states")
