"""Gradients against float64 autograd, compilation, opcheck, and what a call may not do to its inputs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from truth import INF, logits_stats, qk_stats, worst

from inflection_fast import attention_entropy, attention_entropy_qk, attention_stats, attention_stats_qk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 1e-5


def leaf(x, dtype=None):
    return x.detach().clone().to(dtype or x.dtype).requires_grad_()


def gradients(function, inputs, weight):
    """The gradients of a weighted sum of the result, as a training loss would ask for them."""
    out = function(*inputs)
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)


def assert_gradients(ours, truth, eager, inputs):
    weight = torch.randn(truth(*inputs).shape)
    got = gradients(ours, [leaf(x) for x in inputs], weight)
    exact = gradients(truth, [leaf(x, torch.float64) for x in inputs], weight)
    rough = gradients(eager, [leaf(x, torch.float32) for x in inputs], weight)
    for x, g, e, r in zip(inputs, got, exact, rough, strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
        size = e.abs().max().item()
        rounding = torch.finfo(x.dtype).eps * size if x.dtype != torch.float32 else 0.0
        allowed = 2 * worst(r, e) + rounding + FLOOR * max(size, 1.0)
        assert worst(g, e) <= allowed, f"gradient error {worst(g, e):.2e} > {allowed:.2e}"
        assert size > 0


LOGITS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": "bool"},
    "additive": {"attn_mask": "additive"},
    "scaled": {"scale": 0.3},
    "causal additive scaled": {"is_causal": True, "attn_mask": "additive", "scale": 2.0},
}


def with_mask(options, Tq, Tk):
    options = dict(options)
    keep = torch.rand(Tq, Tk) < 0.6
    keep[1] = False
    if options.get("attn_mask") == "bool":
        options["attn_mask"] = keep
    elif options.get("attn_mask") == "additive":
        options["attn_mask"] = torch.randn(Tq, Tk).masked_fill(~keep, -INF)
    return options


@pytest.mark.parametrize("sharp", [0.05, 3.0, 20.0])
@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_logits_equals_autograd(dtype, options, sharp):
    x, options = (torch.randn(2, 3, 9, 21) * sharp).to(dtype), with_mask(options, 9, 21)
    assert_gradients(
        lambda s: attention_entropy(s, **options),
        lambda s: logits_stats(s, **options)["entropy"],
        lambda s: logits_stats(s, dtype=torch.float32, **options)["entropy"],
        [x],
    )


QK = {
    **{name: options for name, options in LOGITS.items() if name != "scaled"},
    "window": {"window": (3, 1)},
    "causal window": {"window": (4, 0), "is_causal": True},
    "softcap": {"softcap": 2.0},
    "softcap additive": {"softcap": 4.0, "attn_mask": "additive"},
    "sinks": {"sinks": True},
    "rows": {"rows": [7, 2, 2]},
    "rows causal bool": {"rows": [8, 1, 5], "is_causal": True, "attn_mask": "bool"},
}


@pytest.mark.parametrize("options", QK.values(), ids=QK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_q_and_k_equals_autograd(dtype, options):
    options = with_mask(options, 9, 21)
    if "rows" in options:
        options["rows"] = torch.tensor(options["rows"])
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.0, 1.0, -1.0, 2.0])
    q, k = (torch.randn(2, 4, 9, 16) * 1.5).to(dtype), (torch.randn(2, 2, 21, 16) * 1.5).to(dtype)
    assert_gradients(
        lambda q, k: attention_entropy_qk(q, k, **options),
        lambda q, k: qk_stats(q, k, **options)["entropy"],
        lambda q, k: qk_stats(q, k, dtype=torch.float32, **options)["entropy"],
        [q, k],
    )


@pytest.mark.parametrize("shape", [(1, 2, 2, 70, 130, 64), (1, 2, 1, 130, 33, 8), (1, 1, 1, 1, 1, 4)], ids=str)
def test_gradient_of_shapes_beyond_one_tile_equals_autograd(shape):
    B, H, Hkv, Tq, Tk, D = shape
    q, k = torch.randn(B, H, Tq, D), torch.randn(B, Hkv, Tk, D)
    weight = torch.randn(B, H, Tq)
    got = gradients(lambda q, k: attention_entropy_qk(q, k, is_causal=True), [leaf(q), leaf(k)], weight)
    exact = gradients(
        lambda q, k: qk_stats(q, k, is_causal=True)["entropy"], [leaf(q, torch.float64), leaf(k, torch.float64)], weight
    )
    for g, e in zip(got, exact, strict=True):
        assert worst(g, e) <= FLOOR * max(1.0, e.abs().max().item())


def test_gradient_of_each_row_sums_to_zero():
    x = leaf(torch.randn(40, 333) * 4)
    (g,) = torch.autograd.grad(attention_entropy(x).sum(), [x])
    assert g.sum(-1).abs().max() < 1e-5 and g.abs().max() > 1e-2


def test_gradient_of_a_strided_input_equals_that_of_its_copy():
    x = torch.randn(12, 50)
    (strided,) = gradients(lambda s: attention_entropy(s.transpose(0, 1)), [leaf(x)], torch.ones(50))
    (dense,) = gradients(attention_entropy, [leaf(x.transpose(0, 1).contiguous())], torch.ones(50))
    assert torch.allclose(strided.transpose(0, 1), dense, rtol=0, atol=2e-6)


def test_keyless_rows_have_zero_gradient_and_poisoned_rows_only_their_own():
    x = torch.randn(4, 6)
    x[3, 2] = float("nan")
    x, mask = x.requires_grad_(), torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    (g,) = torch.autograd.grad(attention_entropy(x, attn_mask=mask).sum(), [x])
    assert not g[1].any() and torch.isfinite(g[:3]).all() and g[3].isnan().any()


@pytest.mark.parametrize("field", ["lse", "max_logit", "keys", "collision", "sink", "entropy"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_field_of_stats_is_differentiated_rightly_or_not_at_all(fused, field):
    q, k = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 11, 8)
    inputs = [q, k] if fused else [q @ k.mT]
    ours = attention_stats_qk if fused else attention_stats
    truth = qk_stats if fused else logits_stats
    leaves = [leaf(x) for x in inputs]
    value = getattr(ours(*leaves), field)
    if not value.requires_grad:
        assert field != "entropy"
        return
    weight = torch.randn(value.shape)
    got = torch.autograd.grad((value * weight).sum(), leaves)
    exact = gradients(lambda *s: truth(*s)[field], [leaf(x, torch.float64) for x in inputs], weight)
    for g, e in zip(got, exact, strict=True):
        assert worst(g, e) <= FLOOR * max(1.0, e.abs().max().item())


@pytest.mark.parametrize("which", ["attn_mask", "sinks"])
def test_a_mask_or_sinks_that_want_a_gradient_get_it_or_are_refused(which):
    q, k, weight = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 7)
    learned = torch.randn(7, 11) if which == "attn_mask" else torch.randn(2)
    try:
        (got,) = gradients(lambda m: attention_entropy_qk(q, k, **{which: m}), [leaf(learned)], weight)
    except (TypeError, ValueError, NotImplementedError) as refused:
        assert which in str(refused)
        return
    (exact,) = gradients(lambda m: qk_stats(q, k, **{which: m})["entropy"], [leaf(learned, torch.float64)], weight)
    assert worst(got, exact) <= FLOOR


CALLS = {
    "entropy": (attention_entropy, lambda: [torch.randn(2, 3, 9, 21)]),
    "stats": (attention_stats, lambda: [torch.randn(2, 3, 9, 21)]),
    "entropy_qk": (attention_entropy_qk, lambda: [torch.randn(1, 4, 9, 16), torch.randn(1, 2, 21, 16)]),
    "stats_qk": (attention_stats_qk, lambda: [torch.randn(1, 4, 9, 16), torch.randn(1, 2, 21, 16)]),
}


def summed(out):
    return out if isinstance(out, torch.Tensor) else out.entropy


@pytest.mark.parametrize("name, backend", [("entropy", "inductor"), ("stats_qk", "aot_eager")])
def test_compiled_in_one_graph_gives_the_same_numbers_and_gradients(name, backend):
    function, make = CALLS[name]
    # inductor compiles C++, so once for both lengths
    settings = {"fullgraph": True, "backend": backend, "dynamic": True if backend == "inductor" else None}
    compiled = torch.compile(lambda *xs: summed(function(*xs, is_causal=True)) * 2.0, **settings)
    for cut in (0, 2):
        inputs = [leaf(x[..., cut:, :]) for x in make()]
        for _ in range(2):
            assert torch.allclose(compiled(*inputs), summed(function(*inputs, is_causal=True)) * 2.0, atol=1e-6)
        got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        exact = torch.autograd.grad((summed(function(*inputs, is_causal=True)) * 2.0).sum(), inputs)
        for g, e in zip(got, exact, strict=True):
            assert torch.allclose(g, e, atol=1e-5)


class Recorded(TorchDispatchMode):
    """Every operator of ours that a call reaches, with its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "prim", "prims", "profiler"):
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_passes_for_every_operator_reached(name, masked):
    function, make = CALLS[name]
    inputs = [leaf(x) for x in make()]
    options = {"attn_mask": torch.rand(9, 21) < 0.7, "is_causal": True} if masked else {}
    with Recorded() as recorded:
        summed(function(*inputs, **options)).sum().backward()
    assert len(recorded.seen) >= 2, "one operator forward and one backward at least"
    for func, args, kwargs in recorded.seen:
        args = [leaf(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        if "backward" in func.name():
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(func, tuple(args), kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_no_input_is_changed_and_none_is_returned(name):
    function, make = CALLS[name]
    inputs = [x.requires_grad_() for x in make()]
    mask, sinks = torch.randn(9, 21), torch.randn(4)
    options = {"attn_mask": mask} | ({"sinks": sinks} if "qk" in name else {})
    before = [x.detach().clone() for x in (*inputs, mask, sinks)]
    out = function(*inputs, **options)
    summed(out).sum().backward()
    for x, was in zip((*inputs, mask, sinks), before, strict=True):
        assert torch.equal(x, was)
    pointers = {x.data_ptr() for x in inputs}
    for value in [out] if isinstance(out, torch.Tensor) else [getattr(out, f) for f in ("entropy", "lse", "sink")]:
        assert value.data_ptr() not in pointers


def allocated(function):
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = trace.key_averages()
    copies = [e.key for e in events if e.key in ("aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy")]
    return sum(max(e.self_cpu_memory_usage, 0) for e in events), copies


def test_no_copy_is_made_of_a_transposed_view_and_no_square_block_is_kept():
    B, H, T, D = 2, 4, 512, 64
    q, k = (torch.randn(B, T, H, D).transpose(1, 2) for _ in range(2))
    mask = (torch.rand(B, 1, 1, T) < 0.9).expand(B, H, T, T)
    for call in (
        lambda: attention_entropy_qk(q, k, is_causal=True),
        lambda: attention_stats_qk(q, k, attn_mask=mask),
        lambda: attention_entropy(q.transpose(-1, -2)),
    ):
        used, copies = allocated(call)
        assert not copies
        assert used <= 12 * 4 * B * H * T, f"{used} bytes for {B * H * T} rows"


def test_the_copy_detector_sees_a_copy():
    q = torch.randn(2, 512, 4, 64).transpose(1, 2)
    used, copies = allocated(lambda: attention_entropy_qk(q.contiguous(), q))
    assert copies and used > q.numel() * 4


def test_the_backward_pass_keeps_no_square_block():
    B, H, T, D = 1, 2, 1024, 16
    q, k = torch.randn(B, H, T, D, requires_grad=True), torch.randn(B, H, T, D, requires_grad=True)
    used, _ = allocated(lambda: torch.autograd.grad(attention_entropy_qk(q, k).sum(), [q, k]))
    assert used < B * H * T * T * 4 / 4
