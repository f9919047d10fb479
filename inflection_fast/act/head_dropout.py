"""Head dropout: whole attention heads are dropped at random while a model trains (DropHead, arXiv 2004.13342).

The output of a chosen head is zero with probability p and divided by 1 - p otherwise, drawn for every sequence, before
the output projection. Other heads then cannot rely on this head, and it has to contribute itself. In evaluation no head
is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .handle import Handle, check_number
from .heads import Heads, as_setting, heads_by_layer, output_projection
from .planned import Layers

__all__ = ["HeadDropout", "head_dropout"]


class HeadDropout(Handle):
    """Drop attention heads of blocks with probability `p` while the model trains, until `remove()`.

    Draws come from torch's generator, as those of `nn.Dropout`. Apply before compiling.

    Args:
        layers: a plan or indices of blocks; None: all. With a plan of heads ("collapsed"), only its heads.
        heads: indices for all of these blocks, or by block; None: all.

    Raises:
        ValueError: p outside [0, 1), a head or block that does not exist, an output projection that is not found or not
            called as a module, or a second dropout on the same blocks.
    """

    name = "head dropout"

    def __init__(self, model: nn.Module, layers: Layers = None, *, p: float = 0.1, heads: Heads = None):
        check_number("p", p, "in [0, 1)")
        super().__init__(model, layers)
        self.p, self.heads = float(p), heads_by_layer(self.blocks, layers, heads)
        found = [(block, *output_projection(block)) for block in self.blocks]
        for block, output, count in found:
            chosen = self.heads[block.index]
            drops = torch.zeros(count)
            drops[list(range(count)) if chosen is None else chosen] = self.p
            hook = _Dropping(drops.to(next(output.parameters()).device))
            self._attached.callback(output.register_forward_pre_hook(hook).remove)
        self._hold()

    def _settings(self) -> dict:
        return {"p": self.p, "heads": as_setting(self.heads)}

    def _words(self) -> str:
        return f"Heads of blocks {', '.join(map(str, self.layers))} are dropped with probability {self.p:g}."


class _Dropping:
    def __init__(self, drops: Tensor):
        self.drops = drops  # [H] probabilities

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if not module.training:
            return None
        joined, *rest = args
        heads = len(self.drops)
        draws = torch.rand((len(joined), *[1] * (joined.dim() - 2), heads), device=joined.device)
        kept = ((draws >= self.drops) / (1 - self.drops)).to(joined.dtype)
        return ((joined.unflatten(-1, (heads, -1)) * kept[..., None]).flatten(-2), *rest)


head_dropout = HeadDropout
