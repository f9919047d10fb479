"""The standard error of a CKA whose rows are all at hand: each sequence is left out in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .basis import pooled_basis, project
from .gram import MIN_ROWS, centred, layers_of, of_terms, scaled
from .linear import check_rows
from .result import CkaResult, jackknife_error, reason_of

__all__ = ["cka_jackknife"]

PADDED_ROWS = 1024  # of sequences that are multiplied at a time


def cka_jackknife(
    x: Tensor, y: Tensor, sequences: Tensor, *, rank: int | None = None, debiased: bool = True
) -> CkaResult:
    """Linear CKA with the standard error that comes from the choice of sequences, one per layer.

    The value is that of `linear_cka`. Tokens of one sequence depend on each other, so the jackknife leaves out
    sequences, not rows. It computes no CKA again: without the rows U, V of a sequence the cross term is a polynomial in
    ``U^T V``, of which ``<S, U^T V> = sum_r u_r^T S v_r`` and ``|U^T V|^2 = <U U^T, V V^T>`` are all that is new. For N
    rows of m per sequence that takes N (6 D^2 + 6 m D) multiplications in float32, summed in float64, whatever the
    number of sequences: about five times the time of the value at D = 768. Where one sequence holds nearly all of the
    variance, what is left without it is a small difference, and the error is rough. In a basis of rank k it is k in
    place of D, the basis staying that of all rows.

    Extra memory: what `linear_cka` takes; then of one layer at a time at most 12 N D + P (28 D + 20 M) + 8 D^2 bytes,
    with M rows in the longest sequence, P = max(M, 1024) and the wider D. Refused beforehand where the device has less.

    Args:
        x: ``[..., N, D]``, as for `linear_cka`.
        y: ``[..., N, D2]``, as for `linear_cka`.
        sequences: int64 ``[N]``: which sequence a row is of; any numbers, in any order. Read on the host.
        rank: as for `linear_cka`.
        debiased: as for `linear_cka`.

    Returns:
        `CkaResult` of tensors ``[...]``, leading dimensions flattened to one.

    Raises:
        TypeError, ValueError: as for `linear_cka`; `sequences` does not fit the rows, or is so long in one of them that
            its products would not fit into memory.
    """
    check_rows(x, y, rank, debiased, ("x", "y"))
    checks.sequences(sequences, x)
    checks.no_tangent("cka_jackknife", x, y, differentiable=False)
    x, y = x.detach(), y.detach()
    pieces = padded(sequences)
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
    value = of_terms(terms)
    errors, sums = [], []
    for i in layers_of(x):
        sides = [scaled(side[i])[0] for side in (x, y)]
        without = [terms_without(*pair, pieces, debiased) for pair in pairs(*sides)]
        errors.append(jackknife_error(of_terms(torch.stack(without, -1))[:, None], pieces[1] > 0))
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
    """What it takes beside `linear_cka`: rows, turned rows, and pieces of them; before a basis, both sides in one."""
    piece, within = max(longest, PADDED_ROWS), wide if rank is None else rank
    leaving = 12 * rows * within + piece * (12 * within + max(16 * within, 20 * longest)) + 8 * within**2
    return leaving if rank is None else max(leaving, (20 * rows + 16 * PADDED_ROWS) * wide)


def norms_of(parts: Sequence[Tensor]) -> Tensor:
    """float64 ``[N]``: |u|^2 of rows that come in parts, so that no float64 copy holds them all."""
    return torch.cat([rows.double().square().sum(1) for rows in parts])


def pairs(u: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """In the order of the terms: xy, xx, yy."""
    return (u, v), (u, u), (v, v)


def variance_in(x: Tensor, y: Tensor, basis: Tensor) -> Tensor:
    """Share of the variance of the rows of both sides pooled that lies in a basis, ``[layers]``."""
    shares = []
    for i in layers_of(x):
        parts = centred(torch.cat([x[i], y[i]])).split(PADDED_ROWS)
        within = sum((rows.double() @ basis[i]).square().sum() for rows in parts)
        shares.append(within / norms_of(parts).sum())
    return torch.stack(shares) if shares else basis.new_zeros(0)


def padded(sequences: Tensor) -> tuple[list[tuple[Tensor, Tensor, slice]], Tensor]:
    """Sequences of like lengths side by side: their rows ``[S, M]``, which of those are there, which sequences.

    Also the number of rows of every sequence, the longest first.
    """
    sizes = torch.unique(sequences, return_inverse=True, return_counts=True)
    counts, order = sizes[2].sort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rows = place[sizes[1]].argsort(stable=True)  # by sequence, the longest first
    starts = counts.cumsum(0) - counts
    pieces, first, lengths = [], 0, counts.tolist()
    while first < len(lengths):
        longest = lengths[first]
        many = slice(first, first + max(1, PADDED_ROWS // longest))
        column = torch.arange(longest, device=rows.device)
        there = column < counts[many, None]
        pieces.append((rows[torch.where(there, starts[many, None] + column, 0)], there, many))
        first = many.stop
    return pieces, counts


def terms_without(u: Tensor, v: Tensor, pieces: tuple[list, Tensor], debiased: bool) -> Tensor:
    """The cross term of the centred rows u, v without each sequence, ``[S]``: see docs/cka.md."""
    s = u.mT @ v
    p, q = (norms_of(side.split(PADDED_ROWS)) for side in (u, v))
    turned = v @ s.mT
    w_pv, w_qu = p.float() @ v, q.float() @ u
    whole = s.square().sum(dtype=torch.float64)
    out = []
    for index, there, many in pieces[0]:
        rows_u, rows_v = (torch.where(there[..., None], side[index], 0.0) for side in (u, v))
        own_p, own_q = (torch.where(there, norms[index], 0.0) for norms in (p, q))
        a, b = rows_u.sum(1), rows_v.sum(1)
        n = len(u) - pieces[1][many].double()
        cross = total(rows_u * turned[index])
        own = total((rows_u @ rows_u.mT) * (rows_v @ rows_v.mT))
        along_a, along_b = ((rows @ sums[..., None])[..., 0].double() for rows, sums in ((rows_u, a), (rows_v, b)))
        form = total((a @ s) * b) - (along_a * along_b).sum(1)  # a^T (S - U^T V) b
        aa, bb = total(a.square()) / n**2, total(b.square()) / n**2
        squares = whole - 2 * cross + own - 2 * form / n + aa * bb * n**2
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
