"""The checks of operator arguments, each written once: what came, and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"


def tensor(value: object, name: str) -> Tensor:
    """`value`, if it is a strided tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")
    return value


def float_tensor(value: object, name: str) -> Tensor:
    """`value`, if it is a tensor in one of the dtypes that the kernels read."""
    if tensor(value, name).dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype {FLOAT_NAMES}, got {value.dtype}")
    return value


def same_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Refuse operands that lie on different devices."""
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, but {like_name} is on {like.device}")
