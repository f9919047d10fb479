"""Float64 truths, written from the definitions and nothing else."""

import math

import torch

INF = float("inf")
FIELDS = ("entropy", "lse", "max_logit", "keys", "collision", "sink")


def attendable(shape, *, attn_mask=None, is_causal=False, window=None):
    """Which of [..., Tq, Tk] take part, and what an additive mask adds to them."""
    Tq, Tk = shape[-2:]
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)[None, :]
    allowed = torch.ones(Tq, Tk, dtype=torch.bool)
    if is_causal:
        allowed = allowed & (j <= i)
    if window is not None:
        allowed = allowed & (j >= i - window[0]) & (j <= i + window[1])
    allowed, bias = allowed.expand(shape), None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        else:
            allowed = allowed & (attn_mask > torch.finfo(attn_mask.dtype).min / 2)
            bias = attn_mask.double().masked_fill(~allowed, 0.0)
    return allowed, bias


def stats_of(scores, allowed, sinks=None, dtype=torch.float64):
    """The six numbers of each row of `scores` [..., Tq, Tk]; `sinks` [H] is one more column that is no key."""
    scores = scores.to(dtype).masked_fill(~allowed, -INF)
    columns = scores
    if sinks is not None:
        extra = sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        columns = torch.cat([scores, extra], dim=-1)
    keys = allowed.sum(-1)
    alive = (columns != -INF).any(-1, keepdim=True)
    safe = torch.where(alive, columns, torch.zeros_like(columns))
    log_p = safe - torch.logsumexp(safe, -1, keepdim=True)
    p = log_p.exp() * alive
    log_p = torch.where(p > 0, log_p, torch.zeros_like(log_p))
    lse = torch.where(alive[..., 0], torch.logsumexp(safe, -1), torch.full_like(safe[..., 0], -INF))
    sink = p[..., -1] if sinks is not None else (p[..., 0] if p.shape[-1] else torch.zeros_like(lse))
    return {
        "entropy": -(p * log_p).sum(-1),
        "lse": lse,
        "max_logit": scores.amax(-1) if scores.shape[-1] else torch.full_like(lse, -INF),
        "keys": keys.to(dtype),
        "collision": (p * p).sum(-1),
        "sink": sink,
        "p": p,
    }


def logits_stats(logits, *, attn_mask=None, is_causal=False, scale=1.0, window=None, dtype=torch.float64):
    allowed, bias = attendable(logits.shape, attn_mask=attn_mask, is_causal=is_causal, window=window)
    scores = logits.to(dtype) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    return stats_of(scores, allowed, dtype=dtype)


def qk_stats(
    query,
    key,
    *,
    attn_mask=None,
    is_causal=False,
    scale=None,
    window=None,
    softcap=None,
    sinks=None,
    rows=None,
    dtype=torch.float64,
):
    """Scores by plain products in `dtype`, every head of the keys repeated for its group of queries."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed, bias = attendable(scores.shape, attn_mask=attn_mask, is_causal=is_causal, window=window)
    if bias is not None:
        scores = scores + bias.to(dtype)
    out = stats_of(scores, allowed, sinks, dtype)
    return (
        out
        if rows is None
        else {name: value[..., rows, :] if name == "p" else value[..., rows] for name, value in out.items()}
    )


def zhai_lower_bound(sigma, T):
    """Smallest entropy of a row of T scores whose l2 norm is at most sigma."""
    beta = math.exp(-sigma * math.sqrt(T / (T - 1)))
    return math.log1p((T - 1) * beta) + sigma * math.sqrt(T * (T - 1)) * beta / (1 + (T - 1) * beta)


def hsic_1(K, L):
    """The unbiased estimator of Song et al. (2012), from two n x n Gram matrices."""
    n = K.shape[-1]
    K, L = K - torch.diag_embed(K.diagonal(dim1=-2, dim2=-1)), L - torch.diag_embed(L.diagonal(dim1=-2, dim2=-1))
    trace = (K * L).sum((-2, -1))
    sums = K.sum((-2, -1)) * L.sum((-2, -1)) / ((n - 1) * (n - 2))
    cross = (K.sum(-1) * L.sum(-1)).sum(-1) * 2 / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def cka(x, y, *, rank=None, debiased=True):
    """Linear CKA of [..., N, D] twice; with `rank`, in the leading eigenvectors of the pooled scatter."""
    x, y = x.double(), y.double()
    if rank is not None:
        pooled = torch.cat([x, y], -2)
        pooled = pooled - pooled.mean(-2, keepdim=True)
        basis = torch.linalg.eigh(pooled.mT @ pooled)[1][..., -rank:]
        x, y = x @ basis, y @ basis
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    if debiased:
        K, L = x @ x.mT, y @ y.mT
        return hsic_1(K, L) / torch.sqrt(hsic_1(K, K) * hsic_1(L, L))
    cross, own_x, own_y = x.mT @ y, x.mT @ x, y.mT @ y
    return cross.square().sum((-2, -1)) / (own_x.norm(dim=(-2, -1)) * own_y.norm(dim=(-2, -1)))


def worst(actual, expected):
    """Largest absolute error where both are finite; infinite where they disagree about what is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = torch.isfinite(expected)
    same = (actual[~finite] == expected[~finite]) | (actual[~finite].isnan() & expected[~finite].isnan())
    if not bool(same.all()) or not bool(torch.isfinite(actual[finite]).all()):
        return INF
    return (actual[finite] - expected[finite]).abs().max().item() if bool(finite.any()) else 0.0
