"""What only a CUDA device can show: no synchronisation, streams, graphs, several devices, compiled code, large shapes.

The values for small and odd shapes are those of the other test files, run with `-p on_cuda`.
"""

import pytest
import torch

from inflection_fast import (
    CkaState,
    attention_column_mass,
    attention_entropy,
    attention_entropy_qk,
    attention_stats,
    attention_stats_qk,
    linear_cka,
    sum_of_squares,
)
from inflection_fast.ops import build_info, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (torch.cuda.is_available() and build_info()["cuda"]), reason="no CUDA device or library"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(B=2, H=4, Hkv=2, Q=300, K=300, D=64, dtype=torch.bfloat16, device="cuda"):
    generator = torch.Generator(device).manual_seed(3)
    query = torch.randn(B, Q, H, D, generator=generator, device=device).to(dtype).transpose(1, 2)
    return query, torch.randn(B, K, Hkv, D, generator=generator, device=device).to(dtype).transpose(1, 2)


def everything(device="cuda"):
    """One call of every operator and its derivative; their results."""
    query, key = (x.requires_grad_() for x in pair(device=device))
    logits = torch.linspace(-4, 4, 2 * 70 * 1300, device=device).sin().view(2, 70, 1300).mul(9).requires_grad_()
    qk = attention_stats_qk(query, key, is_causal=True, rows=torch.arange(0, 300, 7, device=device))
    from_logits = attention_stats(logits, is_causal=True)
    cu_seqlens = torch.arange(0, 301, 100, device=device, dtype=torch.int32)
    packed = attention_stats_qk(query, key, is_causal=True, cu_seqlens=cu_seqlens)
    columns = attention_column_mass(query, key, packed.lse, is_causal=True, cu_seqlens=cu_seqlens)
    cut = attention_stats(logits.view(2, -1))  # few long rows
    rows = (*qk, *from_logits, *packed, *cut)
    loss = sum(
        stats.entropy.sum() + stats.collision.sum() + stats.sink.sum() for stats in (qk, from_logits, packed, cut)
    )
    gradients = torch.autograd.grad(loss, (query, key, logits))
    scale = torch.full((), 0.5, device=device)
    squares = sum_of_squares([*gradients, query.detach()], [0, 1, 2, 0], inv_scale=scale)
    ckas = [cka(dtype, device) for dtype in DTYPES]
    return [*(x.detach() for x in rows), *columns, *gradients, squares, *ckas]


def sides(layers, rows, dim, dtype=torch.float32, device="cuda", offset=0.0):
    """Features of both sides of a change, one row of each layer long."""
    generator = torch.Generator(device).manual_seed(4)
    x, noise = (torch.randn(layers, rows, dim, generator=generator, device=device) for _ in range(2))
    x[:, 3] *= 50
    return (x + offset).to(dtype), (x + noise - offset).to(dtype)


def cka(dtype, device="cuda"):
    """linear_cka, and the same rows streamed with a mask, of several layers."""
    x, y = sides(3, 400, 70, dtype, device)
    state = CkaState(3, 70, device=device)
    state.push(x[:, :300], y[:, :300], torch.arange(300, device=device) % 3 > 0)
    state.push(x[:, 300:], y[:, 300:])
    return torch.cat([linear_cka(x, y), state.value()])


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_nothing_synchronises_and_nothing_differs_between_runs():
    once = everything()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = everything()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_same(once, again)


def test_a_graph_replays_every_operator_on_new_numbers():
    query, key = pair()
    logits, scale = torch.randn(4, 50, 1100, device="cuda"), torch.ones(1, device="cuda")
    rows = [sides(2, 300, 40, dtype) for dtype in DTYPES]
    cu_seqlens = torch.tensor([0, 120, 300], device="cuda")

    def step():
        lse = attention_stats_qk(query, key, cu_seqlens=cu_seqlens).lse
        return (
            attention_entropy_qk(query, key, is_causal=True),
            *attention_column_mass(query, key, lse, cu_seqlens=cu_seqlens),
            attention_entropy(logits),
            attention_entropy(logits.view(4, -1)),
            sum_of_squares([logits], [0], inv_scale=scale),
            *(linear_cka(x, y) for x, y in rows),
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    query.mul_(2), logits.add_(torch.randn_like(logits)), scale.fill_(0.5), cu_seqlens[1].fill_(70)
    for x, _ in rows:
        x.add_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, step())


def test_work_goes_to_the_current_stream():
    expected = everything()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever launched elsewhere would be done, and wrong, before this is
        query, key = pair()
        slow = torch.zeros_like(query).add_(query)
        ours = attention_entropy_qk(slow, key)
        event = stream.record_event()
        assert not event.query()
    stream.synchronize()
    assert torch.equal(ours, attention_entropy_qk(query, key))
    assert_same(expected, everything())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_another_device_than_the_current_one_are_computed_there():
    here, there = everything("cuda:0"), everything("cuda:1")
    assert all(x.device == torch.device("cuda:1") for x in there)
    assert_same(here, [x.to("cuda:0") for x in there])


def test_compiled_in_one_graph_for_two_shapes():
    def loss(query, key):
        cu_seqlens = torch.tensor([0, 30, query.shape[2]], device="cuda")
        stats = attention_stats_qk(query * 2, key, is_causal=True, cu_seqlens=cu_seqlens)
        mass = attention_column_mass(query * 2, key, stats.lse, is_causal=True, cu_seqlens=cu_seqlens).mass
        return (stats.entropy + stats.collision).sum() + mass.square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for length in (70, 133):
        query, key = (x.requires_grad_() for x in pair(Q=length, K=length, dtype=torch.float32))
        ours, eager = compiled(query, key), loss(query, key)
        torch.testing.assert_close(ours, eager)
        both = zip(torch.autograd.grad(ours, (query, key)), torch.autograd.grad(eager, (query, key)), strict=True)
        for a, b in both:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("depth", [16, 64, 80, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_from_q_and_k_equal_the_truth(budget, dtype, depth, causal):
    query, key = pair(1, 4, 2, 1500, 1700, depth, dtype)
    ours = attention_stats_qk(query, key, is_causal=causal)
    truth = reference.attention_stats_qk(query.double(), key.double(), is_causal=causal)
    eager = reference.attention_stats_qk(query.float(), key.float(), is_causal=causal)
    for name in ("entropy", "lse", "collision", "sink"):
        budget(getattr(ours, name), getattr(eager, name), getattr(truth, name))
    assert torch.equal(ours.keys.double(), truth.keys.double())


@pytest.mark.parametrize("columns", [64, 4096, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_long_rows_of_logits_errs_by_two_millionths_at_most(dtype, columns):
    for temper in (0.01, 3.0, 40.0, 1e4):
        logits = (torch.randn(2, 3, 500, columns, device="cuda") * temper).to(dtype)
        truth = reference.attention_entropy(logits.double())
        assert (attention_entropy(logits).double() - truth).abs().max() <= 2e-6


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cka_of_many_rows_and_columns_errs_within_its_limit(dtype, offset):
    limit = 1e-6 if dtype == torch.float32 else 1e-4
    for rows, dim in ((5000, 300), (200, 2000), (9000, 64)):
        x, y = sides(2, rows, dim, dtype, offset=offset)
        for debiased in (True, False):
            truth = reference.linear_cka(x.double(), y.double(), debiased=debiased)
            assert (linear_cka(x, y, debiased=debiased) - truth).abs().max() <= limit


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"cu_seqlens": [0, 700, 701, 1500]}], ids=str)
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_and_packed_rows_of_long_sequences_equal_the_truth(budget, dtype, depth, options):
    query, key = pair(1, 4, 2, 1500, 1500, depth, dtype)
    options = {k: torch.tensor(v, device="cuda") if k == "cu_seqlens" else v for k, v in options.items()}
    results = []
    for operators, to in ((None, lambda x: x), (reference, torch.Tensor.float), (reference, torch.Tensor.double)):
        stats = (operators.attention_stats_qk if operators else attention_stats_qk)(to(query), to(key), **options)
        columns = operators.attention_column_mass if operators else attention_column_mass
        results.append((stats.entropy, *columns(to(query), to(key), stats.lse, **options)))
    for ours, eager, truth in zip(*results, strict=True):
        budget(ours, eager, truth, floor=1e-5 * max(1.0, truth.max().item()))


@pytest.mark.parametrize("columns", [50_257, 1_000_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_of_a_vocabulary_equal_the_truth_and_so_does_their_gradient(budget, dtype, columns):
    logits = (torch.randn(5, columns, device="cuda") * 4 + 100).to(dtype).requires_grad_()
    gradients = []
    for function, to in (
        (attention_entropy, lambda x: x),
        (reference.attention_entropy, torch.Tensor.float),
        (reference.attention_entropy, torch.Tensor.double),
    ):
        entropy = function(to(logits))
        gradients.append((entropy, *torch.autograd.grad(entropy.sum(), logits)))
    assert (gradients[0][0].double() - gradients[2][0]).abs().max() <= 2e-6
    budget(*(x[1] for x in gradients), floor=1e-6)


def test_memory_beyond_the_result_is_none():
    query, key = pair(1, 8, 8, 4096, 4096, 128)
    attention_entropy_qk(query, key)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = attention_entropy_qk(query, key)
    assert torch.cuda.max_memory_allocated() - before <= 4 * result.numel() * 2  # entropy and log-sum-exp
