"""Gradients of entropy and the other statistics from logits."""

import pytest
import torch

from inflection_fast import attention_entropy, attention_stats
from inflection_fast.ops import reference

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

FIELDS = ("entropy", "lse", "collision", "sink")
INF = float("inf")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


def gradients(function, x, mask, fields, **options):
    x = x.detach().clone().requires_grad_()
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
    stats = function(x, attn_mask=mask, **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (getattr(stats, name) * torch.rand(stats.entropy.shape, generator=generator).to(stats.entropy.dtype)).sum()
        for name in fields
    )
    return torch.autograd.grad(loss, [t for t in (x, mask) if t is not None and t.requires_grad])


def check(budget, x, mask=None, fields=FIELDS, floor=1e-6, columns=None, **options):
    def of_columns(function):
        return function if columns is None else lambda x, **options: function(x[..., columns], **options)

    up = None if mask is None else mask.double() if mask.is_floating_point() else mask
    truth = gradients(of_columns(reference.attention_stats), x.double(), up, fields, **options)
    eager = gradients(of_columns(reference.attention_stats), x, mask, fields, **options)
    ours = gradients(of_columns(attention_stats), x, mask, fields, **options)
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert a.dtype == b.dtype
        budget(a, b, c, floor=floor * max(1.0, c.abs().max().item()))


@pytest.mark.parametrize("fields", [FIELDS, *((name,) for name in FIELDS)], ids="+".join)
@pytest.mark.parametrize("std", [0.1, 3.0, 1e3])
def test_gradient_is_that_of_the_twin(isa, budget, std, fields):
    check(budget, torch.randn(2, 5, 37) * std, fields=fields)


@pytest.mark.parametrize("level", [-1000.0, 1000.0, 30000.0])
def test_the_level_of_a_row_costs_its_gradient_no_digits(isa, budget, level):
    check(budget, torch.randn(2, 5, 37) * 3 + level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_16_bit_logits_is_rounded_once(isa, budget, dtype):
    check(budget, (torch.randn(3, 5, 37) * 3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [0.0, 300.0])
def test_gradient_of_whole_runs_of_16_bit_logits(isa, budget, dtype, level):
    x = (torch.randn(2, 6, 1040) * 3 + level).to(dtype)
    for options in ({}, {"scale": 0.088}, {"scale": -1.0}, {"is_causal": True}):
        for columns in (None, slice(1032), slice(1037), slice(1, None), slice(8)):  # on 16 bytes or beside them
            check(budget, x, columns=columns, fields=FIELDS[:3], **options)
    check(budget, x, fields=("sink",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("masked", [-float("inf"), "lowest"], ids=str)
def test_gradient_of_16_bit_logits_is_zero_where_they_are_masked(isa, budget, dtype, scale, masked):
    keep = torch.rand(9, 1040) > 0.3
    keep[3], keep[4], keep[5, :] = False, True, False
    keep[5, 700] = True
    x = torch.where(keep, torch.randn(9, 1040) * 3, 0.0).to(dtype)
    if dtype == torch.float16:
        x[0] -= 2e4  # masked ones are not far below
    x[keep[:, 0], 0] = 2.0
    truth, eager = (
        gradients(reference.attention_stats, logits, keep, ("entropy", "collision", "sink"), scale=scale)[0]
        for logits in (x.double(), x)
    )
    holes = x.masked_fill(~keep, torch.finfo(dtype).min if masked == "lowest" else masked)
    (ours,) = gradients(attention_stats, holes, None, ("entropy", "collision", "sink"), scale=scale)
    assert (ours[~keep] == 0).all() and truth[~keep].abs().max() == 0
    budget(ours, eager, truth, floor=1e-6)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": -0.3}, {"scale": 0.0}, {"scale": 3.7}], ids=str)
def test_gradient_with_options(isa, budget, options):
    check(budget, torch.randn(2, 9, 37), floor=4e-6, **options)  # a log-sum-exp of 16 is rounded by 5e-7


@pytest.mark.parametrize("shape", [(37,), (9, 37), (2, 1, 1), (9, 1)], ids=str)
def test_an_additive_mask_gets_its_gradient(isa, budget, shape):
    check(budget, torch.randn(2, 9, 37), torch.randn(shape), floor=4e-6)


def test_gradient_under_a_boolean_mask_is_zero_where_nothing_is_attended(isa, budget):
    keep = torch.rand(9, 37) > 0.5
    keep[3] = False
    x = torch.randn(2, 9, 37)
    check(budget, x, keep, fields=("entropy", "collision", "sink"))
    (grad,) = gradients(attention_stats, x, keep, ("entropy",))
    assert (grad[:, ~keep] == 0).all()


def test_gradient_of_long_and_strided_rows(isa, budget):
    check(budget, (torch.randn(2, 2100, 3) * 4).mT)
    check(budget, torch.randn(3, 4097))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", [0.0, 300.0])
def test_gradient_of_few_long_rows(isa, budget, level, dtype):
    x = torch.randn(3, 20011) * 3
    x[0, 7] = x[1, 20000] = 15.0
    x[1:] += level  # a row whose log-sum-exp is small beside two where it is large
    keep = torch.rand(20011) > 0.3
    check(budget, x.to(dtype))
    check(budget, x.to(dtype), keep)
    check(budget, x.to(dtype)[:, 1:], torch.randn(3, 20010).masked_fill(~keep[1:], -1e4))


def test_a_poisoned_row_poisons_its_own_gradient_only(isa):
    x = torch.randn(4, 37)
    x[1, 5], x[1, 6] = float("nan"), -float("inf")
    (grad,) = gradients(attention_stats, x, None, ("entropy",))
    assert grad[1, 7].isnan() and grad[1, 6] == 0 and not grad[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_reaches_attended_columns_of_its_16_bit_row_only(isa, dtype):
    x = torch.randn(5, 1040).to(dtype)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    x[3], x[1, 6], x[4, 8] = -float("inf"), -float("inf"), -float("inf")
    above = torch.tensor([1.0, 1.0, 1.0, 1.0, float("inf")])
    (grad,) = torch.autograd.grad(attention_entropy(x.requires_grad_()), x, above)
    assert grad[0].isfinite().all() and (grad[3] == 0).all()
    assert grad[1, 7].isnan() and grad[2, 0].isnan() and not grad[4, 9].isfinite()
    assert grad[1, 6] == grad[4, 8] == 0


def test_entropy_gradient_of_a_row_sums_to_zero(isa):
    (grad,) = gradients(attention_stats, torch.randn(50, 200) * 3, None, ("entropy",))
    assert grad.sum(-1).abs().max() < 1e-6 and grad.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [1, 9, 1500])
def test_sink_gradient_is_rounded_once_where_the_sink_takes_almost_all(isa, dtype, keys):
    x = torch.randn(40, keys).to(dtype)
    x[:, 0] += 12
    truth = gradients(reference.attention_stats, x.double(), None, ("sink",))[0]
    ours = gradients(attention_stats, x, None, ("sink",))[0]
    assert ((ours.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("masked", ["bool", "added", "lowest"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_infinite_gradient_makes_attended_columns_nan_and_no_others(isa, dtype, field, masked):
    x = torch.randn(3, 40).to(dtype)
    x[:, 7] = -90.0  # a probability of 0
    attended = torch.rand(3, 40) > 0.5
    attended[:, :8] = True
    options = {"bool": {"attn_mask": attended}, "added": {"attn_mask": torch.zeros(3, 40).masked_fill(~attended, -INF)}}
    x = x.masked_fill(~attended, torch.finfo(dtype).min) if masked == "lowest" else x
    x.requires_grad_()
    stats = attention_stats(x, **options.get(masked, {}))
    (grad,) = torch.autograd.grad((getattr(stats, field) * torch.tensor([1.0, INF, 1.0])).sum(), x)
    assert torch.equal(grad[1].isnan(), attended[1]) and (grad[1][~attended[1]] == 0).all()
    assert grad[0].isfinite().all() and grad[2].isfinite().all()


def test_forward_mode_is_refused_with_what_to_do():
    x = torch.randn(3, 5)
    for function in (lambda x: attention_entropy(x), lambda x: attention_stats(torch.zeros(3, 5), attn_mask=x).lse):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_maximum_and_keys_are_not_differentiable():
    stats = attention_stats(torch.randn(3, 4, requires_grad=True))
    assert [x.requires_grad for x in stats] == [True, True, False, False, True, True]


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(attention_entropy(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        grad.sum().backward()


@pytest.mark.parametrize("entropy_only", [False, True])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_opcheck(kind, entropy_only):
    x = torch.randn(2, 5, 7, requires_grad=True)
    mask = {"none": None, "boolean": torch.rand(5, 7) > 0.3, "additive": torch.randn(5, 7, requires_grad=True)}[kind]
    torch.library.opcheck(torch.ops.inflection_fast.attention_stats, (x, mask, True, 0.5, entropy_only))


def test_compiled_in_one_graph_for_two_shapes():
    def loss(function, x, mask):
        stats = function(x * 2, attn_mask=mask)
        return (stats.entropy + stats.sink).sum()

    compiled = torch.compile(lambda x, m: loss(attention_stats, x, m), fullgraph=True, backend="aot_eager")
    for shape in ((2, 5, 7), (3, 6, 9)):
        x, mask = torch.randn(shape, requires_grad=True), torch.randn(shape[-1])
        ours, twin = compiled(x, mask), loss(reference.attention_stats, x, mask)
        assert torch.allclose(ours, twin, atol=1e-5)
        for a, b in zip(torch.autograd.grad(ours, x), torch.autograd.grad(twin, x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_compiled_in_one_graph_for_numbers_that_change():
    compiled = torch.compile(lambda x, scale: attention_entropy(x, scale=scale), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7)
    for scale in (0.5, 0.25, 0.125):  # the second value compiles again, for any scale
        assert torch.equal(compiled(x, scale), attention_entropy(x, scale=scale))
