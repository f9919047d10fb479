"""For tests that run stages in this process, by importing it: one thread, and a cache of data sets that is theirs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
