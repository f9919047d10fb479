"""Arrays as text inside a page: rounded to four digits, compressed, base64."""

from __future__ import annotations

import base64
import zlib

import numpy as np

__all__ = ["DIGITS", "pack", "pack_text"]

DIGITS = 4  # that a packed number keeps: the last one may be off by one
_KEPT_BITS = 13  # of the 23 of a float32's fraction: a relative error of at most 2**-14
_LEVEL = 6


def pack(values: np.ndarray) -> bytes:
    """zlib of `values` as float32 in C order, in byte planes: the lowest bytes of all numbers first, the highest last.

    Rounded numbers end in zero bits, and bytes of sign and exponent repeat, so the planes compress well. NaN and
    infinities are kept.
    """
    numbers = np.ascontiguousarray(values, np.float32)
    bits = numbers.view(np.uint32).reshape(-1)
    dropped = np.uint32(23 - _KEPT_BITS)
    half = np.uint32((1 << int(dropped)) >> 1)
    rounded = (bits + half) >> dropped << dropped
    bits = np.where(np.isfinite(numbers.reshape(-1)), rounded, bits)
    planes = bits.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes.tobytes(), _LEVEL)


def pack_text(values: np.ndarray) -> str:
    """`pack` in base64."""
    return base64.b64encode(pack(values)).decode("ascii")
