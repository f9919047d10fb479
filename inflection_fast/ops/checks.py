"""The checks of operator arguments, each written once: what came, and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def device_tensor(value: object, name: str, like: Tensor, like_name: str) -> Tensor:
    """`value`, if it is a tensor on the device of `like`."""
    same_device(tensor(value, name), name, like, like_name)
    return value


def attn_mask(value: object, shape: Sequence[int], like: Tensor, like_name: str) -> Tensor | None:
    """`value`, if it is None or a mask that broadcasts to the scores, of `shape`, on the device of `like`."""
    if value is None:
        return None
    if tensor(value, "attn_mask").dtype not in (torch.bool, *FLOATS):
        raise TypeError(f"attn_mask: expected dtype bool (True attends), {FLOAT_NAMES} (added), got {value.dtype}")
    same_device(value, "attn_mask", like, like_name)
    tail = shape[len(shape) - value.ndim :] if value.ndim <= len(shape) else ()
    if value.ndim > len(shape) or any(have not in (1, want) for have, want in zip(value.shape, tail, strict=True)):
        raise ValueError(f"attn_mask: shape {list(value.shape)} does not broadcast to the scores' {list(shape)}")
    return value


def flag(value: object, name: str) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def finite(value: object, name: str) -> float:
    """`value` as a float, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)
