"""DTensors: this rank's part of a tensor, the whole of it, and into how many parts it is sharded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor, Placement

__all__ = ["full_of", "is_dtensor", "is_shard", "local_of", "sharded_over"]


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether an object is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # imported if a DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor. A pending sum over ranks is carried out first, by a collective call."""
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        from torch.distributed.tensor import Replicate

        settled = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=settled)
    return tensor.to_local()


def full_of(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective call if ranks hold parts of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def sharded_over(tensor: Tensor) -> int:
    """The number of different parts that ranks hold of a tensor; 1 if it is not sharded."""
    parts = 1
    if is_dtensor(tensor):
        for dim, placement in enumerate(tensor.placements):
            parts *= tensor.device_mesh.size(dim) if is_shard(placement) else 1
    return parts


def is_shard(placement: Placement) -> bool:
    """Whether a placement shards, strided shards included."""
    return not placement.is_replicate() and not placement.is_partial()
