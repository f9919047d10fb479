"""The specification: each operator in plain PyTorch, with the same name and signature, for any float dtype and device.

Written to be short, not fast. Results are float64 for float64 inputs, else float32. Values at or below half of the
lowest finite number of their dtype count as -inf. The limit is that of the input's dtype: set such values to -inf
before you convert a tensor to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation_moments import MASSIVE_MAGNITUDE, MASSIVE_OF_MEDIAN, ActivationMoments
from .attention_column_mass import AttentionColumns
from .attention_stats import AttentionStats

INF = float("inf")


def attention_entropy(
    logits: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float = 1.0
) -> Tensor:
    """Entropy of each softmax row of `logits` ``[..., Q, K]``, in nats."""
    return attention_stats(logits, attn_mask=attn_mask, is_causal=is_causal, scale=scale).entropy


def attention_stats(
    logits: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float = 1.0
) -> AttentionStats:
    """Statistics of each softmax row of `logits` ``[..., Q, K]``."""
    queries, keys = logits.shape[-2:]
    attend = ~(logits <= floor_of(logits))
    if is_causal:
        attend = attend & causal(torch.arange(queries, device=logits.device), keys)
    bias, allowed = split(attn_mask)
    scores = wide(logits) * scale + bias
    broken = logits == INF  # also where a negative scale turns it into -inf
    return row_stats(scores.masked_fill(broken, INF), (attend & allowed).expand(scores.shape))


def attention_entropy_qk(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Entropy of each softmax row of the attention of `query` ``[B, H, Q, D]`` to `key` ``[B, Hkv, K, D]``."""
    return attention_stats_qk(
        query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
        rows=rows, cu_seqlens=cu_seqlens,
    ).entropy  # fmt: skip


def attention_stats_qk(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> AttentionStats:
    """Statistics of each softmax row of the attention of `query` ``[B, H, Q, D]`` to `key` ``[B, Hkv, K, D]``."""
    scores, attend = qk_scores(query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens)
    first = None
    if cu_seqlens is not None:
        position = torch.arange(query.shape[2], device=query.device) if rows is None else rows
        first = torch.where(cu_seqlens <= position[:, None], cu_seqlens, 0).amax(-1).long()
    return row_stats(scores, attend, None if sinks is None else wide(sinks)[:, None, None], first)


def attention_column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> AttentionColumns:
    """Column sums of the probabilities ``exp(scores - lse)`` ``[B, H, Q, K]``, with `lse` ``[B, H, Q]``."""
    scores, attend = qk_scores(query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens)
    counts = attend & (scores != -INF) & (lse != -INF)[..., None]
    p = (scores - lse[..., None]).exp().clamp(max=1.0).masked_fill(~counts, 0.0)
    return AttentionColumns(p.sum(-2), p.square().sum(-2))


def qk_scores(query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, R, K]``, and a bool mask of the attended ones."""
    batch, heads, queries, depth = query.shape
    kv_heads, keys = key.shape[1:3]
    rows = torch.arange(queries, device=query.device) if rows is None else rows
    repeated = wide(key).repeat_interleave(heads // kv_heads, dim=1)
    scores = wide(query[:, :, rows]) @ repeated.mT * (depth**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    attend = torch.ones(keys, dtype=torch.bool, device=query.device)
    if attn_mask is not None:
        bias, allowed = split(attn_mask.expand(batch, heads, queries, keys)[:, :, rows])
        scores, attend = scores + bias, attend & allowed
    column = torch.arange(keys, device=query.device)
    if is_causal:
        attend = attend & causal(rows, keys)
    if window is not None and window[0] >= 0:
        attend = attend & (column >= rows[:, None] - window[0])
    if window is not None and window[1] >= 0:
        attend = attend & (column <= rows[:, None] + window[1])
    if cu_seqlens is not None:
        sequence = (cu_seqlens[:, None] <= column).sum(0)  # counted from 1; 0 is before the first sequence
        inside = (sequence > 0) & (sequence < len(cu_seqlens))
        attend = attend & inside & (sequence[rows][:, None] == sequence)
    return scores, attend.expand(scores.shape)


def linear_cka(x: Tensor, y: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Linear CKA of features ``[..., N, D]`` and ``[..., N, D2]``, by its definition with N x N Gram matrices."""
    x, y = wide(x), wide(y)
    if rank is not None:
        pooled = torch.cat([x, y], -2)
        pooled = pooled - pooled.mean(-2, keepdim=True)
        basis = torch.linalg.eigh(pooled.mT @ pooled)[1][..., -rank:]
        x, y = x @ basis, y @ basis
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    k, l = x @ x.mT, y @ y.mT  # noqa: E741
    if debiased:
        k, l = (m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)) for m in (k, l))  # noqa: E741
    cross, own_x, own_y = (hsic(a, b, debiased) for a, b in ((k, l), (k, k), (l, l)))
    return torch.where((own_x > 0) & (own_y > 0), cross / (own_x * own_y).sqrt(), torch.nan)


def delta_cka(before: Tensor, after: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Distance of features: one minus their CKA."""
    return 1 - linear_cka(before, after, rank=rank, debiased=debiased)


def hsic(k: Tensor, l: Tensor, debiased: bool) -> Tensor:  # noqa: E741
    """HSIC of centred Gram matrices, times a factor of N. Debiased: HSIC_1 of Song et al. (2012), of zero diagonals."""
    inner, n = (k * l).sum((-2, -1)), k.shape[-1]
    if not debiased:
        return inner
    total = k.sum((-2, -1)) * l.sum((-2, -1)) / ((n - 1) * (n - 2))
    return inner + total - 2 / (n - 2) * (k.sum(-1) * l.sum(-1)).sum(-1)


def sum_of_squares(tensors: Sequence[Tensor], groups: Sequence[int], *, inv_scale: Tensor | None = None) -> Tensor:
    """Sum of squares of the tensors of each group, times the square of `inv_scale`."""
    total = torch.zeros(max(groups) + 1, dtype=torch.float64, device=tensors[0].device)
    for tensor, group in zip(tensors, groups, strict=True):
        total[group] += tensor.double().square().sum()
    return total if inv_scale is None else total * inv_scale.double().square()


def activation_moments(output: Tensor, input: Tensor | None = None, *, mask: Tensor | None = None) -> ActivationMoments:
    """Moments of the rows of `output` ``[..., D]``, and their distance from those of `input`, in float64."""
    rows = torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
    rows = rows if mask is None else rows & mask
    y = output.double()[rows]
    size = y.abs()
    median = size.median(-1, keepdim=True).values if size.shape[-1] else size
    massive = ((size > MASSIVE_MAGNITUDE) & (size >= MASSIVE_OF_MEDIAN * median)).sum()
    massive = torch.where(y.isnan().any(), torch.nan, massive)
    sums = [y.shape[0], y.numel(), *(y.pow(k).sum() for k in (1, 2, 3, 4)), massive]
    if input is None:
        sums += [0.0] * 5
    else:
        x = input.double()[rows]
        norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
        ratio, cosine = (y - x).norm(dim=-1) / norm_x, (x * y).sum(-1) / norm_x / norm_y
        pairs = norm_x != 0
        both = pairs & (norm_y != 0)
        sums += [x.square().sum(), pairs.sum(), ratio[pairs].sum(), both.sum(), cosine[both].sum()]
    largest = size.amax() if size.numel() else size.new_zeros(())
    return ActivationMoments(torch.stack([torch.as_tensor(s, dtype=torch.float64) for s in sums]), largest.float())


def row_stats(
    scores: Tensor, attend: Tensor, sinks: Tensor | None = None, first: Tensor | None = None
) -> AttentionStats:
    """Statistics over the attended scores of the last dimension; `sinks` is one additional column without a value.

    Without sinks, `sink` is the probability of the keys `first` ``[R]``; None: key 0.
    """
    keys = attend.sum(-1)
    broken = (attend & (scores.isnan() | (scores == INF))).any(-1)
    scores = torch.nn.functional.pad(scores.masked_fill(~attend, -INF), (1, 0), value=-INF)
    top = scores.amax(-1)
    if sinks is not None:
        scores = torch.cat([sinks.expand_as(scores[..., :1]), scores[..., 1:]], -1)
        broken = broken | (sinks.isnan() | (sinks == INF)).squeeze(-1)
    empty = (scores == -INF).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)  # any finite number: the results are replaced below

    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    if sinks is not None:
        sink = p[..., 0]
    elif first is None:
        sink = p[..., 1:2].sum(-1)
    else:
        sink = p.gather(-1, (first + 1).expand(p.shape[:-1])[..., None]).squeeze(-1)
    stats = AttentionStats(
        entropy=(p * -log_p.masked_fill(scores == -INF, 0.0)).sum(-1).masked_fill(empty, 0.0),
        lse=scores.logsumexp(-1).masked_fill(empty, -INF),
        max_logit=top.detach(),
        keys=keys.to(scores.dtype),
        collision=p.square().sum(-1).masked_fill(empty, 0.0),
        sink=sink.masked_fill(empty, 0.0),
    )
    nan = float("nan")
    return AttentionStats(*(x if name == "keys" else x.masked_fill(broken, nan) for name, x in stats._asdict().items()))


def causal(rows: Tensor, keys: int) -> Tensor:
    """Row i attends columns j <= i: aligned top-left."""
    return torch.arange(keys, device=rows.device) <= rows[:, None]


def split(mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A mask as a bias, which is added to the scores, and a bool mask of the attended positions."""
    if mask is None:
        return torch.tensor(0.0), torch.tensor(True)
    if mask.dtype == torch.bool:
        return torch.zeros((), device=mask.device), mask
    return wide(mask), ~(mask <= floor_of(mask))


def floor_of(x: Tensor) -> float:
    """Values at or below this count as -inf."""
    return torch.finfo(x.dtype).min / 2


def wide(x: Tensor) -> Tensor:
    """`x` in float64 if it is float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
