"""Odd but legal uses of the entropy operators."""

import pytest
import torch
from truth import FIELDS, INF, logits_stats, qk_stats, worst

from inflection_fast import attention_entropy, attention_entropy_qk, attention_stats, attention_stats_qk


def assert_qk(q, k, **options):
    truth, eager = qk_stats(q, k, **options), qk_stats(q, k, dtype=torch.float32, **options)
    got = attention_stats_qk(q, k, **options)
    for name in FIELDS:
        error = worst(getattr(got, name), truth[name])
        assert error <= 2 * worst(eager[name], truth[name]) + 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("D", [1, 3, 17, 96, 100, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_head_size_equals_the_truth(dtype, D):
    assert_qk(torch.randn(1, 2, 19, D).to(dtype), torch.randn(1, 2, 41, D).to(dtype), is_causal=True)


@pytest.mark.parametrize("Tk", [1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 511, 513])
def test_every_tail_of_keys_equals_the_truth(Tk):
    for Tq in (1, 5, 17):
        assert_qk(torch.randn(1, 1, Tq, 8), torch.randn(1, 1, Tk, 8) * 3)
        x = torch.randn(Tq, Tk) * 4
        assert worst(attention_entropy(x), logits_stats(x)["entropy"]) <= 2e-6


@pytest.mark.parametrize("layout", ["transposed", "sliced", "row of a larger mask", "expanded heads"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_any_stride_are_read_as_they_are(additive, layout):
    q, k = torch.randn(2, 4, 13, 8), torch.randn(2, 4, 29, 8)
    keep = {
        "transposed": torch.rand(2, 1, 29, 13).mT < 0.6,
        "sliced": (torch.rand(2, 1, 26, 58) < 0.6)[..., ::2, 1::2],
        "row of a larger mask": (torch.rand(2, 1, 64, 64) < 0.6)[..., 5:18, 9:38],
        "expanded heads": (torch.rand(2, 4, 1, 29) < 0.6).expand(2, 4, 13, 29),
    }[layout]
    mask = torch.randn(1).expand(keep.shape).masked_fill(~keep, -INF) if additive else keep
    if layout != "expanded heads" and additive:
        mask = mask.mT.contiguous().mT
    assert_qk(q, k, attn_mask=mask)
    logits = torch.randn(2, 4, 13, 29)
    assert worst(attention_entropy(logits, attn_mask=mask), logits_stats(logits, attn_mask=mask)["entropy"]) <= 4e-6


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_a_poisoned_additive_mask_poisons_its_row_only(poison):
    mask = torch.zeros(6, 9)
    mask[4, 2] = poison
    expected = [False] * 4 + [True, False]
    assert attention_entropy(torch.randn(6, 9), attn_mask=mask).isnan().tolist() == expected
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 9, 8)
    assert attention_entropy_qk(q, k, attn_mask=mask)[0, 0].isnan().tolist() == expected


def test_what_a_mask_hides_is_never_seen():
    x, keep = torch.randn(5, 40), torch.ones(5, 40, dtype=torch.bool)
    keep[:, 11], keep[2] = False, False
    clean = attention_stats(x, attn_mask=keep)
    for value in (float("nan"), INF, -INF, 3e38):
        spoiled = x.clone()
        spoiled[:, 11] = value
        spoiled[2] = value
        for name in FIELDS:
            got = getattr(attention_stats(spoiled, attn_mask=keep), name)
            assert torch.equal(got, getattr(clean, name)), (name, value)


def test_causal_rows_do_not_see_what_comes_later():
    x = torch.randn(20, 20)
    clean = attention_entropy(x, is_causal=True)
    x[torch.triu(torch.ones(20, 20, dtype=torch.bool), 1)] = float("nan")
    assert torch.equal(attention_entropy(x, is_causal=True), clean)


def test_rows_beyond_the_keys_of_a_window_are_keyless():
    got = attention_stats_qk(torch.randn(1, 1, 10, 8), torch.randn(1, 1, 4, 8), window=(1, 0))
    assert got.keys[0, 0].tolist() == [1, 2, 2, 2, 1, 0, 0, 0, 0, 0]
    assert not got.entropy[0, 0, 5:].any() and (got.lse[0, 0, 5:] == -INF).all()


def test_scale_zero_is_uniform():
    x = torch.randn(3, 50) * 100
    assert torch.allclose(attention_entropy(x, scale=0.0), torch.full((3,), 50.0).log())
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 50, 8)
    assert torch.allclose(attention_entropy_qk(q, k, scale=0.0), torch.full((3,), 50.0).log())


def test_a_second_derivative_is_right_or_refused():
    x = torch.randn(3, 7, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(logits_stats(twin)["entropy"].sum(), twin, create_graph=True)
    (exact,) = torch.autograd.grad(exact.square().sum(), twin)
    (g,) = torch.autograd.grad(attention_entropy(x).sum(), x, create_graph=True)
    try:
        (got,) = torch.autograd.grad(g.square().sum(), x)
    except (RuntimeError, NotImplementedError):
        return
    assert worst(got, exact) <= 1e-5


def test_inference_mode_and_no_grad_give_the_same_numbers():
    x = torch.randn(3, 70, requires_grad=True)
    plain = attention_entropy(x)
    assert plain.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = attention_entropy(x)
        assert torch.equal(got, plain) and not got.requires_grad


def test_only_the_input_that_wants_a_gradient_gets_one():
    q, k = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(1, 1, 9, 8)
    attention_entropy_qk(q, k).sum().backward()
    first = q.grad.clone()
    q2, k2 = q.detach(), k.clone().requires_grad_()
    attention_entropy_qk(q2, k2).sum().backward()
    both_q, both_k = q.detach().clone().requires_grad_(), k.clone().requires_grad_()
    attention_entropy_qk(both_q, both_k).sum().backward()
    assert torch.equal(first, both_q.grad) and torch.equal(k2.grad, both_k.grad) and k.grad is None


@pytest.mark.parametrize("function", [attention_entropy, attention_stats])
def test_many_leading_axes_are_kept(function):
    x = torch.randn(2, 1, 3, 2, 4, 9)
    out = function(x, is_causal=True)
    entropy = out if isinstance(out, torch.Tensor) else out.entropy
    assert entropy.shape == (2, 1, 3, 2, 4)
    assert worst(entropy, logits_stats(x, is_causal=True)["entropy"]) <= 2e-6
    assert function(torch.randn(3, 9)) is not None
