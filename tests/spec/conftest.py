import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(request):
    """One seed for every test; one thread where the work is so small that threads only wait for each other."""
    torch.manual_seed(20260)
    threads = torch.get_num_threads()
    if {"build", "pushed"} & set(vars(request.module)):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
