"""Random features, gradients and activations: CKA, sums of squares and moments against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inflection_fast import CkaState, activation_moments, cka_jackknife, cka_matrix, linear_cka, sum_of_squares
from inflection_fast.ops import MOMENT_SUMS, reference

from .attention import wrong
from .draw import DTYPES, Draw

ERROR = 1e-6
EMULATED_16BIT = 1e-4  # CUDA multiplies 16-bit rows on tensor cores, which cut their sums off


def same_or_near(name: str, got: Tensor, exact: Tensor, limit: Tensor) -> None:
    """Equal, both NaN, or within the limit."""
    same = (got.isnan() & exact.isnan()) | (got == exact) | ((got - exact).abs() <= limit)
    wrong(name, ~same, got, exact, limit)


def squares(draw: Draw) -> None:
    """`sum_of_squares`: in float64, so as exact as that."""
    poison, tensors, groups = draw.chance(0.2), [], []
    for _ in range(draw.whole(1, 8)):
        shape = [draw.size(130 if place == 0 else 9) for place in range(draw.whole(0, 3))]
        dtype, size = draw.one(DTYPES), draw.magnitude()
        tensors.append(draw.expanded(shape, lambda own, d=dtype, s=size: draw.values(own, d, s, poison)))
        groups.append(draw.whole(0, 4))
    inv_scale = torch.tensor(draw.magnitude(-15, 15)) if draw.chance(0.3) else None
    got = sum_of_squares(tensors, groups, inv_scale=inv_scale)
    exact = reference.sum_of_squares(tensors, groups, inv_scale=inv_scale)
    same_or_near("sum of squares", got, exact, 1e-12 * exact.abs())


def moments(draw: Draw) -> None:
    """`activation_moments`: each sum within 1e-10 of the sum of sizes."""
    poison = draw.chance(0.1)
    shape = [draw.size(4, 0.01) for _ in range(draw.whole(0, 2))] + [draw.size(300)]
    dtype, other = draw.one(DTYPES), draw.one(DTYPES)
    size = draw.magnitude()
    y = draw.expanded(shape, lambda own: draw.values(own, dtype, size, poison))
    x = None
    if draw.chance(0.6):
        x = draw.expanded(shape, lambda own: draw.values(own, other, draw.one((size, 1.0)), poison))
    mask = draw.uniform(*shape[:-1]) < 0.7 if draw.chance(0.4) else None
    got, largest = activation_moments(y, x, mask=mask)
    exact, most = reference.activation_moments(y, x, mask=mask)
    rows = y.double().abs()[torch.ones(shape[:-1], dtype=torch.bool) if mask is None else mask.expand(shape[:-1])]
    sizes = exact.abs().nan_to_num(0.0, 0.0, 0.0)
    for power, name in enumerate(("first", "second", "third", "fourth"), 1):
        sizes[MOMENT_SUMS.index(name)] = rows.pow(power).nan_to_num(0.0, 0.0, 0.0).sum()
    limit = 1e-10 * sizes + 1e-300
    limit[MOMENT_SUMS.index("cosine")] += 1e-9 * len(rows)
    same_or_near("moments", got, exact, limit)
    if not exact.isnan().any():
        same_or_near("largest", largest, most, most * 0)


def features(draw: Draw, rows: int, dim: int, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """Rows ``[N, D]`` in float32's or the dtype's range: an offset, another size, some long rows, parts of `like`."""
    x = draw.normal(rows, dim) * torch.linspace(2.0, 0.1, dim)
    if like is not None and draw.chance(0.7):
        shared = min(dim, like.shape[1])
        x[:, :shared] += draw.one((0.3, 1.0, 10.0)) * like[:, :shared].float()
    if draw.chance(0.1) and rows > 8:
        x[:: draw.whole(4, 9)] *= draw.one((10.0, 100.0))
    if draw.chance(0.3):
        x = x + draw.one((1.0, 30.0, 1000.0 if dtype == torch.float32 else 10.0)) * draw.normal(dim)
    size = draw.magnitude(-20, 15) if dtype != torch.float16 else draw.one((0.01, 1.0, 10.0))
    return (x.double() * size).clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else (x.double() * size).to(dtype)


def conditioned(x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, float]:
    """CKA in float64, and by how much debiasing magnifies errors of the sums that it subtracts; inf: no value."""
    sides = []
    for side in (x.double(), y.double()):
        side = side - side.mean(0)
        sides.append(side / side.abs().max().clamp(min=1e-300))
    exact = reference.linear_cka(*sides, debiased=debiased)
    worst = 1.0
    for side in sides:
        gram = side @ side.mT
        whole = float(gram.square().sum())
        own = float(
            reference.hsic(
                gram - torch.diag(gram.diagonal()) if debiased else gram,
                0 + (gram - torch.diag(gram.diagonal()) if debiased else gram),
                debiased,
            )
        )
        worst = max(worst, whole / own if own > 0 else math.inf)
    return exact, worst


def cka_pair(draw: Draw) -> tuple[Tensor, Tensor, bool]:
    debiased, dtype = draw.chance(0.6), draw.one(DTYPES)
    rows = max(draw.size(1100, 0), 4 if debiased else 2)
    x = features(draw, rows, draw.size(129, 0), dtype)
    return x, features(draw, rows, draw.size(129, 0), dtype, x), debiased


def cka(draw: Draw) -> None:
    """`linear_cka`, and a `CkaState` of the same rows in pieces of any size, merged in any order."""
    x, y, debiased = cka_pair(draw)
    exact, worst = conditioned(x, y, debiased)
    limit = (ERROR if x.dtype == torch.float32 or not Emulated.on else EMULATED_16BIT) * max(1.0, worst)
    known = worst < 1e3
    got = linear_cka(draw.strided(x), draw.strided(y), debiased=debiased)
    if known:
        same_or_near("linear_cka", got, exact, torch.tensor(limit))
    states = [CkaState(1, x.shape[1], y.shape[1]) for _ in range(draw.whole(1, 3))]
    place = 0
    while place < len(x):
        many = min(draw.one((1, 2, 7, 64, 256, 300)), len(x) - place)
        part = slice(place, place + many)
        draw.one(states).update(draw.strided(x[None, part]), draw.strided(y[None, part]))
        place += many
    for other in states[1:]:
        states[0].merge_state(other)
    streamed = states[0].compute(debiased=debiased)
    # A first batch of a few rows may set a shift far from the mean, which costs digits of an offset.
    if known:
        same_or_near("CkaState", streamed, exact[None], torch.tensor(4 * limit))


def matrix(draw: Draw) -> None:
    """`cka_matrix` in all ways against pairs, and minibatches against their definition."""
    dtype, layers = draw.one(DTYPES), draw.whole(1, 4)
    rows, tile = max(draw.size(700, 0), 4), draw.one((4, 16, 50, 64, 256))
    debiased = draw.chance(0.6)
    base = features(draw, rows, draw.size(65, 0), dtype)
    x = torch.stack([features(draw, rows, base.shape[1], dtype, base) for _ in range(layers)])
    limit = ERROR if dtype == torch.float32 or not Emulated.on else EMULATED_16BIT
    got = cka_matrix(draw.strided(x), tile=tile, debiased=debiased)
    for i in range(layers):
        for j in range(layers):
            exact, worst = conditioned(x[i], x[j], debiased)
            if worst < 1e3:
                same_or_near(f"cka_matrix {i}, {j}", got[i, j], exact, torch.tensor(2 * limit * max(1.0, worst)))


def jackknife(draw: Draw) -> None:
    """`cka_jackknife` against leaving out each sequence."""
    x, y, debiased = cka_pair(draw)
    count = draw.whole(2, 6)
    ids = torch.randint(count, (len(x),), generator=draw.generator)
    got = cka_jackknife(x, y, ids, debiased=debiased)
    exact, worst = conditioned(x, y, debiased)
    limit = (ERROR if x.dtype == torch.float32 or not Emulated.on else EMULATED_16BIT) * max(1.0, worst)
    if worst > 1e2:
        return
    same_or_near("value", got.value[0], exact, torch.tensor(limit))
    left = [ids != number for number in ids.unique()]
    if len(left) < 2 or min(int(rows.sum()) for rows in left) < 8:
        return
    # Without a sequence that holds nearly all variance, what is left is a small difference of float32 products.
    sizes = [(side.double() - side.double().mean(0)).square().sum(1) for side in (x, y)]
    if any(size.sum() > 3 * size[rows].sum() for size in sizes for rows in left):
        return
    values = [conditioned(x[rows], y[rows], debiased) for rows in left]
    if max(condition for _, condition in values) > 1e2:
        return
    without = torch.stack([value for value, _ in values])
    error = (without.var(unbiased=False) * (len(left) - 1)).sqrt()
    slack = 100 * limit * len(left) ** 0.5
    same_or_near("standard error", got.standard_error[0], error, slack + 1e-3 * error)


class Emulated:
    """Whether CUDA kernels run in place of the CPU's."""

    on = False
