"""attention_column_mass: against float64, and by sums that need no reference."""

import pytest
import torch
from helpers.attention_qk import MASKS, pair, seeded, widened, worst  # noqa: F401  (seeded is used by every test)

from inflection_fast import AttentionColumns, attention_column_mass, attention_stats_qk
from inflection_fast.ops import reference

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, Hkv, Q, K, D: smallest; odd; grouped; several blocks of rows and keys; several packed chunks of keys
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 5, 7, 3),
    (2, 6, 2, 149, 131, 24),
    (1, 2, 1, 40, 1100, 64),
    (1, 1, 1, 30, 4300, 4),
    (1, 2, 1, 70, 200, 512),
]
OPTIONS = {
    "causal": {"is_causal": True},
    "window": {"window": (9, 4)},
    "softcap": {"softcap": 3.0},
    "packed": {"cu_seqlens": torch.tensor([3, 50, 50, 51, 120])},
}


def column_mass(operators, query, key, sinks=None, **options):
    """What a user does: the rows first, then the columns."""
    lse = operators.attention_stats_qk(query, key, sinks=sinks, **options).lse
    return operators.attention_column_mass(query, key, lse, **options)


class Ours:
    attention_stats_qk = staticmethod(attention_stats_qk)
    attention_column_mass = staticmethod(attention_column_mass)


def check(query, key, **options):
    """Ours may err twice as much as the reference in float32 on the same inputs, plus 1e-5 of the largest mass."""
    truth = column_mass(reference, query.double(), key.double(), **widened(options))
    eager = column_mass(reference, query.float(), key.float(), **options)
    ours = column_mass(Ours, query, key, **options)
    assert isinstance(ours, AttentionColumns)
    for name, actual, theirs, exact in zip(ours._fields, ours, eager, truth, strict=True):
        allowed = 2 * worst(theirs, exact) + 1e-5 * max(1.0, exact.nan_to_num(0.0).max().item())
        assert actual.dtype == torch.float32 and actual.shape == exact.shape
        assert worst(actual, exact) <= allowed, f"{name}: {worst(actual, exact):.2e} > {allowed:.2e}"
    return ours


@pytest.mark.parametrize("sharp", [0.05, 1.5, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_equal_the_truth(isa, dtype, shape, sharp):
    check(*pair(*shape, sharp=sharp, dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_masks_and_bounds_equal_the_truth(isa, mask, options):
    check(*pair(2, 4, 2, 131, 131, 24), attn_mask=None if mask is None else MASKS[mask](2, 4, 131, 131), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_picked_rows_count_as_often_as_they_are_picked(isa, options):
    query, key = pair(2, 4, 2, 131, 131, 24)
    check(query, key, rows=torch.tensor([130, 0, 0, 13, 70, 12] * 15), **options)
    check(query, key, rows=torch.tensor([], dtype=torch.int64), **options)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["none", *OPTIONS])
def test_mass_adds_up_to_the_rows_with_keys_and_squares_to_their_collisions(isa, options):
    query, key = pair(2, 4, 2, 131, 131, 40)
    stats, columns = attention_stats_qk(query, key, **options), column_mass(Ours, query, key, **options)
    torch.testing.assert_close(columns.mass.sum(-1), (stats.keys > 0).float().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns.squares.sum(-1), stats.collision.sum(-1), rtol=1e-5, atol=1e-5)


def test_sinks_take_their_share_of_the_mass(isa):
    query, key = pair(2, 4, 2, 60, 90, 40)
    sinks = torch.tensor([5.0, 6.0, 8.0, 7.0])
    taken = attention_stats_qk(query, key, sinks=sinks).sink.sum(-1)
    mass = check(query, key, sinks=sinks).mass.sum(-1)
    assert (taken > 1).all()
    torch.testing.assert_close(mass + taken, torch.full_like(mass, 60.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e3, 1e6, 1e8, 1e20, 1e36])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_stay_probabilities_where_scores_are_large(isa, dtype, scale):
    query, key = pair(1, 2, 1, 90, 131, 32)
    query, key = query.to(dtype), key.to(dtype)
    stats = attention_stats_qk(query, key, scale=scale)
    mass, squares = attention_column_mass(query, key, stats.lse, scale=scale)
    assert (mass >= 0).all() and (mass <= 90).all() and (squares >= 0).all() and (squares <= mass * (1 + 1e-5)).all()
    if scale >= 1e8:  # every row is one-hot, and says so
        assert (mass.sum(-1) == 90).all() and (squares.sum(-1) == 90).all()


def test_uniform_attention_and_a_pure_sink_are_told_apart():
    query, key = torch.ones(1, 2, 64, 8), torch.zeros(1, 2, 64, 8)
    key[0, 1, 5] = 40.0
    mass, squares = column_mass(Ours, query, key)
    share = squares / squares.sum(-1, keepdim=True)
    torch.testing.assert_close(share[0, 0], torch.full((64,), 1 / 64))
    assert share[0, 1, 5] > 0.999 and mass[0, 1, 5] > 63.9


def test_rows_without_keys_count_nothing(isa):
    query, key = pair(1, 2, 2, 30, 50, 8)
    mask = torch.rand(30, 50) > 0.5
    mask[7] = mask[:, 9] = False
    query[:, :, 7] = key[:, :, 9] = float("nan")
    mass, squares = check(query, key, attn_mask=mask)
    assert mass.isfinite().all() and (mass[..., 9] == 0).all() and (squares[..., 9] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 29.0), rtol=1e-5, atol=0)


def test_a_poisoned_row_spoils_the_columns_that_it_attends_and_no_other(isa):
    query, key = pair(1, 2, 1, 100, 120, 8)
    clean = column_mass(Ours, query, key, is_causal=True)
    query[0, 1, 70, 3] = float("nan")
    for before, after in zip(clean, column_mass(Ours, query, key, is_causal=True), strict=True):
        assert after[0, 1].isnan().nonzero().flatten().tolist() == list(range(71))
        assert torch.equal(after[0, 0], before[0, 0]) and torch.equal(after[0, 1, 71:], before[0, 1, 71:])


def test_a_score_of_minus_infinity_has_no_probability_even_in_a_poisoned_row(isa):
    query, key = pair(1, 1, 1, 70, 64, 8)
    query.abs_()
    key[0, 0, 20] = -INF
    query[0, 0, 3, 0], lse = 1e30, attention_stats_qk(query, key).lse
    lse[0, 0, 5], lse[0, 0, 6] = float("nan"), -INF
    ours = attention_column_mass(query, key, lse)
    truth = reference.attention_column_mass(query.double(), key.double(), lse.double())
    assert ours.mass[0, 0, 20] == 0 and ours.mass.isnan().sum() == 63
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_threads_change_no_bit(isa, options):
    query, key = pair(2, 4, 2, 200, 1200, 64)
    threads = torch.get_num_threads()
    once = column_mass(Ours, query, key, **options)
    try:
        torch.set_num_threads(3)
        again = column_mass(Ours, query, key, **options)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_many_rows_lose_nothing_in_the_sum(isa):
    query, key = pair(1, 1, 1, 20000, 20, 4)
    ours, truth = column_mass(Ours, query, key), column_mass(reference, query.double(), key.double())
    for actual, exact in zip(ours, truth, strict=True):
        assert ((actual - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 0, 5, 8), (1, 2, 2, 5, 0, 8), (0, 2, 2, 5, 5, 8), (1, 0, 2, 5, 5, 8)], ids=str
)
def test_empty_tensors_give_zeros(shape):
    B, H, Hkv, Q, K, D = shape
    columns = attention_column_mass(torch.zeros(B, H, Q, D), torch.zeros(B, Hkv, K, D), torch.zeros(B, H, Q))
    assert all(x.shape == (B, H, K) and not x.any() for x in columns)


def test_inputs_that_require_grad_are_read_as_values():
    query, key = (x.requires_grad_() for x in pair(1, 2, 2, 5, 7, 8))
    mask = torch.zeros(7, requires_grad=True)
    lse = attention_stats_qk(query, key).lse
    assert not any(x.requires_grad for x in attention_column_mass(query, key, lse, attn_mask=mask))


def test_compiled_in_one_graph_gives_the_same_numbers():
    def mass(query, key, cu_seqlens):
        return column_mass(Ours, query, key, is_causal=True, cu_seqlens=cu_seqlens).squares

    compiled = torch.compile(mass, fullgraph=True, backend="aot_eager")
    for length in (9, 33):
        query, key = pair(1, 4, 2, length, length, 16)
        cu_seqlens = torch.tensor([0, 4, length])
        assert torch.equal(compiled(query, key, cu_seqlens), mass(query, key, cu_seqlens))


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 1, 4])], ids=["all", "picked"])
def test_opcheck(rows):
    query, key = pair(1, 4, 2, 5, 7, 8)
    lse = torch.randn(1, 4, 5 if rows is None else 3)
    arguments = (query, key, lse, torch.rand(5, 7) > 0.3, True, 0.5, 3, -1, 2.0, rows, None)
    torch.library.opcheck(torch.ops.inflection_fast.attention_column_mass, arguments)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
BAD = {
    "lse: expected a tensor": (TypeError, (Q, K, None), {}),
    "lse: expected dtype": (TypeError, (Q, K, torch.zeros(2, 4, 5).double()), {}),
    "lse: expected shape \\[2, 4, 5\\], got": (ValueError, (Q, K, torch.zeros(2, 4, 1)), {}),
    "lse: expected shape \\[2, 4, 2\\], got": (
        ValueError, (Q, K, torch.zeros(2, 4, 5)), {"rows": torch.tensor([0, 1])},
    ),
    "key: 3 heads do not divide the 4": (ValueError, (Q, torch.zeros(2, 3, 7, 8), torch.zeros(2, 4, 5)), {}),
    "cu_seqlens: needs as many": (ValueError, (Q, K, torch.zeros(2, 4, 5)), {"cu_seqlens": torch.tensor([0, 5])}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_name_of_the_argument(message):
    error, arguments, options = BAD[message]
    with pytest.raises(error, match=message):
        attention_column_mass(*arguments, **options)
