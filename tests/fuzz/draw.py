"""Random tensors that are awkward on purpose: odd sizes, any strides, sizes from 1e-30 to 1e30, planted NaN."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POISON = (math.nan, math.inf, -math.inf)
EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129)
LARGE = (130, 200, 255, 256, 257, 384, 511, 512, 513, 700, 1024, 1100)


class Draw:
    """Random choices from one seed: the same seed gives the same case, on any machine.

    `most`: no dimension is larger.
    """

    def __init__(self, seed: int, most: int = LARGE[-1]):
        self.most = most
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one(self, choices: Sequence):
        return self.random.choice(choices)

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def size(self, most: int = 129, empty: float = 0.02) -> int:
        """A dimension: small or at an edge of a vector or a tile, seldom 0, now and then large if `most` allows it."""
        if self.chance(empty):
            return 0
        most = min(most, self.most)
        edges = [edge for edge in (EDGES + LARGE if self.chance(0.03) else EDGES) if edge <= most]
        return self.one(edges) if self.chance(0.6) else self.whole(1, min(most, 24))

    def magnitude(self, low: float = -30.0, high: float = 30.0) -> float:
        """A positive number between 10^low and 10^high, mostly an ordinary one, often a power of two."""
        if self.chance(0.4):
            return self.one((0.05, 0.5, 1.0, 1.5, 5.0))
        value = 10.0 ** self.random.uniform(low, high)
        return 2.0 ** round(math.log2(value)) if self.chance(0.5) else value

    def number(self, low: float = -30.0, high: float = 30.0) -> float:
        """`magnitude` with either sign, now and then 0."""
        return 0.0 if self.chance(0.02) else self.magnitude(low, high) * self.one((1.0, 1.0, 1.0, -1.0))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def values(self, shape: Sequence[int], dtype: torch.dtype, scale: float, poison: bool = False) -> Tensor:
        """Numbers of about this size, within the dtype: normal, few different ones, all equal, or with outliers."""
        kind = self.one(("normal", "normal", "normal", "few", "equal", "outliers", "offset", "zeros"))
        x = self.normal(*shape).double()
        if kind == "few":
            x = x.round()
        elif kind == "equal":
            x = torch.ones_like(x) * self.one((1.0, -1.0, 1 / 3))
        elif kind == "outliers":
            x = x * torch.where(self.uniform(*shape) < 0.05, self.one((10.0, 1e3, 1e6)), 1.0)
        elif kind == "offset":
            x = x + self.one((1.0, 100.0, -1000.0))
        elif kind == "zeros":
            x = torch.where(self.uniform(*shape) < 0.5, 0.0, x)
        largest = torch.finfo(dtype).max
        x = (x * scale).clamp(-largest, largest).to(dtype)
        if poison and x.numel():
            places = self.uniform(*shape) < self.one((0.5 / x.numel(), 0.02, 0.3))
            x = torch.where(places, torch.tensor(self.one((*POISON, -largest, largest, -0.0)), dtype=dtype), x)
        return x

    def strided(self, x: Tensor) -> Tensor:
        """The same numbers in other memory: dimensions in another order, gaps, an offset, what repeats stored once."""
        kind = self.one(("as it is", "order", "order", "gaps", "offset", "far"))
        if kind == "as it is" or x.ndim == 0:
            return x
        if kind == "order":
            order = self.random.sample(range(x.ndim), x.ndim)
            back = sorted(range(x.ndim), key=order.__getitem__)
            return x.permute(order).contiguous().permute(back)
        if kind == "offset":
            flat = torch.full((x.numel() + 5,), math.nan).to(x.dtype)
            flat[3 : 3 + x.numel()] = x.flatten()
            return flat[3 : 3 + x.numel()].view(x.shape)
        few = x.dtype.itemsize <= 2 and 2 <= x.shape[0] <= 3 and self.most == LARGE[-1]
        if kind == "far" and self.chance(0.02) and few:
            # Untouched pages take no memory: offsets beyond 2^31 elements of rows that are few.
            step = 2**30 + 8 * self.whole(0, 1000)
            room = torch.empty(step * x.shape[0], dtype=x.dtype)
            stride = [step, *torch.empty(x.shape[1:]).stride()]
            out = room.as_strided(x.shape, stride)
            out.copy_(x)
            return out
        steps = [self.one((1, 1, 2, 3)) for _ in x.shape]
        room = torch.full([n * step for n, step in zip(x.shape, steps, strict=True)], math.nan).to(x.dtype)
        out = room[tuple(slice(None, None, step) for step in steps)]
        out.copy_(x)
        return out

    def expanded(self, shape: Sequence[int], make) -> Tensor:
        """What `make(shape)` gives, now and then for fewer places and expanded with strides of 0."""
        if not self.chance(0.1):
            return self.strided(make(list(shape)))
        small = [1 if n and self.chance(0.4) else n for n in shape]
        return make(small).expand(list(shape))

    def mask(self, shape: Sequence[int], poison: bool) -> Tensor | None:
        """None, or a mask that broadcasts to `shape`: bool, or added, in any dtype, with rows that hide everything."""
        if self.chance(0.4):
            return None
        own = [1 if self.chance(0.2) else n for n in shape]
        own = own[self.whole(0, len(own) - 1) if self.chance(0.3) else 0 :]
        hidden = self.uniform(*own) < self.one((0.0, 0.1, 0.5, 0.9, 1.0))
        if own and self.chance(0.2):
            hidden = hidden | (self.uniform(*own[:-1], 1) < 0.3)
        if self.chance(0.4):
            return self.strided(~hidden)
        dtype = self.one(DTYPES)
        lowest = torch.finfo(dtype).min
        added = self.values(own, dtype, self.magnitude(-10, 4), poison)
        hides = torch.tensor(self.one((-math.inf, lowest, lowest / 2)), dtype=dtype)
        return self.strided(torch.where(hidden, hides, added))


def widened(x: Tensor | None) -> Tensor | None:
    """In float64, with what means -inf in the dtype of `x` set to it; a bool mask stays."""
    if x is None or not x.is_floating_point():
        return x
    return x.double().masked_fill(x <= torch.finfo(x.dtype).min / 2, -math.inf)
