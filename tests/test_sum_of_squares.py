"""Grouped sums of squares against float64."""

import pytest
import torch

from inflection_fast import sum_of_squares
from inflection_fast.ops import reference

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]


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
        "smallest": torch.full((100,), 1e-45),
        "largest": torch.full((1000,), 3e38),
        "large bfloat16": torch.full((1000,), 3e38).bfloat16(),
    }


@pytest.mark.parametrize("name", tensors())
def test_sum_of_one_tensor_is_the_truth(isa, name):
    x = tensors()[name]
    truth = x.double().square().sum()
    assert (truth > 0) == (name != "empty") and truth.isfinite()
    torch.testing.assert_close(sum_of_squares([x], [0]), truth[None], rtol=1e-12, atol=0)


def test_groups_mix_dtypes_and_layouts(isa):
    xs = [x for name, x in tensors().items() if "larg" not in name]
    groups = [i % 3 + (i % 3 == 2) for i in range(len(xs))]
    ours = sum_of_squares(xs, groups)
    assert torch.allclose(ours, reference.sum_of_squares(xs, groups), rtol=1e-12, atol=0)
    assert ours.shape == (4,) and ours[2] == 0


@pytest.mark.parametrize("scale", [torch.tensor(2.0**-16), torch.tensor([3e-4]), torch.tensor([[7.0]])], ids=str)
def test_sums_are_scaled_before_they_are_rounded(isa, scale):
    xs, groups = [torch.randn(300), torch.full((20_000,), 1e17), torch.randn(7, 9).bfloat16()], [2, 0, 2]
    ours = sum_of_squares(xs, groups, inv_scale=scale)
    truth = reference.sum_of_squares(xs, groups, inv_scale=scale)
    assert torch.allclose(ours, truth, rtol=1e-12, atol=0)
    assert ours[1] == 0 and not torch.allclose(ours, sum_of_squares(xs, groups), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_norms_are_right_wherever_they_are_floats(isa, scale):
    sizes = [1e25, 1e-25, 1e-40]
    gradients = [torch.full((64,), size) * scale for size in sizes]
    ours = sum_of_squares(gradients, [0, 1, 2], inv_scale=torch.tensor(1 / scale)).sqrt().float()
    torch.testing.assert_close(ours, 8 * torch.tensor(sizes), rtol=1e-5, atol=0)


def test_the_scale_is_read_when_the_sums_are_taken():
    x, scale = torch.ones(5), torch.tensor([1.0, 2.0])[1:]
    assert sum_of_squares([x], [0], inv_scale=scale).item() == 20
    scale.fill_(3.0)
    assert sum_of_squares([x], [0], inv_scale=scale).item() == 45
    assert sum_of_squares([x], [0], inv_scale=torch.tensor(torch.nan)).isnan()


def test_more_tensors_than_one_launch_takes_are_rounded_once(isa):
    xs = [torch.full((1,), 4096.0), *(torch.ones(1) for _ in range(2502))]  # 2^24, which swallows a 1 in float32
    assert sum_of_squares(xs, [0] * 2503).item() == 2**24 + 2502
    scaled = sum_of_squares(xs, [0] * 2503, inv_scale=torch.tensor(0.5))
    assert scaled.item() == 2**22 + 625.5


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


ONE = [torch.zeros(2)]
BAD_SCALES = {
    "a number": (TypeError, 0.5),
    "float64": (TypeError, torch.tensor(0.5).double()),
    "two": (ValueError, torch.ones(2)),
    "none": (ValueError, torch.ones(0)),
    "elsewhere": (ValueError, torch.ones(1, device="meta")),
}


@pytest.mark.parametrize("error, scale", BAD_SCALES.values(), ids=BAD_SCALES)
def test_a_scale_that_is_not_one_float32_beside_the_tensors_is_refused(error, scale):
    with pytest.raises(error, match="inv_scale"):
        sum_of_squares(ONE, [0], inv_scale=scale)


def test_opcheck():
    xs = [torch.randn(3), torch.randn(4, 5)]
    torch.library.opcheck(torch.ops.inflection_fast.sum_of_squares, (xs, [0, 1], 2, torch.tensor(0.5)))
    torch.library.opcheck(torch.ops.inflection_fast.sum_of_squares, ([torch.randn(3), torch.randn(4, 5)], [0, 1], 2))
