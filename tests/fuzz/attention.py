"""Random attention: statistics and column masses against float64, each number within what rounding of scores allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inflection_fast import attention_column_mass, attention_stats, attention_stats_qk
from inflection_fast.ops import AttentionStats, reference

from .draw import DTYPES, Draw, widened

EPS = 2.0**-23  # of float32
FLOOR = 3e-6  # what an entropy or a probability errs by where scores are exact
LINEAR = 0.05  # errors of scores up to here change a row by their derivative; beyond only what always holds is checked
LARGEST = 3.0e38  # scores beyond are no floats
NOISE = 1e-37  # of a product that underflows


def wrong(name: str, bad: Tensor, *numbers: Tensor) -> None:
    """Fail where `bad` is true anywhere, with the numbers of the first place."""
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        values = ", ".join(f"{float(x.expand(bad.shape)[place]):.9g}" for x in numbers)
        raise AssertionError(f"{name} at {place}: {values} (ours, truth, allowed)")


def check_rows(
    ours: AttentionStats,
    scores: Tensor,
    attend: Tensor,
    error: Tensor,
    sinks: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """All statistics of rows whose float64 `scores` a float32 computation knows to `error` each.

    `first` as for `reference.row_stats`: the key that `sink` is of, by row; None: key 0.
    """
    truth = reference.row_stats(scores, attend, sinks, first)
    for name, got, exact in zip(ours._fields, ours, truth, strict=True):
        assert got.shape == exact.shape and got.dtype == torch.float32, (name, got.shape, exact.shape)
    # Rows with a score that float32 cannot hold are not defined.
    beyond = (attend & (scores.abs() > LARGEST) & scores.isfinite()).any(-1)
    if sinks is not None:
        beyond = beyond | (sinks.abs() > LARGEST).squeeze(-1)
    wrong("keys", (ours.keys != truth.keys) & ~beyond, ours.keys, truth.keys, truth.keys * 0)
    nan = truth.entropy.isnan() & ~beyond
    for name, got, exact in zip(ours._fields, ours, truth, strict=True):
        if name != "keys":
            wrong(f"NaN of {name}", (got.isnan() != nan) & ~beyond, got, exact, exact * 0)
    good = ~truth.entropy.isnan() & ~beyond
    columns, known = scores.masked_fill(~attend, -math.inf), torch.where(attend & scores.isfinite(), error, 0.0)
    if sinks is not None:
        columns = torch.cat([sinks.expand(*columns.shape[:-1], 1), columns], -1)
        known = torch.nn.functional.pad(known, (1, 0))
    if not columns.shape[-1]:
        wrong("empty rows", ours.entropy != 0, ours.entropy, truth.entropy, truth.entropy * 0)
        return
    lse = columns.logsumexp(-1)
    p = (columns - lse[..., None]).exp().nan_to_num(0.0)
    log_p = (columns - lse[..., None]).masked_fill(p == 0, 0.0)
    entropy, collision = truth.entropy[..., None], truth.collision[..., None]
    at = torch.zeros(p.shape[-2], dtype=torch.int64) if first is None or sinks is not None else first
    is_first = torch.arange(p.shape[-1]) == at[:, None]
    largest = known.amax(-1)
    allowed = {
        "entropy": (p * (log_p + entropy).abs() * known).sum(-1) * 2 + FLOOR * (1 + truth.entropy) + largest.square(),
        "lse": largest * 1.1 + EPS * lse.abs() + FLOOR,
        "max_logit": largest * 1.1 + EPS * truth.max_logit.abs() + 1e-36,
        "collision": (2 * p * (p - collision).abs() * known).sum(-1) * 2 + FLOOR + largest.square(),
        "sink": (truth.sink[..., None] * (is_first.double() - p).abs() * known).sum(-1) * 2 + FLOOR + largest.square(),
    }
    for name, limit in allowed.items():
        got, exact = getattr(ours, name).double(), getattr(truth, name)
        linear = (largest <= LINEAR) | torch.tensor(name in ("lse", "max_logit"))
        off = good & linear & ~((got == exact) | ((got - exact).abs() <= limit))
        wrong(name, off, got, exact, limit)
    most = (truth.keys + (sinks is not None)).clamp(min=1).log() + 1e-5
    wrong("entropy's range", good & ~((ours.entropy >= 0) & (ours.entropy <= most)), ours.entropy, truth.entropy, most)
    for name in ("collision", "sink"):
        got = getattr(ours, name)
        wrong(f"{name}'s range", good & ~((got >= 0) & (got <= 1)), got, getattr(truth, name), most)


def logits(draw: Draw) -> None:
    """`attention_stats` of logits."""
    lead = [draw.size(3, 0.01) for _ in range(draw.whole(0, 2))]
    shape = [*lead, draw.size(40), draw.size(1100)]
    poison = draw.chance(0.15)
    dtype, size = draw.one(DTYPES), draw.magnitude()
    x = draw.expanded(shape, lambda own: draw.values(own, dtype, size, poison))
    scale = 1.0 if draw.chance(0.4) else draw.number(-5 if size > 1 else -30, 5 if size > 1 else 30)
    mask, causal = draw.mask(shape, poison and draw.chance(0.3)), draw.chance(0.3)
    ours = attention_stats(x, attn_mask=mask, is_causal=causal, scale=scale)
    wide = widened(x)
    bias, allowed = reference.split(widened(mask))
    attend = ~(wide == -math.inf)
    if causal:
        attend = attend & reference.causal(torch.arange(shape[-2]), shape[-1])
    product = wide * scale
    scores = product + bias
    broken = (wide == math.inf) | ((product.abs() > LARGEST) & product.isfinite() & (bias == -math.inf))
    scores = scores.masked_fill(broken, math.inf)
    exact = scale == 1.0 and (mask is None or mask.dtype == torch.bool)
    error = torch.zeros_like(scores) if exact else EPS * (product.abs() + scores.abs()) + NOISE
    check_rows(ours, scores, (attend & allowed).expand(scores.shape), error.nan_to_num(0.0, 0.0, 0.0))


def qk_case(draw: Draw) -> tuple[Tensor, Tensor, dict]:
    """Queries, keys and options of the operators on them."""
    poison = draw.chance(0.1)
    batch, kv_heads, group = draw.size(3, 0.01), draw.one((1, 1, 2, 3)), draw.one((1, 1, 2, 4))
    depths = (1, 2, 3, 5, 8, 16, 17, 24, 32, 33, 64, 65, 80, 128, 256)
    queries, depth = draw.size(129), draw.one([depth for depth in depths if depth <= draw.most])
    packed = draw.chance(0.15)
    keys = queries if packed else draw.size(1100)
    dtype = draw.one(DTYPES)
    size, other = draw.magnitude(-14, 14), draw.magnitude(-14, 14)
    heads = kv_heads * group
    query = draw.expanded([batch, heads, queries, depth], lambda own: draw.values(own, dtype, size, poison))
    key = draw.expanded([batch, kv_heads, keys, depth], lambda own: draw.values(own, dtype, other, poison))
    options: dict = {
        "attn_mask": draw.mask([batch, heads, queries, keys], poison and draw.chance(0.3)),
        "is_causal": draw.chance(0.3),
        "scale": None if draw.chance(0.5) else draw.number(-6, 6),
    }
    if draw.chance(0.2):
        bound = lambda: draw.one((None, -1, 0, 1, 5, 70, 2**40, 2**62))  # noqa: E731
        options["window"] = (bound(), bound())
    if draw.chance(0.2):
        options["softcap"] = draw.magnitude(-3, 6)
    if draw.chance(0.3) and queries:
        count = draw.size(70)
        options["rows"] = torch.randint(queries, (count,), generator=draw.generator)
    if packed and queries:
        cuts = sorted(draw.whole(0, queries) for _ in range(draw.whole(2, 6)))
        options["cu_seqlens"] = torch.tensor(cuts, dtype=draw.one((torch.int32, torch.int64)))
    return query, key, options


def qk_scores(query: Tensor, key: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in float64, which are attended, and by how much float32 sums may miss each."""
    given = {name: options.get(name) for name in ("attn_mask", "is_causal", "scale", "window", "softcap", "rows")}
    given["attn_mask"] = widened(given["attn_mask"])
    given["window"] = tuple(-1 if b is None else b for b in given["window"]) if given["window"] else None
    cu_seqlens = options.get("cu_seqlens")
    scores, attend = reference.qk_scores(query.double(), key.double(), *given.values(), cu_seqlens)
    bare = {**given, "attn_mask": None, "softcap": None, "scale": 1.0}
    sizes = reference.qk_scores(query.double().abs(), key.double().abs(), *bare.values(), cu_seqlens)[0]
    depth = query.shape[-1]
    scale = depth**-0.5 if given["scale"] is None else given["scale"]
    products = reference.qk_scores(query.double(), key.double(), *{**bare, "scale": scale}.values(), cu_seqlens)[0]
    error = EPS * (2 * depth**0.5 + 4) * sizes * abs(scale) + EPS * 2 * products.abs()
    if given["softcap"]:
        capped = given["softcap"] * torch.tanh(products / given["softcap"])
        slope = 1 - torch.tanh((products.abs() - error).clamp(min=0) / given["softcap"]).square()
        error = torch.minimum(error, error * slope * 1.5) + 8 * EPS * capped.abs()
    error = error + EPS * scores.abs() + NOISE * max(1.0, abs(scale)) * depth
    # Sums that leave float32 on the way have no score.
    # So have sums beside an infinite feature, and infinite products under a softcap, which would make them numbers.
    numbers = [x.double().abs().nan_to_num(0.0, 0.0, 0.0) for x in (query, key)]
    beyond = reference.qk_scores(*numbers, *bare.values(), cu_seqlens)[0] > LARGEST
    if given["softcap"]:
        beyond = beyond | sizes.isinf()
    scores = torch.where(beyond, torch.finfo(torch.float64).max, scores)
    scores = torch.where((products.abs() > LARGEST) & products.isfinite(), torch.finfo(torch.float64).max, scores)
    return scores, attend, error.nan_to_num(0.0, 0.0, 0.0)


def qk(draw: Draw) -> None:
    """`attention_stats_qk`."""
    query, key, options = qk_case(draw)
    sinks = None
    if draw.chance(0.2):
        sinks = draw.values([query.shape[1]], draw.one(DTYPES), draw.magnitude(-5, 5), draw.chance(0.05))
    ours = attention_stats_qk(query, key, sinks=sinks, **options)
    scores, attend, error = qk_scores(query, key, options)
    cuts, rows, first = options.get("cu_seqlens"), options.get("rows"), None
    if cuts is not None:
        position = torch.arange(query.shape[2]) if rows is None else rows
        first = torch.where(cuts <= position[:, None], cuts, 0).amax(-1).long()
    check_rows(ours, scores, attend, error, None if sinks is None else sinks.double()[:, None, None], first)


def column_mass(draw: Draw) -> None:
    """`attention_column_mass` of the rows that `attention_stats_qk` gives."""
    query, key, options = qk_case(draw)
    lse = attention_stats_qk(query, key, **options).lse
    mass, squares = attention_column_mass(query, key, lse, **options)
    scores, attend, error = qk_scores(query, key, options)
    beyond = (attend & (scores.abs() > LARGEST) & scores.isfinite()).any()
    if beyond or not scores.numel():
        return
    counts = attend & (scores != -math.inf) & (lse != -math.inf)[..., None]
    p = (scores - lse.double()[..., None]).exp().clamp(max=1.0).masked_fill(~counts, 0.0)
    known = error + EPS * (scores.abs() + lse.double().abs()[..., None])
    apart = scores - lse.double()[..., None]
    most, least = ((apart + known).clamp(max=0.0).exp(), (apart - known).clamp(max=0.0).exp())
    off = torch.maximum(most - p, p - least).masked_fill(~counts, 0.0).nan_to_num(0.0) + 1e-6 * p.nan_to_num(0.0)
    for name, got, exact, limit in (
        ("mass", mass, p.sum(-2), off.sum(-2)),
        ("squares", squares, p.square().sum(-2), (2 * off).sum(-2)),
    ):
        limit = limit + 1e-6 + 2e-6 * exact.nan_to_num(0.0)
        same = (got.isnan() & exact.isnan()) | (got == exact) | ((got - exact).abs() <= limit)
        wrong(name, ~same, got, exact, limit)


def gradients(draw: Draw) -> None:
    """Derivatives of both operators where float32 can follow: at most four times as wrong as plain PyTorch."""
    from_logits = draw.chance(0.4)
    dtype = draw.one(DTYPES)
    fields = [name for name in ("entropy", "lse", "collision", "sink") if draw.chance(0.5)] or ["entropy"]
    if from_logits:
        shape = [draw.size(3, 0), draw.size(24), draw.size(300)]
        leaves = [draw.expanded(shape, lambda own: draw.values(own, dtype, draw.one((0.1, 1.0, 5.0))))]
        leaves = [x.clamp(min=torch.finfo(dtype).min / 4) for x in leaves]  # what is lower is masked, not a score
        options: dict = {"attn_mask": draw.mask(shape, False), "is_causal": draw.chance(0.3)}
        operators = attention_stats, reference.attention_stats
    else:
        query, key, options = qk_case(draw)
        size = draw.one((0.1, 0.5, 1.0))
        leaves = [(x.double().nan_to_num(0.0, 1.0, -1.0).clamp(-3, 3) * size).to(dtype) for x in (query, key)]
        if options["scale"] is not None:
            options["scale"] = max(-3.0, min(3.0, options["scale"]))
        if options.get("window"):
            options["window"] = tuple(-1 if bound is None else bound for bound in options["window"])
        operators = attention_stats_qk, reference.attention_stats_qk
    mask = options["attn_mask"]
    if mask is not None and mask.is_floating_point():
        finite = mask.nan_to_num(0.0, 0.0).clamp(min=torch.finfo(mask.dtype).min)
        options["attn_mask"] = torch.where(widened(mask) == -math.inf, mask, finite.clamp(-10, 10))
    weights: list[Tensor] = []

    def derivative(operator, dtype) -> list[Tensor]:
        own = [x.detach().to(dtype).requires_grad_() if dtype else x.detach().requires_grad_() for x in leaves]
        given = dict(options)
        if dtype == torch.float64:
            given["attn_mask"] = widened(given["attn_mask"])
        stats = operator(*own, **given)
        if not weights:
            weights.extend(draw.normal(*getattr(stats, name).shape) for name in fields)
        total = sum((getattr(stats, n).masked_fill(stats.keys == 0, 0.0) * w.to(getattr(stats, n).dtype)).sum()
                    for n, w in zip(fields, weights, strict=True))  # fmt: skip
        return list(torch.autograd.grad(total, own))

    ours = derivative(operators[0], None)
    exact = derivative(operators[1], torch.float64)
    eager = derivative(operators[1], torch.float32)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    # A row of one key has a derivative of 0 in plain PyTorch without any rounding. Here scores of queries and keys are
    # rounded twice, probabilities once, and the log-sum-exp of logits is a float where it is at most 16.
    heaviest = max((float(w.abs().max()) for w in weights if w.numel()), default=0.0)
    reach = [8.0 * heaviest, 0.0]
    if not from_logits and leaves[0].numel() and leaves[1].numel():
        depth, sizes = leaves[0].shape[-1], [float(x.detach().abs().max()) for x in leaves]
        scale = abs(depth**-0.5 if options["scale"] is None else options["scale"])
        score = sizes[0] * sizes[1] * scale * depth**0.5
        terms = leaves[1].shape[2], leaves[0].shape[1:3].numel()
        reach = [(1 + score) * scale * sizes[1 - i] * heaviest * terms[i] ** 0.5 for i in (0, 1)]
    for index, (got, truth, plain) in enumerate(zip(ours, exact, eager, strict=True)):
        assert got.shape == truth.shape and got.dtype == dtype
        if not truth.numel():
            continue
        limit = 4 * (plain.double() - truth).abs().max() + 2e-5 * truth.abs().max() + rounding * truth.abs()
        limit = limit + (1e-6 if dtype != torch.float16 else 1e-5) + 16 * EPS * reach[index]
        wrong(f"derivative {index}", ~((got.double() - truth).abs() <= limit), got, truth, limit)
