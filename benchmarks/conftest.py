"""What every benchmark shares: two threads, a seed, and the harness on the import path."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

THREADS = 2  # the machine that the README's numbers come from has two cores; more would say more about it than about us


@pytest.fixture(autouse=True)
def steady():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
