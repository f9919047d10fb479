"""Threads for operators of a size."""

import pytest
import torch

from inflection_fast.checkpoints.threads import OPERATIONS, threads_for


@pytest.fixture
def four():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("operations, threads", [(0, 1), (1.4, 1), (2, 2), (1e6, 4)])
def test_an_operator_has_the_threads_that_it_can_use(four, operations, threads):
    with threads_for(operations * OPERATIONS):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), threads_for(operations * OPERATIONS):
        raise KeyError
    assert torch.get_num_threads() == 4
