"""sum_of_squares: many tensors, one float64 per group."""

import pytest
import torch

from inflection_fast import sum_of_squares

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def truth(tensors, groups):
    out = torch.zeros(max(groups) + 1, dtype=torch.float64)
    for t, g in zip(tensors, groups, strict=True):
        out[g] += t.double().square().sum()
    return out


def assert_close(tensors, groups):
    got, exact = sum_of_squares(tensors, groups), truth(tensors, groups)
    assert got.dtype == torch.float64 and got.shape == exact.shape
    assert torch.allclose(got, exact, rtol=1e-6, atol=0), (got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [[(1,)], [(3, 5), (7,), ()], [(1000, 37), (2, 3, 4)], [(17,)] * 40], ids=str)
def test_sums_equal_the_truth(shapes, dtype):
    assert_close([torch.randn(s).to(dtype) for s in shapes], [i % 3 for i in range(len(shapes))])


def test_dtypes_may_be_mixed_in_a_group():
    assert_close([torch.randn(50).to(d) for d in DTYPES * 2], [0, 0, 0, 1, 1, 0])


def test_two_thousand_tensors_in_twelve_groups():
    assert_close([torch.randn(i % 7 + 1, 11) for i in range(2000)], [i % 12 for i in range(2000)])


def test_a_group_without_tensors_is_zero():
    got = sum_of_squares([torch.ones(4), torch.full((3,), 2.0)], [3, 1])
    assert got.tolist() == [0.0, 12.0, 0.0, 4.0]


def test_an_empty_tensor_adds_nothing():
    assert sum_of_squares([torch.empty(0), torch.ones(2), torch.empty(3, 0)], [0, 0, 1]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_any_stride_count_each_element_once(dtype):
    x = torch.randn(8, 9, 10).to(dtype)
    for view in (x.mT, x[::2, 1:, ::3], x[:, 2], x[:1].expand(5, 9, 10), x.permute(2, 0, 1)[::2]):
        assert_close([view], [0])


def test_large_halves_do_not_overflow_and_small_ones_do_not_vanish():
    assert_close([torch.full((1000,), 60000.0, dtype=torch.float16)], [0])
    assert_close([torch.full((1000,), 6e-8, dtype=torch.float16)], [0])
    assert_close([torch.full((10,), 1e-20)], [0])


def test_small_terms_beside_a_large_one_are_not_lost():
    x = torch.full((1_000_001,), 1e-2)
    x[0] = 1e3
    assert_close([x], [0])


def test_nan_and_infinity_stay_in_their_group():
    got = sum_of_squares([torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")]), torch.ones(2)], [0, 1, 2])
    assert got[0].isnan() and got[1] == float("inf") and got[2] == 2


def test_inputs_are_unchanged_and_may_require_a_gradient():
    x = torch.randn(5, requires_grad=True)
    before = x.detach().clone()
    sum_of_squares([x, x], [0, 1])
    assert torch.equal(x, before) and x.grad is None


def test_the_sum_is_the_same_for_any_number_of_threads():
    tensors, threads = [torch.randn(100_003), torch.randn(77)], torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(sum_of_squares(tensors, [0, 0]))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tensors, groups, error, word", [
    ([torch.ones(2).double()], [0], TypeError, "float64"),
    ([torch.ones(2).long()], [0], TypeError, "int64"),
    ([1.0], [0], TypeError, "tensors"),
    ([torch.ones(2)], [0.5], TypeError, "groups"),
    ([torch.ones(2)], [0, 1], ValueError, "groups"),
    ([torch.ones(2), torch.ones(2)], [0], ValueError, "groups"),
    ([torch.ones(2)], [-1], ValueError, "-1"),
    ([], [], ValueError, "tensors"),
    ([torch.ones(2), torch.ones(2, device="meta")], [0, 0], ValueError, "meta"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(tensors, groups, error, word):
    with pytest.raises(error, match=word):
        sum_of_squares(tensors, groups)


def test_compiled_in_one_graph():
    compiled = torch.compile(lambda a, b: sum_of_squares([a, b], [1, 0]) + 1, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        a, b = torch.randn(n, 2), torch.randn(n)
        assert torch.allclose(compiled(a, b).double(), truth([a, b], [1, 0]) + 1, rtol=1e-6)
