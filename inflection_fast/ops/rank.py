"""Rank of attention matrices, from their singular values, without storing the matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .reference import qk_scores

__all__ = ["AttentionRank", "attention_rank"]

EXACT_KEYS = 1024  # up to this number of keys the full Gram matrix A^T A of a head is decomposed
STRIP_BYTES = 8 << 20  # of the probabilities in memory at a time, and of the Gram matrices in memory at a time
KRYLOV_SEED = 0


class AttentionRank(NamedTuple):
    """Rank of attention matrices A with singular values s_1 >= s_2 >= ..., each float64 ``[B, H]``.

    All are NaN for a head that attends no key.
    """

    k: Tensor
    """Least k with s_1^2 + ... + s_k^2 >= share * ||A||_F^2; NaN if the Krylov space holds less than the share."""
    stable: Tensor
    """Stable rank ||A||_F^2 / s_1^2."""
    column_mass: Tensor
    """Largest share of one column in ||A||_F^2; near 1 if all queries attend the same key."""
    captured: Tensor
    """Share of ||A||_F^2 in the searched space: 1 for exact results, else the share in the block Krylov space."""


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
    """Rank of the attention probabilities A ``[Q, K]`` of each head (arXiv 2404.08634 uses k at share = 0.90).

    A is computed in strips of rows, which are not kept: memory is O(K block (steps + 1)) per head and a strip of 8 MiB.
    Up to `exact_keys` keys the strips are added up to A^T A, float64 ``[K, K]``; its eigenvalues are the squares of all
    singular values. For more keys, the squares are the eigenvalues of A^T A in a block Krylov space (Musco & Musco
    2015, arXiv 1504.05477) of dimension d = block * (steps + 1), which approximate the leading ones from below, the
    first to float32 accuracy. Then `stable` and `column_mass` do not change; `k` is the true value or more: exact if
    the spectrum falls fast, a few too many if it is flat, NaN if the space holds less than `share` of ||A||_F^2
    (`captured` is that share).

    Not differentiable. LAPACK or cuSOLVER computes the eigenvalues, and synchronises with a GPU once per call.

    Args:
        query: ``[B, H, Q, D]``, float32, bfloat16 or float16; scores are computed in float32.
        key: ``[B, Hkv, K, D]``, H a multiple of Hkv.
        attn_mask, is_causal, scale, window, softcap, sinks: as in `attention_stats_qk`. Sinks take their share of a
            row, but their column is not part of A.
        valid: bool ``[B, Q]``, True for rows that count; None: all.
        share: share of the squared Frobenius norm, above 0 and below 1.
        block: number of columns of the first block of the Krylov space.
        steps: number of products with A^T A.
        exact_keys: largest number of keys for which all singular values are computed.

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
        checks.shape(checks.device_tensor(valid, "valid", query, "query", torch.bool), "valid", (batch, queries))
    sinks = None if sinks is None else checks.sinks(sinks, query)
    options = (checks.flag(is_causal, "is_causal"), scale, checks.window(window), softcap, sinks)
    results = []
    with torch.no_grad():
        for b in range(batch):
            mask = attn_mask
            if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
                mask = mask[b : b + 1]
            rows = _Rows(query[b : b + 1], key[b : b + 1], mask, *options, valid=None if valid is None else valid[b])
            squares, columns = _exact(rows) if keys <= exact_keys else _krylov(rows, block, steps)
            results.append(_summary(squares, columns, share))
    return AttentionRank(*(torch.stack(field) for field in zip(*results, strict=True)))


def _summary(squares: Tensor, columns: Tensor, share: float) -> tuple[Tensor, ...]:
    """From eigenvalues of A^T A [H, d], in falling order, and the sums of squares of the columns [H, K]."""
    total = columns.sum(-1)
    squares = squares.clamp(min=0.0)  # A^T A has no negative eigenvalues, so these are rounding errors; NaN stays
    reached = squares.cumsum(-1)
    least = (reached < share * total[:, None]).sum(-1).double() + 1
    captured = reached[:, -1] / total
    k = least.masked_fill((least > squares.shape[-1]) | total.isnan() | (total == 0), torch.nan)
    return k, total / squares[:, 0], columns.amax(-1) / total, captured.clamp(max=1.0)


class _Rows:
    """The attention matrices A of one sequence, computed in strips of rows."""

    def __init__(self, query, key, mask, is_causal, scale, window, softcap, sinks, valid):
        self.query, self.key = query, key
        self.options = {"is_causal": is_causal, "scale": scale, "window": window, "softcap": softcap}
        self.heads, self.queries, self.keys = query.shape[1], query.shape[2], key.shape[2]
        self.mask = None if mask is None else mask.expand(1, self.heads, self.queries, self.keys)
        self.is_causal, self.sinks, self.valid, self.device = is_causal, sinks, valid, query.device

    def strip(self, begin: int, end: int, heads: slice) -> Tensor:
        """The first columns of A, [h, end - begin, <= K] float32; other columns and rows that do not count are 0."""
        key_heads = torch.arange(self.heads, device=self.device)[heads] // (self.heads // self.key.shape[1])
        keys = min(self.keys, end) if self.is_causal else self.keys  # no row of the strip attends a later one
        rows = torch.arange(begin, end, device=self.device)
        mask = None if self.mask is None else self.mask[:, heads, :, :keys]
        query, key = self.query[:, heads], self.key[:, key_heads, :keys]
        scores, attend = qk_scores(query, key, mask, rows=rows, cu_seqlens=None, **self.options)
        scores = scores[0].masked_fill(~attend[0], -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill_(empty, 0.0)
        if self.sinks is not None:
            sinks = self.sinks[heads, None, None].expand(*scores.shape[:-1], 1)
            p = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        p = p.masked_fill(empty, 0.0)
        return p if self.valid is None else p.masked_fill(~self.valid[begin:end, None], 0.0)

    def each(self, use: Callable[[Tensor, slice], None], heads: slice) -> None:
        """Call `use` with each strip of `heads`."""
        count = len(range(*heads.indices(self.heads)))
        length = max(1, min(self.queries, STRIP_BYTES // (4 * count * max(self.keys, 1))))
        for begin in range(0, self.queries, length):
            use(self.strip(begin, min(begin + length, self.queries), heads), heads)


def _exact(rows: _Rows) -> tuple[Tensor, Tensor]:
    """All eigenvalues of A^T A [H, K], in falling order, and its diagonal [H, K], for some heads at a time."""
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
    # LAPACK refuses NaN and infinity: such a head has no singular values, and must not stop the others.
    broken = ~torch.isfinite(gram).all(-1).all(-1)
    values = torch.linalg.eigvalsh(gram.masked_fill(broken[..., None, None], 0.0))
    return values.flip(-1).masked_fill(broken[..., None], torch.nan)


def _krylov(rows: _Rows, block: int, steps: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues of A^T A [H, block * (steps + 1)], in falling order, and its diagonal [H, K]."""
    steps = min(steps, rows.keys - 1)
    width = min(block, rows.keys // (steps + 1))  # more columns than keys cannot be orthogonal
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
        # Orthogonalise twice: once is not enough for nearly parallel columns.
        for _ in range(2):
            v = torch.linalg.qr(v - space @ (space.mT @ v))[0]
        space, image = torch.cat([space, v], -1), torch.cat([image, multiplied(v)], -1)
    gram = space.double().mT @ image.double()
    return _eigenvalues((gram + gram.mT) / 2), columns
