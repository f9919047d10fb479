"""CKA of all pairs of layers, of one model or of two, in tiles of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .gram import MIN_ROWS, RUN, SHIFT_ROWS, GramBuffer, cka_ratio, inner_products, pop_diagonal, scale_factors, slices

__all__ = ["cka_matrix"]

METHODS = ("exact", "banded", "minibatch")
# Relative error of a float32 mean, at most: 100 units in the last place cover blockwise sums of any number of rows.
MEAN_ROUNDING = 2**-16
LONG = 8.0  # a row is long if |u|^2 is more than this times the mean of its batch, as cka_long of csrc/core/cka.h
BLOCK_TILES = 4  # tiles of rows that are kept while later tiles are multiplied with them


def cka_matrix(
    x: Tensor,
    y: Tensor | None = None,
    *,
    debiased: bool = True,
    method: str = "exact",
    tile: int = 256,
    band: int = 1,
    seed: int = 0,
) -> Tensor:
    """Linear CKA of all pairs of layers whose rows are the same N samples.

    Equivalent to: ``linear_cka(x[:, None], y[None], debiased=debiased)``. The Gram matrix over rows of each layer is
    computed once for all pairs, in tiles, which takes ``N^2 (D L + L^2) / 2`` multiplications. That is less than the
    ``N D^2 L (L + 1) / 2`` of the pairs while N < (L + 1) D. Additional memory: ``20 tile L D + 16 tile^2 L + 8 N L``
    bytes (L layers of both models), 60 MB for 12 layers of width 768. Rows are centred in float32 in each tile, so an
    offset costs no digits. Not differentiable.

    `method` trades accuracy for time:

    * "exact": all pairs of rows.
    * "banded": the rows are put into a random order, and only products of tiles at most `band` apart (cyclically) are
      computed and scaled up to all pairs. Centring and debiasing stay exact. Unbiased over orders for any rows, also
      tokens of few texts. Cost: a share of ``(2 band + 1) tile / N``.
    * "minibatch": HSIC_1 of consecutive batches of `tile` rows, added up (Nguyen et al. 2021), as streaming packages
      compute it. For independent rows only; if the rows of a batch come from few texts the result is another number.
      Cost: ``N tile (D L + L^2) / 2`` multiplications. Additional memory on the CPU: ``2 tile (tile + 52)`` bytes per
      layer of the batches in work (16 layers per thread, or up to 2 MiB), ``516 tile`` bytes per thread, ``24 N L``.

    Args:
        x: ``[L, N, D]``, float32, bfloat16 or float16, any strides.
        y: ``[L2, N, D2]``, features of another model, dtype and device of `x`. None: `x` with itself.
        debiased: as for `linear_cka`; must be True for "minibatch".
        method: see above.
        tile: number of rows of a tile or of a minibatch, at least 4.
        band: for "banded": number of neighbours on either side, at least 0.
        seed: for "banded": seed of the order of the rows.

    Returns:
        float32 ``[L, L2]``. NaN in rows and columns of layers that are constant, whose self term is not above 0, or
        that have NaN or infinite features. The diagonal of a model with itself is 1, up to rounding.

    Raises:
        TypeError, ValueError: as for `linear_cka`; an unknown `method`; a last minibatch of fewer than 4 rows; more
            memory than the device has.
    """
    check_layers(x, "x")
    other = x if y is None else check_layers(y, "y")
    checks.same_dtype(other, "y", x, "x")
    checks.same_device(other, "y", x, "x")
    count = x.shape[1]
    if other.shape[1] != count:
        raise ValueError(f"y: expected {count} rows as x has, got {other.shape[1]}")
    checks.flag(debiased, "debiased")
    for value, name, low in ((tile, "tile", MIN_ROWS[True]), (band, "band", 0), (seed, "seed", 0)):
        checks.integer(value, name, low)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if count < MIN_ROWS[debiased]:
        raise ValueError(f"x: expected at least {MIN_ROWS[debiased]} rows, got {count}")
    if method == "minibatch":
        if not debiased:
            raise ValueError("debiased: minibatches are debiased; pass debiased=True or another method")
        if 0 < count % tile < MIN_ROWS[True]:
            raise ValueError(f"tile: {count} rows leave a last minibatch of {count % tile}, expected at least 4")
    checks.no_tangent("cka_matrix", x, y, differentiable=False)
    sides = [x.detach()] if y is None else [x.detach(), y.detach()]
    checks.fits(bytes_needed(sides, method, tile), x.device, f"tile: {method} CKA by {tile} rows would")
    with torch.no_grad():
        if method == "minibatch":
            cross, self_x, self_y = minibatch_terms(sides, tile)
        else:
            band_or_none = band if method == "banded" else None
            cross, self_x, self_y = all_row_terms(sides, tile, band_or_none, seed, debiased)
        return cka_ratio(cross, self_x[:, None], self_y[None]).float()


def check_layers(value: object, name: str) -> Tensor:
    """`value`, if it is features ``[L, N, D]``."""
    features = checks.float_tensor(value, name)
    if features.ndim != 3 or 0 in (features.shape[0], features.shape[2]):
        raise ValueError(f"{name}: expected features [L, N, D], got shape {list(features.shape)}")
    return features


def bytes_needed(sides: list[Tensor], method: str, tile: int) -> int:
    """Memory of `cka_matrix` beside its arguments: float32 rows, their Gram matrices, and |u|^2 of each row."""
    count, layers = sides[0].shape[1], sum(len(side) for side in sides)
    if method == "minibatch" and sides[0].device.type == "cpu":  # the kernel, sums of rows, and products of batches
        debiasing = 8 * (2 * layers * count + 4 * -(-count // tile) * len(sides[0]) * len(sides[-1]))
        in_y = layers - len(sides[0])
        return torch.ops.inflection_fast.cka_batches_bytes(len(sides[0]), in_y, count, tile) + debiasing
    tile, block = min(tile, count), min(BLOCK_TILES * tile, count) if method == "exact" else min(tile, count)
    rows = {"exact": block + tile, "banded": 3 * tile, "minibatch": 2 * tile}[method]
    rows = max(rows, 3 * min(SHIFT_ROWS, count))  # the mean converts the first rows to float64
    wide = sum(len(side) * side.shape[2] for side in sides)
    grams = layers if len(sides) == 1 else layers + max(len(side) for side in sides)  # two models: the squares, too
    sums = len(sides[0]) * len(sides[-1]) * (tile * block // RUN + 1)
    return 4 * wide * (rows + 4) + 4 * grams * tile * block + 8 * layers * count + 12 * sums  # + 4: the mean


class CentredRows:
    """The rows of one model, less their mean, as float32 tiles ``[L, n, D]``."""

    def __init__(self, features: Tensor, order: Tensor | None):
        self.features, self.order = features, order
        self.factor = scale_factors(features)[:, None, None]
        # In float64: exact for a constant column, so that nothing is left of it. The offset is gone after this.
        self.shift = features[:, :SHIFT_ROWS].mean(1, keepdim=True, dtype=torch.float64).float()
        self.rest = torch.zeros_like(self.shift)
        n, sums = features.shape[1], self.rest.double()
        for part in slices(n, SHIFT_ROWS):
            sums = sums + self.tile(part).sum(1, keepdim=True).double()
        self.rest = (sums / -n).float()  # minus the mean after the first subtraction, times the factor
        self.norms = sums.new_zeros(len(features), n)  # |u|^2, filled in when the tiles are multiplied

    def tile(self, part: slice, buffer: Tensor | None = None) -> Tensor:
        """The rows ``order[part]``, written to `buffer` if given: page faults of new memory cost more than the sums."""
        rows = self.features[:, part] if self.order is None else self.features[:, self.order[part]]
        out = rows.new_empty(rows.shape, dtype=torch.float32) if buffer is None else buffer[:, : rows.shape[1]]
        if rows.dtype == torch.float32:
            torch.sub(rows, self.shift, out=out)
        else:
            out.copy_(rows).sub_(self.shift)
        return torch.addcmul(self.rest, out, self.factor, out=out)

    def buffer(self, size: int) -> Tensor:
        """Memory for a tile of at most `size` rows."""
        return self.shift.new_empty((len(self.features), min(size, self.norms.shape[1]), self.features.shape[2]))


def all_row_terms(
    sides: list[Tensor], tile: int, band: int | None, seed: int, debiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross and self terms of all rows: n (n - 3) HSIC_1, or the inner products of the centred Gram matrices.

    Rows are centred, so each row of a Gram matrix without its diagonal sums to -|u|^2. Only the inner products of Gram
    matrices need all pairs of rows.
    """
    n = sides[0].shape[1]
    order = None
    if band is not None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(sides[0].device)
    rows = [CentredRows(side, order) for side in sides]
    sums = PairSums(rows)
    scale = n * (n - 1) / (sums.all_pairs(tile) if band is None else sums.near_pairs(tile, band))
    norms = [side.norms for side in rows]
    cross, own = sums.cross * scale, [one * scale for one in sums.own]
    if not debiased:
        own = [one + side.square().sum(1) for one, side in zip(own, norms, strict=True)]
        return cross + norms[0] @ norms[-1].mT, own[0], own[-1]
    return debias(cross, own, [-side for side in norms])


def debias(cross: Tensor, own: list[Tensor], sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """n (n - 3) HSIC_1 (Song et al. 2012) of Gram matrices without diagonals, with row sums ``[..., L, n]``."""
    n, totals = sums[0].shape[-1], [side.sum(-1) for side in sums]
    a, b = 2 / (n - 2), 1 / ((n - 1) * (n - 2))
    cross = cross - a * (sums[0] @ sums[-1].mT) + b * (totals[0][..., :, None] * totals[-1][..., None, :])
    own = [s - a * k.square().sum(-1) + b * t.square() for s, k, t in zip(own, sums, totals, strict=True)]
    return cross, own[0], own[-1]


class PairSums:
    """Inner products of Gram matrices without their diagonals, over tiles of pairs of rows."""

    def __init__(self, rows: list[CentredRows]):
        self.rows = rows
        self.products = [GramBuffer() for _ in rows]
        layers = [len(side.features) for side in rows]
        self.cross = rows[0].norms.new_zeros(layers[0], layers[-1])
        self.own = [rows[0].norms.new_zeros(number) for number in layers]

    def all_pairs(self, tile: int) -> int:
        """Add all pairs of rows, each once by symmetry; returns the number of ordered pairs."""
        n, rows = self.rows[0].norms.shape[1], self.rows
        left_buffers, right_buffers = ([side.buffer(size) for side in rows] for size in (BLOCK_TILES * tile, tile))
        for block in slices(n, BLOCK_TILES * tile):
            left = [side.tile(block, buffer) for side, buffer in zip(rows, left_buffers, strict=True)]
            for part in slices(block.stop - block.start, tile):
                own = [side[:, part] for side in left]
                self.add_diagonal_tile(own, slice(block.start + part.start, block.start + part.stop))
                if part.start:
                    self.add_tile([side[:, : part.start] for side in left], own)
            for part in slices(n - block.stop, tile):
                after = slice(block.stop + part.start, block.stop + part.stop)
                right = [side.tile(after, buffer) for side, buffer in zip(rows, right_buffers, strict=True)]
                self.add_tile(left, right)
        return n * (n - 1)

    def near_pairs(self, tile: int, band: int) -> int:
        """Add the pairs of tiles at most `band` apart on a ring; returns the number of ordered pairs of rows."""
        tiles = list(slices(self.rows[0].norms.shape[1], tile))
        used = 0
        for i, part in enumerate(tiles):
            left = [side.tile(part) for side in self.rows]
            self.add_diagonal_tile(left, part)
            size = part.stop - part.start
            used += size * (size - 1)
            for j in neighbours(i, len(tiles), band):
                self.add_tile(left, [side.tile(tiles[j]) for side in self.rows])
                used += 2 * size * (tiles[j].stop - tiles[j].start)
        return used

    def add_diagonal_tile(self, rows: list[Tensor], part: slice) -> None:
        """Add the products of the tile `part` with itself."""
        grams = [product(side, side) for product, side in zip(self.products, rows, strict=True)]
        for side, gram in zip(self.rows, grams, strict=True):
            side.norms[:, part] = pop_diagonal(gram)
        cross, own = inner_products(grams)
        self.cross += cross
        self.own = [one + more for one, more in zip(self.own, own, strict=True)]

    def add_tile(self, left: list[Tensor], right: list[Tensor]) -> None:
        """Add the products of two tiles, and of their mirror image."""
        grams = [product(b, a) for product, a, b in zip(self.products, left, right, strict=True)]
        cross, own = inner_products(grams)
        self.cross += 2 * cross
        self.own = [one + 2 * more for one, more in zip(self.own, own, strict=True)]


def neighbours(i: int, count: int, band: int) -> list[int]:
    """The next tiles after i on a ring of `count`, so that each pair at most `band` apart occurs once."""
    distances = range(1, min(band, count // 2) + 1)
    # A pair of opposite tiles occurs at the one with the lower number.
    return [(i + distance) % count for distance in distances if 2 * distance != count or i < distance]


def minibatch_terms(sides: list[Tensor], tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross and self terms: sums of the batches' HSIC_1."""
    x, y = sides[0], sides[1] if len(sides) == 2 else None
    factors = torch.cat([scale_factors(side) for side in sides])
    cross, own, sums = torch.ops.inflection_fast.cka_batches(x, y, tile, factors)
    layers, full, rest = [len(side) for side in sides], x.shape[1] // tile, x.shape[1] % tile
    total: list[Tensor] = []
    for first, last, n in ((0, full, tile), (full, len(cross), rest)):
        if first == last:
            continue
        rows = sums[:, first * tile : first * tile + (last - first) * n].unflatten(1, (-1, n)).transpose(0, 1)
        terms = debias(cross[first:last], own[first:last].split(layers, 1), rows.split(layers, 1))
        found = [term.sum(0) / (n * (n - 3)) for term in terms]
        total = [one + term for one, term in zip(total, found, strict=True)] if total else found
    return total[0], total[1], total[2]


def subtract_near_mean(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Rows ``[L, n, D]`` less approximately their mean, times the factor of their layer. HSIC_1 needs no exact mean.

    Long rows do not enter the mean: otherwise the products of the other rows would be small differences of large
    numbers. A float32 mean of equal numbers can differ from them in the last digits; then the first row is subtracted
    instead, so that a constant column gives 0.
    """
    mean, first = rows.mean(1, keepdim=True), rows[:, :1]
    size = torch.linalg.vector_norm(torch.sub(rows, mean, out=out).mul_(factor), dim=2, keepdim=True).double().square()
    is_long = size > LONG * size.mean(1, keepdim=True)
    weights = (~is_long / (~is_long).sum(1, keepdim=True)).float()
    mean = torch.where(is_long.any(1, keepdim=True), weights.mT @ rows, mean)
    mean = torch.where((mean - first).abs() <= MEAN_ROUNDING * first.abs(), first, mean)
    return torch.sub(rows, mean, out=out).mul_(factor)


def batch_sums(batch: list[Tensor], products: list) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Sums over the Gram matrices without diagonals of rows ``[L, n, D]``, n even.

    Returns their `inner_products` and row sums ``[L, n]``. Computed in halves of the rows, because one of the four
    products is the mirror image of another. `products`: two buffers for each model.
    """
    half = batch[0].shape[1] // 2
    diagonal_tiles, other_tiles, sums = [], [], []
    for rows, (diagonal_buffer, other_buffer) in zip(batch, products, strict=True):
        halves = rows.view(2 * len(rows), half, -1)
        diagonal_tiles.append(diagonal_buffer(halves, halves))
        other_tiles.append(other_buffer(rows[:, :half], rows[:, half:]))
        diagonal = pop_diagonal(diagonal_tiles[-1]).view(len(rows), -1)
        sums.append((rows @ rows.sum(1, keepdim=True).mT)[..., 0] - diagonal)
    cross, own = inner_products([gram.view(len(rows), -1) for gram, rows in zip(diagonal_tiles, batch, strict=True)])
    other_cross, other_own = inner_products(other_tiles)
    return cross + 2 * other_cross, [a + 2 * b for a, b in zip(own, other_own, strict=True)], sums


@torch.library.register_fake("inflection_fast::cka_batches")
def _(x, y, tile, factors=None):
    layers, rows = x.shape[0] + (0 if y is None else y.shape[0]), x.shape[1]
    batches = -(-rows // tile)
    sizes = (batches, x.shape[0], (x if y is None else y).shape[0]), (batches, layers), (layers, rows)
    return tuple(x.new_empty(size, dtype=torch.float64) for size in sizes)


def cka_batches(x: Tensor, y: Tensor | None, tile: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For devices without a kernel: sums over the Gram matrices without diagonals of each batch of `tile` rows.

    Rows are centred and multiplied by the `factors` of their layers (None: 1) first; see `subtract_near_mean`.

    Returns, float64: inner products ``[batches, L, L2]`` of x with y (None: with itself), squared norms
    ``[batches, L (+ L2)]``, and row sums ``[L (+ L2), N]``.
    """
    sides = [x] if y is None else [x, y]
    layers = [len(side) for side in sides]
    if factors is None:
        factors = x.new_ones(sum(layers), dtype=torch.float32)
    products = [(GramBuffer(), GramBuffer()) for _ in sides]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    buffer: list[Tensor] = []
    for part in slices(x.shape[1], tile):
        n = part.stop - part.start
        even = n + n % 2  # a row of zeros adds nothing
        if not buffer or buffer[0].shape[1] != even:
            buffer = [side.new_zeros((len(side), even, side.shape[2]), dtype=torch.float32) for side in sides]
        for side, out, factor in zip(sides, buffer, factors[:, None, None].split(layers), strict=True):
            subtract_near_mean(side[:, part].float(), factor, out[:, :n])
        cross, own, sums = batch_sums(buffer, products)
        found.append((cross, torch.cat(own), torch.cat(sums)[:, :n]))
    by_batch = list(zip(*found, strict=True))
    return torch.stack(by_batch[0]), torch.stack(by_batch[1]), torch.cat(by_batch[2], 1)


torch.library.impl("inflection_fast::cka_batches", "CompositeExplicitAutograd", cka_batches)
