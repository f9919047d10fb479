"""The operators on a GPU: against what one would write, fused attention, and the card's own copy and matrix rates."""

import functools
import os

import pytest
import torch
from cases import extra_bytes, race
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from inflection_fast import (
    CkaState,
    attention_column_mass,
    attention_entropy,
    attention_entropy_qk,
    attention_stats_qk,
    linear_cka,
    sum_of_squares,
)
from inflection_fast.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
race = functools.partial(race, device="cuda", rounds=9)
SHAPE = (8, 32, 4096, 128)  # B, H, T, D
LOGITS = (2, 32, 4096, 4096)
BF16 = torch.bfloat16


def eager(logits):
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def median_ms(call, rounds=9):
    call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


@functools.cache
def card():
    """What this card does at best: bytes a second of a large copy (read and written), bf16 operations a second."""
    halves = torch.empty(2, 1 << 30, dtype=BF16, device="cuda")
    copied = 2 * halves.nbytes / 2 / median_ms(lambda: halves[0].copy_(halves[1])) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return {"copy": copied, "matrix": 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3}


def of_copy(needed_bytes):
    """A function for `extra`: how much of the copy bandwidth ours reached on the bytes it needs."""
    copy = card()["copy"]
    return lambda median: {"of copy": needed_bytes / (median["ours"] / 1e3) / copy, "copy TB/s": copy / 1e12}


def triton_entropy():
    """A row kernel in Triton, one program a row: the shortest that reads every logit once."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, columns, block: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
        s = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        d = s - tl.max(s, 0)
        e = tl.exp(d)
        total = tl.sum(e, 0)
        tl.store(out + row, tl.log(total) - tl.sum(tl.where(e > 0, e * d, 0.0), 0) / total)

    def run(x):
        out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        kernel[(out.numel(),)](x, out, x.shape[-1], triton.next_power_of_2(x.shape[-1]), num_warps=8)
        return out

    return run


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def bench_entropy_from_logits(benchmark, dtype):
    x, out = (torch.randn(LOGITS, device="cuda") * 3).to(dtype), torch.empty(LOGITS, device="cuda", dtype=dtype)
    compiled, triton_rows = torch.compile(eager), triton_entropy()
    race(
        benchmark,
        f"entropy from logits, {str(dtype).removeprefix('torch.')}, B2 H32 T4096",
        {
            "ours": lambda: attention_entropy(x),
            "eager": lambda: eager(x),
            "torch.compile": lambda: compiled(x),
            "Triton rows": lambda: triton_rows(x),
            "copy": lambda: out.copy_(x),
        },
        goals={"copy": 1.8},  # 90 % of its bandwidth at half of its bytes
        extra=of_copy(x.nbytes),
    )


def bench_causal_entropy_from_logits(benchmark):
    x, future = torch.randn(LOGITS, device="cuda", dtype=BF16), torch.ones(4096, 4096, device="cuda").triu(1).bool()
    race(
        benchmark,
        "entropy from logits, bfloat16, causal, B2 H32 T4096",
        {
            "ours": lambda: attention_entropy(x, is_causal=True),
            "torch.compile": torch.compile(lambda: eager(x.masked_fill(future, -1e30))),
        },
        extra=of_copy(x.nbytes / 2),
    )


def bench_gradient_of_entropy_from_logits(benchmark):
    x = torch.randn(LOGITS, device="cuda", dtype=BF16).requires_grad_()
    compiled = torch.compile(eager)

    def step(function):
        return torch.autograd.grad(function(x).sum(), x)

    rivals = {"ours": lambda: step(attention_entropy), "torch.compile": lambda: step(compiled)}
    race(benchmark, "entropy and its gradient from logits, bfloat16, B2 H32 T4096", rivals, extra=of_copy(3 * x.nbytes))


def bench_entropy_of_few_long_rows(benchmark):
    x = torch.randn(16, 1 << 20, device="cuda", dtype=BF16)
    compiled = torch.compile(eager)
    rivals = {"ours": lambda: attention_entropy(x), "torch.compile": lambda: compiled(x)}
    race(benchmark, "entropy from logits, bfloat16, 16 rows of 1,048,576", rivals, extra=of_copy(x.nbytes))


def attention_rivals(query, key, value, causal):
    """Fused attention by every backend that takes these tensors, and entropy by way of it with V := K."""
    scale = query.shape[-1] ** -0.5

    def fused(backend):
        with sdpa_kernel(backend):
            return sdpa(query, key, value, is_causal=causal)

    def identity():
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key, 0.0, causal, scale=scale)[:2]
        return lse - scale * (query.float() * out).sum(-1)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    rivals = {f"SDPA {name}": functools.partial(fused, backend) for name, backend in backends.items()}
    rivals["V := K identity"] = identity
    if query.shape[-1] == SHAPE[-1]:  # it takes a while to compile
        rivals["FlexAttention, lse and max"] = flex_attention_with_statistics(query, key, value, causal)
    return rivals


def flex_attention_with_statistics(query, key, value, causal):
    """Compiled FlexAttention that also returns the log-sum-exp and the largest score of every row."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled, length = torch.compile(flex_attention), query.shape[-2]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, query.device) if causal else None
    wanted = AuxRequest(lse=True, max_scores=True)
    return lambda: compiled(query, key, value, block_mask=mask, return_aux=wanted)


def on_hopper(call):
    """The same call with the variant for Hopper GPUs (docs/kernels.md), with and without polynomial exponentials."""

    def switched_on(value):
        os.environ["INFLECTION_HOPPER"] = value
        try:
            return call()
        finally:
            del os.environ["INFLECTION_HOPPER"]

    if torch.cuda.get_device_capability()[0] != 9:
        return {}
    return {"Hopper": lambda: switched_on("1"), "Hopper, split": lambda: switched_on("split")}


def works(call):
    try:
        call()
    except RuntimeError as error:
        print(f"left out: {error}")
        return False
    return True


@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def bench_entropy_from_q_and_k(benchmark, causal, depth):
    B, H, T, _ = SHAPE
    query, key, value = (torch.randn(B, T, H, depth, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(3))
    rivals = {"ours": lambda: attention_entropy_qk(query, key, is_causal=causal)}
    rivals |= on_hopper(rivals["ours"]) if depth <= 128 else {}
    rivals |= {k: v for k, v in attention_rivals(query, key, value, causal).items() if works(v)}
    flops = 2 * B * H * T * T * depth / (2 if causal else 1)
    matrix = card()["matrix"]
    with torch.no_grad():
        race(
            benchmark,
            f"entropy from Q, K, bfloat16, {'causal' if causal else 'full'}, B8 H32 T4096 D{depth}",
            rivals,
            goals={"SDPA flash": 2} if "SDPA flash" in rivals else {},
            extra=lambda median: {"of matrix rate": flops / (median["ours"] / 1e3) / matrix},
        )


def bench_entropy_from_q_and_k_against_eager(benchmark):
    query, key = (torch.randn(1, 32, 4096, 128, device="cuda", dtype=BF16) for _ in range(2))
    compiled = torch.compile(lambda: eager(query @ key.mT * 128**-0.5))
    with torch.no_grad():
        race(
            benchmark,
            "entropy from Q, K, bfloat16, full, B1 H32 T4096 D128",
            {
                "ours": lambda: attention_entropy_qk(query, key),
                "eager": lambda: eager(query @ key.mT * 128**-0.5),
                "torch.compile": compiled,
            },
            goals={"eager": 15},
            extra={"bytes": extra_bytes(lambda: attention_entropy_qk(query, key), "cuda")},
        )


def bench_statistics_of_sampled_rows(benchmark):
    query, key, value = (torch.randn(8, 32, 4096, 128, device="cuda", dtype=BF16) for _ in range(3))
    rows = torch.arange(0, 4096, 64, device="cuda")
    with torch.no_grad():
        race(
            benchmark,
            "six statistics of 64 rows from Q, K, bfloat16, causal, B8 H32 T4096 D128",
            {
                "ours": lambda: attention_stats_qk(query, key, rows=rows, is_causal=True),
                "SDPA of all rows": lambda: sdpa(query, key, value, is_causal=True),
            },
        )


def bench_entropy_of_packed_sequences(benchmark):
    query, key, value = (torch.randn(1, 32, 32768, 128, device="cuda", dtype=BF16) for _ in range(3))
    cu_seqlens = torch.arange(0, 32769, 2048, device="cuda", dtype=torch.int32)
    apart = [x.view(32, 16, 2048, 128).transpose(0, 1) for x in (query, key, value)]
    with torch.no_grad():
        race(
            benchmark,
            "entropy from Q, K, bfloat16, causal, 16 packed sequences of 2048, H32 D128",
            {
                "ours": lambda: attention_entropy_qk(query, key, is_causal=True, cu_seqlens=cu_seqlens),
                "ours, not packed": lambda: attention_entropy_qk(*apart[:2], is_causal=True),
                "SDPA, not packed": lambda: sdpa(*apart, is_causal=True),
            },
        )


def bench_column_mass(benchmark):
    query, key, value = (torch.randn(2, 32, 4096, 128, device="cuda", dtype=BF16) for _ in range(3))
    lse = attention_stats_qk(query, key, is_causal=True).lse
    with torch.no_grad():
        race(
            benchmark,
            "column mass and its squares, bfloat16, causal, B2 H32 T4096 D128",
            {
                "ours": lambda: attention_column_mass(query, key, lse, is_causal=True),
                "SDPA": lambda: sdpa(query, key, value, is_causal=True),
            },
        )


def bench_gradient_of_entropy_from_q_and_k(benchmark):
    query, key, value = (torch.randn(2, 32, 4096, 128, device="cuda", dtype=BF16).requires_grad_() for _ in range(3))

    def ours():
        return torch.autograd.grad(attention_entropy_qk(query, key, is_causal=True).sum(), (query, key))

    def attention():
        return torch.autograd.grad(sdpa(query, key, value, is_causal=True).sum(), (query, key, value))

    name = "entropy and its gradient from Q, K, bfloat16, causal, B2 H32 T4096 D128"
    race(benchmark, name, {"ours": ours, "SDPA and its gradient": attention})


def biased_cka(x, y):
    """What one would write: three products of centred features in their own dtype."""
    u, v = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    cross, own_u, own_v = ((a.mT @ b).float().square().sum((-2, -1)) for a, b in ((u, v), (u, u), (v, v)))
    return cross / (own_u * own_v).sqrt()


def features(layers, rows, dim, dtype, device="cuda"):
    """Both sides of a change; some columns have a mean, one row is long."""
    x = torch.randn(layers, rows, dim, device=device) + torch.randn(dim, device=device).exp()
    x[:, 0] *= 100
    y = x + torch.randn_like(x)
    return x.to(dtype), y.to(dtype)


def cka_rivals(x, y):
    return {
        "ours": lambda: linear_cka(x, y),
        "torch, biased, layer by layer": lambda: [biased_cka(a, b) for a, b in zip(x, y, strict=True)],
        "torch, biased, batched": lambda: biased_cka(x, y),
    }


def bench_cka(benchmark):
    L, D, N = 32, 4096, 8192
    x, y = features(L, N, D, BF16)
    both = torch.cat([x[:1], y[:1]], -1)  # a product with it takes as many operations as half of the symmetric matrix
    product = f"matrix products of as many operations, {L} times"
    rivals = {**cka_rivals(x, y), product: lambda: [x[0].mT @ both[0] for _ in range(L)]}
    truth = reference.linear_cka(x[0].double(), y[0].double()).item()
    flops = L * N * (2 * D) * (2 * D + 1)
    race(
        benchmark,
        f"debiased CKA, bfloat16, L{L} N{N} D{D}",
        rivals,
        goals={product: 0.6},
        extra=lambda median: {
            "of matrix rate": flops / (median["ours"] / 1e3) / card()["matrix"],
            "matrix TFLOP/s": card()["matrix"] / 1e12,
            "error": abs(linear_cka(x[:1], y[:1]).item() - truth),
        },
    )


def bench_cka_in_float32(benchmark):
    x, y = features(12, 4096, 768, torch.float32)
    race(benchmark, "debiased CKA, float32, L12 N4096 D768", cka_rivals(x, y))


def bench_cka_of_one_batch(benchmark):
    x, y = features(32, 512, 4096, BF16)
    state = CkaState(32, 4096, device="cuda")
    state.push(x, y)
    rivals = {"ours": lambda: state.push(x, y), "torch, biased, batched": lambda: biased_cka(x, y)}
    sums = 2 * state.gram.nbytes
    race(benchmark, "CkaState.push, bfloat16, L32 N512 D4096", rivals, extra=of_copy(sums + x.nbytes + y.nbytes))


def bench_sums_of_squares_of_many_small_tensors(benchmark):
    tensors = [torch.randn(4096, device="cuda") for _ in range(2000)]
    groups, scale = [i // 62 for i in range(2000)], torch.full((), 2.0**-16, device="cuda")

    def by_torch():
        norms = torch.stack(torch._foreach_norm(tensors)) * scale
        return torch.zeros(33, device="cuda").index_add_(0, index, norms.square())

    index = torch.tensor(groups, device="cuda")
    race(
        benchmark,
        "sums of squares, scaled, float32, 2000 tensors of 4096 in 33 groups",
        {"ours": lambda: sum_of_squares(tensors, groups, inv_scale=scale), "torch._foreach_norm, index_add_": by_torch},
    )


def bench_sum_of_squares(benchmark):
    sizes = [4096 * 4096, 4096, 4096 * 1024, 11008 * 4096] * 8
    tensors = [torch.randn(size, device="cuda", dtype=BF16) for size in sizes]
    groups = [i // 4 for i in range(len(tensors))]
    race(
        benchmark,
        "sums of squares, bfloat16, 32 tensors in 8 groups, 1.1 GB",
        {"ours": lambda: sum_of_squares(tensors, groups), "torch._foreach_norm": lambda: torch._foreach_norm(tensors)},
        extra=of_copy(sum(x.nbytes for x in tensors)),
    )
