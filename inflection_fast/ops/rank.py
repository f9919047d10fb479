"""Singular values of attention matrices that are never formed: what their rank is, and whether it is one column."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks

__all__ = ["AttentionRank", "attention_rank"]

EXACT_KEYS = 1024  # up to so many keys the Gram matrix A^T A of a head is decomposed as a whole
STRIP_BYTES = 8 << 20  # of the probabilities that are there at a time, and of the Gram matrices beside them
KRYLOV_SEED = 0


class AttentionRank(NamedTuple):
    """What the singular values s_1 >= s_2 >= ... of attention matrices A say, each float64 ``[B, H]``.

    Of a head without any attended row, everything is NaN.
    """

    k: Tensor
    """Least k with s_1^2 + ... + s_k^2 >= share * ||A||_F^2; NaN where the Krylov space does not reach the share."""
    stable: Tensor
    """Stable rank ||A||_F^2 / s_1^2."""
    column_mass: Tensor
    """Largest share of one column in ||A||_F^2; near 1 all queries attend one key."""
    captured: Tensor
    """Share of ||A||_F^2 in the space that was searched: 1, or what the block Krylov space holds of it."""


def attention_rank(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    share: float = 0.9,
    block: int = 64,
    steps: int = 3,
    exact_keys: int = EXACT_KEYS,
) -> AttentionRank:
    """Rank of the attention probabilities A ``[Q, K]`` of every head (arXiv 2404.08634 takes k at share = 0.90).

    A is made in strips of rows, used and thrown away, so memory is O(K block (steps + 1)) per head beside a strip of 8
    MiB. Up to `exact_keys` keys the strips add up to A^T A, float64 ``[K, K]`` of as many heads at a time as 8 MiB
    hold, whose eigenvalues are the squares of all singular values. Beyond, a block Krylov space (Musco & Musco 2015,
    arXiv 1504.05477) of dimension d = block * (steps + 1) is built from A^T A V and the squares are the eigenvalues of
    A^T A in it: the leading ones, from below, the first of them accurate to float32. So `stable` and `column_mass` are
    as without it, and `k` comes out at the true value or above it: exact where the spectrum falls fast, a few too many
    where it is flat, NaN where the space holds less than `share` of ||A||_F^2, which `captured` says.

    Not differentiable. The eigenvalues are found by LAPACK or cuSOLVER, which waits for a GPU once per call.

    Args:
        query: ``[B, H, Q, D]``, float32, bfloat16, float16; scores are taken in float32.
        key: ``[B, Hkv, K, D]``, H a multiple of Hkv.
        attn_mask, is_causal, scale, window, softcap, sinks: as in `attention_stats_qk`. Sinks take their share of a
            row; their column is no part of A.
        valid: bool ``[B, Q]``, rows of A that count; None: all.
        share: of the squared Frobenius norm, above 0 and below 1.
        block: columns of the first block of the Krylov space.
        steps: products with A^T A.
        exact_keys: most keys for which all singular values are computed.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a number out of range.
    """
    query, key = checks.query_key(query, key)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    checks.attn_mask(attn_mask, (batch, heads, queries, keys), query, "query")
    if not 0 < checks.finite(share, "share") < 1:
        raise ValueError(f"share: expected a number above 0 and below 1, got {share}")
    checks.integer(block, "block", 1), checks.integer(steps, "steps", 0), checks.integer(exact_keys, "exact_keys", 0)
    if valid is not None:
        checks.device_tensor(valid, "valid", query, "query")
        if valid.dtype != torch.bool or valid.shape != (batch, queries):
            raise ValueError(f"valid: expected bool [{batch}, {queries}], got {valid.dtype} {list(valid.shape)}")
    options = (checks.flag(is_causal, "is_causal"), scale, checks.window(window), softcap, sinks)
    results = []
    with torch.no_grad():
        for b in range(batch):
            mask = _of_batch(attn_mask, b)
            rows = _Rows(query[b : b + 1], key[b : b + 1], mask, *options, valid=None if valid is None else valid[b])
            squares, columns = _exact(rows) if keys <= exact_keys else _krylov(rows, block, steps)
            results.append(_summary(squares, columns, share))
    return AttentionRank(*(torch.stack(field) for field in zip(*results, strict=True)))


def _of_batch(mask: Tensor | None, b: int) -> Tensor | None:
    return mask[b : b + 1] if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask


def _summary(squares: Tensor, columns: Tensor, share: float) -> tuple[Tensor, ...]:
    """From eigenvalues of A^T A [H, d], falling, and the sums of squares of the columns [H, K]."""
    total = columns.sum(-1)
    squares = squares.clamp(min=0.0)  # of a positive matrix: what is below 0 is rounding; NaN stays
    reached = squares.cumsum(-1)
    least = (reached < share * total[:, None]).sum(-1).double() + 1
    captured = reached[:, -1] / total
    k = least.masked_fill((least > squares.shape[-1]) | total.isnan() | (total == 0), torch.nan)
    return k, total / squares[:, 0], columns.amax(-1) / total, captured.clamp(max=1.0)


class _Rows:
    """The rows of the attention matrices of one sequence, strip by strip."""

    def __init__(self, query, key, mask, is_causal, scale, window, softcap, sinks, valid):
        self.query, self.key, self.mask, self.valid = query, key, mask, valid
        self.is_causal, self.window, self.softcap, self.sinks = is_causal, window, softcap, sinks
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.heads, self.queries, self.keys = query.shape[1], query.shape[2], key.shape[2]
        self.device = query.device

    def strip(self, begin: int, end: int, heads: slice) -> Tensor:
        """The first columns of A, [h, end - begin, <= K] float32; the others are 0, as are rows that do not count."""
        group = self.heads // self.key.shape[1]
        head = torch.arange(self.heads, device=self.device)[heads]
        keys = min(self.keys, end) if self.is_causal else self.keys  # no row of the strip attends a later one
        query, key = self.query[0, heads, begin:end].float(), self.key[0, head // group, :keys].float()
        scores = query @ key.mT * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = self._hidden(begin, end, keys)
        if self.mask is not None:
            mask = self.mask.expand(1, self.heads, self.queries, self.keys)[0, heads, begin:end, :keys]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                floor = torch.finfo(mask.dtype).min / 2
                scores = scores.add_(mask.float().masked_fill(mask <= floor, -torch.inf))
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill_(empty, 0.0)
        if self.sinks is not None:
            sinks = self.sinks.float()[heads, None, None].expand(*scores.shape[:-1], 1)
            p = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        p = p.masked_fill(empty, 0.0)
        return p if self.valid is None else p.masked_fill(~self.valid[begin:end, None], 0.0)

    def _hidden(self, begin: int, end: int, keys: int) -> Tensor | None:
        left, right = self.window
        if not self.is_causal and left < 0 and right < 0:
            return None
        ahead = torch.arange(keys, device=self.device) - torch.arange(begin, end, device=self.device)[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if self.is_causal:
            hidden |= ahead > 0
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        return hidden

    def each(self, use: Callable[[Tensor, slice], None], heads: slice) -> None:
        """Call `use` with every strip of `heads`."""
        count = len(range(*heads.indices(self.heads)))
        length = max(1, min(self.queries, STRIP_BYTES // (4 * count * max(self.keys, 1))))
        for begin in range(0, self.queries, length):
            use(self.strip(begin, min(begin + length, self.queries), heads), heads)


def _exact(rows: _Rows) -> tuple[Tensor, Tensor]:
    """All eigenvalues of A^T A [H, K], falling, and its diagonal [H, K]; as many heads at a time as a strip holds."""
    squares, columns = [], []
    group = max(1, STRIP_BYTES // (8 * max(rows.keys, 1) ** 2))
    for first in range(0, rows.heads, group):
        these = slice(first, min(first + group, rows.heads))
        gram = torch.zeros(these.stop - first, rows.keys, rows.keys, dtype=torch.float64, device=rows.device)

        def add(strip: Tensor, heads: slice, gram: Tensor = gram) -> None:
            strip = strip.double()
            keys = strip.shape[-1]
            gram[:, :keys, :keys] += strip.mT @ strip

        rows.each(add, these)
        columns.append(gram.diagonal(dim1=-2, dim2=-1).clone())
        squares.append(_eigenvalues(gram))
    return torch.cat(squares), torch.cat(columns)


def _eigenvalues(gram: Tensor) -> Tensor:
    # LAPACK refuses NaN and infinity; a poisoned head has no singular values, and the others go on.
    broken = ~torch.isfinite(gram).all(-1).all(-1)
    values = torch.linalg.eigvalsh(gram.masked_fill(broken[..., None, None], 0.0))
    return values.flip(-1).masked_fill(broken[..., None], torch.nan)


def _krylov(rows: _Rows, block: int, steps: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues of A^T A [H, block * (steps + 1)], falling, from below; and its diagonal [H, K]."""
    steps = min(steps, rows.keys - 1)
    width = min(block, rows.keys // (steps + 1))  # more columns than keys could not be orthogonal
    generator = torch.Generator().manual_seed(KRYLOV_SEED)
    start = torch.randn(rows.keys, width, generator=generator).to(rows.device)
    columns = torch.zeros(rows.heads, rows.keys, dtype=torch.float64, device=rows.device)
    every = slice(0, rows.heads)

    def multiplied(v: Tensor, first: bool = False) -> Tensor:  # A^T A v, [H, K, width] float32
        out = torch.zeros_like(v)

        def add(strip: Tensor, heads: slice) -> None:
            keys = strip.shape[-1]
            out[:, :keys] += strip.mT @ (strip @ v[:, :keys])
            if first:
                columns[:, :keys] += strip.square().sum(-2, dtype=torch.float64)

        rows.each(add, every)
        return out

    v = torch.linalg.qr(start.expand(rows.heads, -1, -1))[0]
    space, image = v, multiplied(v, first=True)
    for _ in range(steps):
        v = image[..., -width:]
        # Against what is there, twice: once leaves what rounding makes of nearly parallel columns.
        for _ in range(2):
            v = torch.linalg.qr(v - space @ (space.mT @ v))[0]
        space, image = torch.cat([space, v], -1), torch.cat([image, multiplied(v)], -1)
    gram = space.double().mT @ image.double()
    return _eigenvalues((gram + gram.mT) / 2), columns
