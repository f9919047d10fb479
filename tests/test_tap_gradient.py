"""Squares of gradients behind a flag, against float64."""

import pytest
import torch

from inflection_fast import ops
from inflection_fast.ops.tap_gradient import gradient_tap, tap_gradient

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]


def slots_of():
    return torch.zeros(2, 2, dtype=torch.float64)


def flag(up=True):
    return torch.full((1,), int(up), dtype=torch.int32)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5, 3), (3, 70, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_are_those_of_float64_and_of_sum_of_squares_to_the_bit(dtype, shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape).to(dtype).transpose(0, 1)
    slots = slots_of()
    tap_gradient(gradient, slots, 1, flag=flag())
    assert slots[0].tolist() == [0, 0] and slots[1, 0] == 1
    torch.testing.assert_close(slots[1, 1], gradient.double().square().sum(), rtol=1e-12, atol=0.0)
    assert slots[1, 1] == ops.sum_of_squares([gradient], [0])[0]


def test_gradients_add_up_and_a_flag_that_is_down_leaves_everything():
    slots = slots_of()
    for up, value in ((True, 2.0), (False, torch.nan), (True, 3.0)):
        tap_gradient(torch.full((2, 2), value), slots, 0, flag=flag(up))
    assert slots[0].tolist() == [2, 4 * 4 + 4 * 9]


def test_a_gradient_is_listened_to_on_its_way_and_arrives_unchanged():
    slots, x = slots_of(), torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(3, 4)
    (gradient_tap(x * 2, slots, 0, flag=flag()) * weights).sum().backward()
    assert torch.equal(x.grad, 2 * weights)
    torch.testing.assert_close(slots[0, 1], weights.double().square().sum())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="flag: is on meta"):
        tap_gradient(torch.ones(2), slots_of(), 0, flag=flag().to("meta"))
    with pytest.raises(TypeError, match="gradient: expected dtype"):
        tap_gradient(torch.ones(2, dtype=torch.float64), slots_of(), 0, flag=flag())
    with pytest.raises(RuntimeError, match="flag: expected one int32"):
        tap_gradient(torch.ones(2), slots_of(), 0, flag=flag().long())


def test_opcheck():
    torch.library.opcheck(torch.ops.inflection_fast.tap_gradient.default, (torch.ones(3, 2), flag(), slots_of(), 0))
