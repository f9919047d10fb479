"""Context parallelism: each rank holds a part of every sequence, and its queries attend to the keys of all ranks.

An attention call has this rank's queries and keys. For the statistics of its rows the keys of the other ranks are
broadcast one rank after the other, so no rank holds all keys. The statistics of the parts are merged by log-sum-exp:
with part j of the keys, of log-sum-exp l_j and entropy H_j, and w_j = exp(l_j - log sum_i exp(l_i)),

    H = sum_j w_j H_j + H(w),   collision = sum_j w_j^2 collision_j.

Otherwise, ranks that share a sequence are measured like ranks with batches of their own: their rows add up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from ..ops import AttentionStats
from .attention_call import AttentionCall, stats_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Context", "merged", "refuse_context"]

_TORCHS = "torch.distributed.tensor.experimental._context_parallel._attention"


def _in_force() -> bool:
    """Whether torch's `context_parallel` has replaced SDPA, whose queries then attend to keys of other ranks."""
    module = sys.modules.get(_TORCHS)
    return module is not None and F.scaled_dot_product_attention in module._replaced_functions


def refuse_context() -> None:
    """`ValueError` if ranks share sequences and the monitor has no `context`."""
    if _in_force():
        raise ValueError(
            "attention runs under torch's context_parallel, whose queries attend to keys of other ranks; give its mesh "
            "to the monitor: Monitor(model, context=mesh)"
        )


class Context:
    """The ranks that share each sequence of a batch.

    Args:
        mesh: a mesh of one dimension, or a process group.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has several dimensions.
    """

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup):
        if hasattr(mesh, "get_group") and hasattr(mesh, "ndim"):
            if mesh.ndim != 1:
                raise ValueError(f"context: expected a mesh of one dimension, got {mesh.ndim}; give mesh['cp']")
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(f"context: expected a DeviceMesh or a process group, got {type(mesh).__name__}")
        self._group = mesh
        self.ranks = tuple(dist.get_process_group_ranks(mesh))
        self._here = self.ranks.index(dist.get_rank())

    def stats_of(self, call: AttentionCall, rows: Tensor | None) -> AttentionStats:
        """As `attention_call.stats_of`, of this rank's rows and the keys of all ranks. A collective call.

        Raises:
            ValueError: the call has a mask, a bias, packed sequences, sinks or functions of FlexAttention.
        """
        queries, keys = call.query.shape[2], call.key.shape[2]
        if keys == len(self.ranks) * queries:
            return stats_of(call, rows)  # the model has gathered the keys
        unsupported = (call.mask, call.bias, call.logits, call.cu_seqlens, call.mask_mod, call.score_mod, call.sinks)
        if any(one is not None for one in unsupported) or keys != queries:
            raise ValueError(
                "attention under context parallelism is measured with the keys of a rank's own positions, and without "
                f"masks, biases, sinks or packing; got {queries} queries and {keys} keys with a mask or the like"
            )
        parts = []
        for j, rank in enumerate(self.ranks):
            key = call.key.detach().contiguous()  # the layout for the broadcast
            key = key if j == self._here else torch.empty_like(key)
            dist.broadcast(key, rank, group=self._group)
            mask = self._mask(call, rows, j)
            query = call.query.detach() if rows is None else call.query.detach().index_select(2, rows)
            part = replace(call, query=query, key=key, mask=mask, is_causal=False, window=None)
            parts.append(stats_of(part, None))
        return merged(parts)

    def _mask(self, call: AttentionCall, rows: Tensor | None, other: int) -> Tensor | None:
        """[R, T] bool: the keys of a rank that the rows may attend to, by positions in the whole sequence."""
        if not call.is_causal and call.window is None:
            return None
        of_keys = self._positions(other, call.key)
        of_rows = self._positions(self._here, call.key)
        of_rows = of_rows if rows is None else of_rows.index_select(0, rows)
        ahead = of_keys - of_rows[:, None]
        whole = len(self.ranks) * len(of_keys)
        left, right = call.window or (whole, whole)
        return (ahead >= -left) & (ahead <= (0 if call.is_causal else right))

    def _positions(self, rank: int, key: Tensor) -> Tensor:
        """[T]: positions of a rank's tokens in the whole sequence. For load balance torch gives a rank two chunks."""
        length, count = key.shape[2], len(self.ranks)
        if not (_in_force() and sys.modules[_TORCHS]._cp_options.enable_load_balance):
            return torch.arange(rank * length, (rank + 1) * length, device=key.device)
        half = length // 2
        chunks = [torch.arange(i * half, (i + 1) * half, device=key.device) for i in (rank, 2 * count - 1 - rank)]
        return torch.cat(chunks)


def merged(parts: Sequence[AttentionStats]) -> AttentionStats:
    """Statistics of rows from those of parts of their keys; the first part holds key 0."""
    entropy, lse, max_logit, keys, collision, _ = (torch.stack(field) for field in zip(*parts, strict=True))
    whole = torch.logsumexp(lse, 0)
    # Without the rounding of `whole`, which is large where scores are; of a row without any key it would be NaN.
    weight = lse.softmax(0).masked_fill(whole == -torch.inf, 0.0)
    return AttentionStats(
        entropy=(weight * entropy).sum(0) - torch.special.xlogy(weight, weight).sum(0),
        lse=whole,
        max_logit=max_logit.amax(0),
        keys=keys.sum(0),
        collision=(weight.square() * collision).sum(0),
        sink=weight[0] * parts[0].sink,
    )
