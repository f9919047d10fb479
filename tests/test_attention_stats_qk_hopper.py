"""The variant of attention_stats_qk for Hopper GPUs, switched on: against float64, and against the usual kernel."""

import pytest
import torch
from helpers.attention_qk import check, pair, seeded  # noqa: F401

from inflection_fast import attention_stats_qk

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

BF16, F16 = torch.bfloat16, torch.float16
SWITCH = "INFLECTION_HOPPER"


@pytest.fixture
def variant(request, monkeypatch, on_cpu):
    """What is switched on: "1" unless a test asks for others; nothing of it can run on the CPU or on another GPU."""
    if on_cpu:
        pytest.skip("a CUDA kernel: run it with -p tests.emulation.plugin or -p on_cuda")
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    value = getattr(request, "param", "1")
    monkeypatch.setenv(SWITCH, value)
    return value


both = pytest.mark.parametrize("variant", ["1", "split"], indirect=True)


@pytest.fixture
def usual(variant, monkeypatch):
    """A function that calls the operator with the usual kernel."""

    def call(*args, **options):
        with monkeypatch.context() as patch:
            patch.delenv(SWITCH)
            return attention_stats_qk(*args, **options)

    return call


@both
@pytest.mark.parametrize("dtype, depth", [(BF16, 64), (F16, 128)], ids=str)
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 255, 257])
def test_any_number_of_keys_gives_the_truth(variant, keys, dtype, depth):
    check(*pair(1, 2, 1, 7, keys, depth, dtype=dtype))


# B, H, Hkv, Q, K, D, dtype, options. A tile has 128 keys or packed rows, the ring 4 tiles, the emulator runs 3 blocks.
CASES = {
    "nearly one-hot": (1, 1, 1, 70, 200, 128, BF16, {"sharp": 5.0}),
    "more tiles than the ring has room for": (1, 1, 1, 40, 1100, 64, F16, {}),
    "more tiles of rows than blocks": (2, 2, 2, 300, 260, 64, BF16, {"is_causal": True}),
    "causal, fewer keys than queries": (1, 2, 1, 150, 90, 128, BF16, {"is_causal": True}),
    "causal, more keys than queries": (1, 2, 2, 70, 600, 64, F16, {"is_causal": True}),
    "groups, window": (2, 6, 2, 49, 331, 64, BF16, {"window": (9, 4)}),
    "window that leaves out whole tiles": (1, 1, 1, 400, 700, 64, BF16, {"window": (30, 250)}),
    "rows in any order, sinks, negative scale": (
        2, 4, 2, 61, 150, 128, F16, {"rows": [60, 0, 0, 13, 59] * 9, "sinks": [1.0, -2.0, 0.5, 3.0], "scale": -0.2},
    ),
    "packed sequences": (1, 3, 1, 420, 420, 64, BF16, {"cu_seqlens": [0, 5, 200, 201, 420], "is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bounds_groups_and_rounds_of_the_ring_give_the_truth(variant, case):
    *shape, dtype, options = CASES[case]
    query, key = pair(*shape, sharp=options.get("sharp", 1.5), dtype=dtype)
    tensors = {"rows": torch.int64, "sinks": torch.float32, "cu_seqlens": torch.int32}
    given = {name: value for name, value in options.items() if name != "sharp"}
    given |= {name: torch.tensor(given[name], dtype=tensors[name]) for name in tensors.keys() & given.keys()}
    check(query, key, **given)


@pytest.mark.parametrize("scale", [1e-3, 1e5, 1e20])
@pytest.mark.parametrize("variant, dtype", [("1", BF16), ("split", F16)], indirect=["variant"], ids=str)
def test_scores_are_to_the_bit_those_that_the_backward_pass_will_form(variant, usual, dtype, scale):
    """Of any size: the gradient needs the scores of the log-sum-exp, and forms them by other instructions."""
    query, key = pair(1, 4, 2, 90, 300, 128, sharp=1.0, dtype=dtype)
    ours, theirs = attention_stats_qk(query, key, scale=scale), usual(query, key, scale=scale)
    assert torch.equal(ours.max_logit, theirs.max_logit) and torch.equal(ours.keys, theirs.keys)
    for name in ("entropy", "lse", "collision", "sink"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-5)


@both
def test_a_poisoned_key_spoils_the_rows_that_attend_it_and_no_other(variant):
    query, key = pair(1, 1, 1, 150, 200, 64, dtype=BF16)
    clean = attention_stats_qk(query, key, is_causal=True)
    for poison in (float("nan"), float("inf")):
        key[0, 0, 17] = poison
        stats = attention_stats_qk(query.abs(), key, is_causal=True)
        assert torch.equal(stats.keys, clean.keys)
        assert stats.entropy[..., 17:].isnan().all() and stats.lse[..., 17:].isnan().all()
        assert stats.entropy[..., :17].isfinite().all()


def test_rows_that_attend_nothing_and_rows_outside(variant):
    query, key = pair(1, 2, 2, 140, 3, 64, dtype=F16)
    stats = attention_stats_qk(query, key, window=(2, 0))
    assert stats.keys[0, 0].tolist() == [1.0, 2.0, 3.0, 2.0, 1.0] + [0.0] * 135
    assert [float(x[0, 1, 9]) for x in stats] == [0.0, -float("inf"), -float("inf"), 0.0, 0.0, 0.0]
    rows = torch.tensor([0, 140, -1, 4])
    raw = torch.ops.inflection_fast.attention_stats_qk(
        query, key, None, False, 0.3, -1, -1, 0.0, None, rows, None, False
    )
    assert raw[0].isnan()[0, 0].tolist() == [False, True, True, False]


def test_the_gradient_is_that_of_the_usual_kernel(variant, usual):
    gradients = []
    for call in (attention_stats_qk, usual):
        torch.manual_seed(1)
        leaves = [x.requires_grad_() for x in pair(1, 2, 1, 70, 150, 64, dtype=BF16)]
        stats = call(*leaves, is_causal=True)
        gradients.append(torch.autograd.grad((stats.entropy * stats.sink).sum() + stats.lse.sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-4)  # a rounding of bf16


def unaligned(query, key):
    storage = torch.zeros(key.numel() + 1, dtype=key.dtype)
    return query, storage[1:].view(key.shape)


REFUSED = {
    "float32": lambda q, k: ((q.float(), k.float()), {}),
    "another depth": lambda q, k: ((q[..., :48], k[..., :48]), {}),
    "a mask": lambda q, k: ((q, k), {"attn_mask": torch.ones(9, 70, dtype=torch.bool)}),
    "a softcap": lambda q, k: ((q, k), {"softcap": 3.0}),
    "rows that do not lie on 16 bytes": lambda q, k: (unaligned(q, k), {}),
    "numbers that are not neighbours": lambda q, k: ((q, k.mT.contiguous().mT), {}),
    "keys repeated by a stride of 0": lambda q, k: ((q, k[:, :, :1].expand(-1, -1, 70, -1)), {}),
    "no keys": lambda q, k: ((q, k[:, :, :0]), {}),
}


@pytest.mark.parametrize("case", [None, *REFUSED])
def test_what_the_variant_does_not_take_goes_to_the_usual_kernel(variant, pytestconfig, case):
    products = getattr(pytestconfig, "emulator_products", None)
    if products is None:
        pytest.skip("counts the products of warp groups under emulation")
    query, key = pair(1, 2, 2, 9, 70, 64, dtype=BF16)
    args, options = REFUSED[case](query, key) if case else ((query, key), {})
    before = products()
    attention_stats_qk(*args, **options)
    assert (products() == before) == (case is not None)


def test_another_word_for_the_switch_is_refused(variant, monkeypatch):
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(RuntimeError, match="attention_stats_qk"):
        attention_stats_qk(*pair(1, 1, 1, 2, 2, 64, dtype=BF16))
