"""The operators on a GPU: against what one would write, fused attention, and the card's own copy and matrix rates."""

import functools

import pytest
import torch
from cases import extra_bytes, race
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from inflection_fast import attention_entropy, attention_entropy_qk, attention_stats_qk, sum_of_squares

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
    return {**rivals, "V := K identity": identity}


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


def bench_gradient_of_entropy_from_q_and_k(benchmark):
    query, key, value = (torch.randn(2, 32, 4096, 128, device="cuda", dtype=BF16).requires_grad_() for _ in range(3))

    def ours():
        return torch.autograd.grad(attention_entropy_qk(query, key, is_causal=True).sum(), (query, key))

    def attention():
        return torch.autograd.grad(sdpa(query, key, value, is_causal=True).sum(), (query, key, value))

    name = "entropy and its gradient from Q, K, bfloat16, causal, B2 H32 T4096 D128"
    race(benchmark, name, {"ours": ours, "SDPA and its gradient": attention})


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
