"""CKA with a standard error from rows in memory: a jackknife that leaves out each sequence in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .basis import pooled_basis, project
from .gram import MIN_ROWS, centred, cka_from_terms, layer_indices, scaled_rows
from .linear import check_rows
from .result import CkaResult, jackknife_error, reason_of

__all__ = ["cka_jackknife"]

PADDED_ROWS = 1024  # number of padded rows that are multiplied at a time


def cka_jackknife(
    x: Tensor, y: Tensor, sequences: Tensor, *, rank: int | None = None, debiased: bool = True
) -> CkaResult:
    """Linear CKA with its standard error, one value per layer.

    The value is that of `linear_cka`. Tokens of one sequence are not independent, so the jackknife leaves out
    sequences, not rows: the error is that of the choice of sequences. CKA is not computed again: without the rows U, V
    of a sequence the cross term is a polynomial in ``U^T V`` (docs/math.md), and only two terms are new:
    ``<S, U^T V> = sum_r u_r^T S v_r`` and ``|U^T V|^2 = <U U^T, V V^T>``. For N rows, m per sequence, that takes N (6
    D^2 + 6 m D) multiplications in float32, summed in float64, for any number of sequences: about five times the time
    of the value at D = 768. If one sequence holds nearly all of the variance, its omission leaves a small difference
    and the error is inaccurate. With `rank` the cost has k in place of D; the basis of all rows is used throughout.

    Additional memory: that of `linear_cka`; then, for one layer at a time, at most 12 N D + P (28 D + 20 M) + 8 D^2
    bytes, with M rows in the longest sequence, P = max(M, 1024) and the larger D.

    Args:
        x, y, rank, debiased: as for `linear_cka`.
        sequences: int64 ``[N]``, number of the sequence of each row; any numbers, in any order. Read on the host.

    Returns:
        `CkaResult` of tensors ``[...]``, with leading dimensions flattened to one.

    Raises:
        TypeError, ValueError: as for `linear_cka`; `sequences` does not fit the rows; or one sequence is so long that
            its products do not fit into memory.
    """
    check_rows(x, y, rank, debiased, ("x", "y"))
    checks.sequences(sequences, x)
    checks.no_tangent("cka_jackknife", x, y, differentiable=False)
    x, y = x.detach(), y.detach()
    pieces = padded_sequences(sequences)
    wide = max(x.shape[-1], y.shape[-1])
    longest = max((index.shape[1] for index, _, _ in pieces[0]), default=0)
    need, what = bytes_needed(x.shape[-2], wide, longest, rank), f"sequences: {x.shape[-2]} rows, {longest} of one,"
    checks.fits(need, x.device, what)
    kept = x.new_ones(x.shape[:-2], dtype=torch.float64).flatten()
    if rank is not None:
        basis = pooled_basis(x, y, rank)
        kept = variance_in(x, y, basis)
        x, y = project(x, basis), project(y, basis)
    terms = torch.ops.inflection_fast.cka_terms(x, y, debiased).reshape(-1, 3)
    value = cka_from_terms(terms)
    errors, sums = [], []
    for i in layer_indices(x):
        sides = [scaled_rows(side[i])[0] for side in (x, y)]
        without = [terms_without(*pair, pieces, debiased) for pair in pairs(*sides)]
        errors.append(jackknife_error(cka_from_terms(torch.stack(without, -1))[:, None], pieces[1] > 0))
        sums.append(torch.stack([side.sum() for side in sides]))  # NaN where a feature is NaN or infinite
    count, units = x.shape[-2], len(pieces[1])
    rows = kept.new_full(kept.shape, count)
    return CkaResult(
        value=value.float(),
        delta=(1 - value).float(),
        standard_error=(torch.cat(errors) if errors else kept).float(),
        rows=rows,
        units=kept.new_full((), units),
        sequences=kept.new_full((), units),
        rank=rank,
        variance_kept=kept,
        debiased=debiased,
        reason=reason_of(terms, rows, torch.stack(sums) if sums else kept.new_zeros(0, 2), MIN_ROWS[debiased]),
    )


def bytes_needed(rows: int, wide: int, longest: int, rank: int | None) -> int:
    """Memory beside that of `linear_cka`: rows, their products with S, padded pieces; with a basis both sides, too."""
    piece, within = max(longest, PADDED_ROWS), wide if rank is None else rank
    leaving = 12 * rows * within + piece * (12 * within + max(16 * within, 20 * longest)) + 8 * within**2
    return leaving if rank is None else max(leaving, (20 * rows + 16 * PADDED_ROWS) * wide)


def squared_norms(parts: Sequence[Tensor]) -> Tensor:
    """|u|^2 of rows given in parts, float64 ``[N]``. In parts, so that no float64 copy of all rows is made."""
    return torch.cat([rows.double().square().sum(1) for rows in parts])


def pairs(u: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The pairs of sides in the order of the terms: xy, xx, yy."""
    return (u, v), (u, u), (v, v)


def variance_in(x: Tensor, y: Tensor, basis: Tensor) -> Tensor:
    """Share of the pooled variance of both sides that lies in the basis, ``[layers]``."""
    shares = []
    for i in layer_indices(x):
        parts = centred(torch.cat([x[i], y[i]])).split(PADDED_ROWS)
        within = sum((rows.double() @ basis[i]).square().sum() for rows in parts)
        shares.append(within / squared_norms(parts).sum())
    return torch.stack(shares) if shares else basis.new_zeros(0)


def padded_sequences(sequences: Tensor) -> tuple[list[tuple[Tensor, Tensor, slice]], Tensor]:
    """Groups of sequences of similar lengths: row indices ``[S, M]``, which of them are valid, and the group's slice.

    Also the number of rows of each sequence. Sequences are ordered by length, the longest first.
    """
    _, number_of_row, sizes = torch.unique(sequences, return_inverse=True, return_counts=True)
    counts, order = sizes.sort(descending=True, stable=True)
    rows = order.argsort()[number_of_row].argsort(stable=True)  # by sequence, the longest first
    starts = counts.cumsum(0) - counts
    pieces, first, lengths = [], 0, counts.tolist()
    while first < len(lengths):
        longest = lengths[first]
        group = slice(first, first + max(1, PADDED_ROWS // longest))
        column = torch.arange(longest, device=rows.device)
        valid = column < counts[group, None]
        pieces.append((rows[torch.where(valid, starts[group, None] + column, 0)], valid, group))
        first = group.stop
    return pieces, counts


def terms_without(u: Tensor, v: Tensor, pieces: tuple[list, Tensor], debiased: bool) -> Tensor:
    """The cross term of the centred rows u, v without each sequence, ``[S]``; formulas in docs/math.md."""
    s = u.mT @ v
    p, q = (squared_norms(side.split(PADDED_ROWS)) for side in (u, v))
    s_v = v @ s.mT
    w_pv, w_qu = p.float() @ v, q.float() @ u
    s_squared = s.square().sum(dtype=torch.float64)
    out = []
    for index, valid, group in pieces[0]:
        rows_u, rows_v = (torch.where(valid[..., None], side[index], 0.0) for side in (u, v))
        own_p, own_q = (torch.where(valid, norms[index], 0.0) for norms in (p, q))
        a, b = rows_u.sum(1), rows_v.sum(1)
        n = len(u) - pieces[1][group].double()
        cross = total(rows_u * s_v[index])
        own = total((rows_u @ rows_u.mT) * (rows_v @ rows_v.mT))
        along_a, along_b = ((rows @ sums[..., None])[..., 0].double() for rows, sums in ((rows_u, a), (rows_v, b)))
        form = total((a @ s) * b) - (along_a * along_b).sum(1)  # a^T (S - U^T V) b
        aa, bb = total(a.square()) / n**2, total(b.square()) / n**2
        squares = s_squared - 2 * cross + own - 2 * form / n + aa * bb * n**2
        if debiased:
            sum_p, sum_q = p.sum() - own_p.sum(1), q.sum() - own_q.sum(1)
            kl = p @ q - (own_p * own_q).sum(1) + 4 * form / n**2 + bb * sum_p + aa * sum_q - 3 * n * aa * bb
            kl += 2 / n * (b @ w_pv - (own_p * along_b).sum(1) + a @ w_qu - (own_q * along_a).sum(1))
            squares = squares - n / (n - 2) * kl + (sum_p - n * aa) * (sum_q - n * bb) / ((n - 1) * (n - 2))
            squares = torch.where(n >= MIN_ROWS[True], squares, torch.nan)
        out.append(squares)
    return torch.cat(out)


def total(products: Tensor) -> Tensor:
    """Sum over all but the first dimension, in float64."""
    return products.flatten(1).sum(1, dtype=torch.float64)
