"""Grouped sums of squares against float64."""

import pytest
import torch

from inflection_fast import sum_of_squares
from inflection_fast.ops import reference


def tensors():
    x = torch.randn(40, 50, 60)
    return {
        "matrix": x[0],
        "many chunks": x,
        "transposed": x.transpose(0, 2),
        "strided": x[::3, 1::2, ::5],
        "expanded": x[:1, :1].expand(7, 9, 60),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "bfloat16": x[1].bfloat16().mT,
        "float16": x[2].half()[:, ::2],
        "crooked address": x.flatten()[1:20_003],
        "crooked address, 16 bits": x.flatten()[:20_000].half()[3:],
        "subnormal": torch.full((100,), 1e-42),
        "large": torch.full((1000,), 1e17),
    }


@pytest.mark.parametrize("name", tensors())
def test_sum_of_one_tensor_is_the_truth_rounded_once(isa, name):
    x = tensors()[name]
    truth = x.double().square().sum()
    assert torch.equal(sum_of_squares([x], [0]), truth.float()[None]) or torch.allclose(
        sum_of_squares([x], [0]).double(), truth, rtol=2**-23, atol=0
    )


def test_groups_mix_dtypes_and_layouts(isa):
    xs = list(tensors().values())[:-1]
    groups = [i % 3 + (i % 3 == 2) for i in range(len(xs))]
    ours = sum_of_squares(xs, groups)
    assert torch.allclose(ours, reference.sum_of_squares(xs, groups), rtol=2**-23, atol=0)
    assert ours.shape == (4,) and ours[2] == 0


def test_poison_shows_in_its_group_only(isa):
    xs = [torch.randn(30), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])]
    ours = sum_of_squares(xs, [0, 1, 2])
    assert ours[0].isfinite() and ours[1].isnan() and ours[2].isposinf()


def test_threads_do_not_change_a_bit():
    x, threads = torch.randn(1_000_003), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sum_of_squares([x], [0])
        torch.set_num_threads(3)
        assert torch.equal(one, sum_of_squares([x], [0]))
    finally:
        torch.set_num_threads(threads)


BAD = {
    "no tensors": (ValueError, "tensors", [], []),
    "lengths differ": (ValueError, "groups", [torch.zeros(2)], [0, 1]),
    "float64": (TypeError, r"tensors\[0\]", [torch.zeros(2).double()], [0]),
    "a list": (TypeError, r"tensors\[0\]", [[1.0]], [0]),
    "sparse": (TypeError, r"tensors\[0\]", [torch.eye(2).to_sparse()], [0]),
    "negative group": (ValueError, r"groups\[0\]", [torch.zeros(2)], [-1]),
    "group that is no integer": (TypeError, r"groups\[0\]", [torch.zeros(2)], [0.0]),
    "two devices": (ValueError, r"tensors\[1\]", [torch.zeros(2), torch.zeros(2, device="meta")], [0, 0]),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(case):
    error, name, xs, groups = case
    with pytest.raises(error, match=name):
        sum_of_squares(xs, groups)


def test_opcheck():
    torch.library.opcheck(torch.ops.inflection_fast.sum_of_squares, ([torch.randn(3), torch.randn(4, 5)], [0, 1], 2))
