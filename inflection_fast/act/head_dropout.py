"""Head dropout: whole attention heads are left out at random while a model trains (DropHead, arXiv 2004.13342).

The output of a chosen head is zero with probability p and divided by 1 - p otherwise, anew for every sequence, before
the heads are joined by the output projection. So neighbours of a collapsed head cannot rely on it, and it has to carry
something of its own. In evaluation nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..decide import Plan
from .handle import Handle
from .heads import heads_by_layer, output_projection

__all__ = ["HeadDropout", "head_dropout"]


class HeadDropout(Handle):
    """Heads that are left out at random."""

    name = "head dropout"

    def __init__(
        self,
        model: nn.Module,
        where: Plan | Sequence[int] | int | None,
        p: float,
        heads: Sequence[int] | Mapping[int, Sequence[int]] | None,
    ):
        if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p < 1:
            raise ValueError(f"p: expected a number in [0, 1), got {p!r}")
        super().__init__(model, where)
        self.p, self.heads = float(p), heads_by_layer(self.blocks, where, heads)
        found = [(block, *output_projection(block)) for block in self.blocks]
        self._attached = ExitStack()
        for block, output, count in found:
            chosen = self.heads[block.index]
            drops = torch.zeros(count)
            drops[list(range(count)) if chosen is None else chosen] = self.p
            hook = _Dropping(drops.to(next(output.parameters()).device))
            self._attached.callback(output.register_forward_pre_hook(hook).remove)
        self._hold()

    def _settings(self) -> dict:
        return {"p": self.p, "heads": {str(layer): some for layer, some in self.heads.items() if some is not None}}

    def _words(self) -> str:
        return f"Heads of blocks {', '.join(map(str, self.layers))} are left out with probability {self.p:g}."

    def _remove(self) -> None:
        self._attached.close()


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


def head_dropout(
    model: nn.Module,
    layers: Plan | Sequence[int] | int | None = None,
    *,
    p: float = 0.1,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
) -> HeadDropout:
    """Leave attention heads of blocks out with probability `p` while the model trains, until `remove()`.

    Draws come from torch's generator, as those of `nn.Dropout` do. Apply before compiling.

    Args:
        layers: a plan or indices of blocks; None: all. The heads of a plan ("collapsed") are taken over.
        heads: indices for all of these blocks, or by block; None: all.

    Raises:
        ValueError: p outside [0, 1), a head or block that does not exist, an output projection that cannot be told or
            is not called as a module, or a second dropout on the same blocks.
    """
    return HeadDropout(model, layers, p, heads)
