"""Checks of operator arguments. An error names the argument, what it is, and what is accepted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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
    found = tensor(value, name)
    if found.dtype not in FLOATS:
        raise TypeError(f"{name}: expected dtype {FLOAT_NAMES}, got {found.dtype}")
    return found


def no_tangent(operator: str, *values: Tensor | None, differentiable: bool = True) -> None:
    """Refuse tensors with a tangent of forward-mode differentiation: the result would have a tangent of 0."""
    for value in values:
        if value is not None and unpack_dual(value).tangent is not None:
            way = "use backward(), or pass x.detach()" if differentiable else "pass x.detach()"
            raise NotImplementedError(f"{operator}: forward-mode derivatives are not implemented; {way}")


def same_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Refuse operands on different devices."""
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, but {like_name} is on {like.device}")


def device_tensor(value: object, name: str, like: Tensor, like_name: str, dtype: torch.dtype | None = None) -> Tensor:
    """`value`, if it is a tensor on the device of `like`, and of `dtype` if one is given."""
    found = tensor(value, name)
    if dtype is not None and found.dtype != dtype:
        expected = "bool (True counts)" if dtype == torch.bool else dtype
        raise TypeError(f"{name}: expected dtype {expected}, got {found.dtype}")
    same_device(found, name, like, like_name)
    return found


def shape(value: Tensor, name: str, *accepted: Sequence[int | str]) -> None:
    """Refuse a tensor that has none of the `accepted` shapes; a string in a shape stands for any size."""
    for sizes in accepted:
        if len(sizes) == value.ndim and all(
            n == m or isinstance(n, str) for n, m in zip(sizes, value.shape, strict=True)
        ):
            return
    wanted = " or ".join(f"[{', '.join(map(str, sizes))}]" for sizes in accepted)
    raise ValueError(f"{name}: expected shape {wanted}, got {list(value.shape)}")


def broadcasts(mask: Tensor, name: str, sizes: Sequence[int], what: str) -> None:
    """Refuse a mask that does not broadcast to `sizes`, those of `what`."""
    sizes = list(sizes)
    aligned = [1] * (len(sizes) - mask.ndim) + list(mask.shape)
    if len(aligned) != len(sizes) or any(have not in (1, want) for have, want in zip(aligned, sizes, strict=True)):
        raise ValueError(f"{name}: shape {list(mask.shape)} does not broadcast to {what}, {sizes}")


def attn_mask(value: object, shape: Sequence[int], like: Tensor, like_name: str) -> Tensor | None:
    """`value`, if it is None or a mask that broadcasts to scores of `shape`, on the device of `like`."""
    if value is None:
        return None
    mask = tensor(value, "attn_mask")
    if mask.dtype not in (torch.bool, *FLOATS):
        raise TypeError(f"attn_mask: expected dtype bool (True attends), {FLOAT_NAMES} (added), got {mask.dtype}")
    same_device(mask, "attn_mask", like, like_name)
    broadcasts(mask, "attn_mask", shape, "the scores")
    return mask


def flag(value: object, name: str) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def finite(value: object, name: str) -> float:
    """`value` as a float, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # a comparison, which Dynamo traces for a number that changes between calls
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def positive(value: object, name: str) -> float:
    """`value` as a float, if it is a finite number above 0."""
    number = finite(value, name)
    if number <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return number


def attention_operand(value: object, name: str) -> Tensor:
    """`value`, if it is a tensor ``[B, H, T, D]`` in one of the dtypes that the kernels read."""
    found = float_tensor(value, name)
    if found.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions [batch, heads, length, head_dim], got {list(found.shape)}")
    return found


MAX_HEAD_DIM = 512  # kMaxHeadDim in csrc/kernels.h
MAX_KEYS = 2**31 - 256  # kMostKeys in csrc/kernels.h


def length(count: int, name: str, what: str) -> None:
    """Refuse more queries or keys than a 32-bit counter of the kernels holds."""
    if count > MAX_KEYS:
        raise ValueError(f"{name}: expected at most {MAX_KEYS} {what}, got {count}")


def query_key(query: object, key: object) -> tuple[Tensor, Tensor]:
    """Both, if they are ``[B, H, Q, D]`` and ``[B, Hkv, K, D]`` of one dtype and device, H a multiple of Hkv."""
    q, k = attention_operand(query, "query"), attention_operand(key, "key")
    if k.dtype != q.dtype:
        raise TypeError(f"key: dtype {k.dtype}, but query has {q.dtype}")
    same_device(k, "key", q, "query")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"key: batch size {k.shape[0]}, but query has {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"key: head dimension {k.shape[3]}, but query has {q.shape[3]}")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"query: head dimension must be in [1, {MAX_HEAD_DIM}], got {q.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"key: {k.shape[1]} heads do not divide the {q.shape[1]} heads of query")
    length(q.shape[2], "query", "queries")
    length(k.shape[2], "key", "keys")
    return q, k


def window(value: object) -> tuple[int, int]:
    """(left, right) with -1 for no bound, if `value` is None or a pair of ints >= -1 or None."""
    if value is None:
        return -1, -1
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"window: expected a pair (left, right), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {len(value)} numbers")
    bounds = [-1 if bound is None else bound for bound in value]
    for bound in bounds:
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise TypeError(f"window: expected ints or None, got {type(bound).__name__}")
        if bound < -1:
            raise ValueError(f"window: expected bounds >= 0, or -1 or None for none, got {bound}")
    return min(bounds[0], 2**62), min(bounds[1], 2**62)  # positions and bounds are added as 64-bit integers


def sinks(value: object, query: Tensor) -> Tensor:
    """`value` as contiguous float32, if it is one float per head of `query`."""
    found = float_tensor(value, "sinks")
    if found.shape != query.shape[1:2]:
        raise ValueError(f"sinks: expected one per head, [{query.shape[1]}], got {list(found.shape)}")
    same_device(found, "sinks", query, "query")
    return found.float().contiguous()


def rows(value: object, queries: int, query: Tensor) -> Tensor:
    """`value`, if it is a vector of positions in [0, queries). Values are read on the CPU only, not while compiling."""
    found = device_tensor(value, "rows", query, "query", torch.int64)
    shape(found, "rows", "R")
    if found.is_cpu and found.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in found.aminmax())
        if low < 0 or high >= queries:
            raise ValueError(f"rows: expected positions in [0, {queries}), got {low if low < 0 else high}")
    return found


def packed_lengths(query: Tensor, key: Tensor, length: int) -> None:
    """Refuse packed sequences unless there are `length` queries and as many keys."""
    queries, keys = query.shape[2], key.shape[2]
    if queries != keys:
        raise ValueError(f"cu_seqlens: needs as many queries as keys, got {queries} queries and {keys} keys")
    if queries != length:
        raise ValueError(f"cu_seqlens: made for {length} queries and keys, got {queries}")


def cu_seqlens(value: object, length: int) -> Tensor:
    """`value`, if it holds cumulative lengths of sequences packed into `length` positions. Read as `rows` are."""
    found = tensor(value, "cu_seqlens")
    if found.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype torch.int32 or torch.int64, got {found.dtype}")
    if found.ndim != 1 or found.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected one dimension of at least 2 numbers, got shape {list(found.shape)}")
    if found.is_cpu and not torch.compiler.is_compiling():
        first, last = int(found[0]), int(found[-1])
        if first < 0 or last > length or bool((found[1:] < found[:-1]).any()):
            raise ValueError(f"cu_seqlens: expected numbers in [0, {length}] that never fall, got {found}")
    return found


def integer(value: object, name: str, low: int, high: int | None = None) -> int:
    """`value`, if it is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {f'at least {low}' if high is None else f'{low} to {high}'}, got {value}")
    return value


def features(value: object, name: str) -> Tensor:
    """`value`, if it is features ``[..., N, D]`` in one of the dtypes that the kernels read."""
    found = float_tensor(value, name)
    if found.ndim < 2:
        raise ValueError(f"{name}: expected features [..., N, D], got shape {list(found.shape)}")
    if found.shape[-1] == 0:
        raise ValueError(f"{name}: expected features of at least one dimension, got shape {list(found.shape)}")
    return found


def same_dtype(y: Tensor, name: str, x: Tensor, x_name: str) -> None:
    """Refuse two sets of features of different dtypes."""
    if x.dtype != y.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype} as {x_name} has, got {y.dtype}")


def paired_features(first: object, second: object, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Both, if they are features ``[..., N, D]`` and ``[..., N, D2]`` of one dtype on one device."""
    x, y = features(first, names[0]), features(second, names[1])
    same_dtype(y, names[1], x, names[0])
    same_device(y, names[1], x, names[0])
    shape(y, names[1], (*x.shape[:-1], "D"))
    return x, y


def sequences(value: object, like: Tensor) -> Tensor:
    """`value`, if it is a vector [N] with the number of the sequence of each row of `like` [..., N, D]."""
    found = device_tensor(value, "sequences", like, "x", torch.int64)
    shape(found, "sequences", like.shape[-2:-1])
    return found


def memory_bytes(device: torch.device) -> int:
    """Total memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(need: int, device: torch.device, what: str) -> None:
    """Refuse an allocation of more bytes than the device has. `what` begins with the name of the argument."""
    have = memory_bytes(device)
    if need > have:
        raise ValueError(f"{what} take {need} bytes, {device} has {have}")
