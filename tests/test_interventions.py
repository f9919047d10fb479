"""Every intervention under accumulation, checkpointing, a scaler, compiling, two processes, and after a resume."""

import helpers.intervention_runs as runs
import pytest
import torch
from helpers.rank_processes import run_ranks
from helpers.tiny_models import one_thread  # noqa: F401

NAMES = list(runs.interventions())


@pytest.fixture(scope="module")
def plain():
    return {name: runs.train(name) for name in NAMES}


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        torch.testing.assert_close(
            ours[key], expected, rtol=2e-4, atol=2e-5, msg=lambda words, key=key: f"{key}: {words}"
        )


def test_each_of_them_trains_otherwise_than_the_others(plain):
    for i, name in enumerate(NAMES):
        for other in NAMES[:i]:
            ours, theirs = plain[name], plain[other]
            assert ours.keys() != theirs.keys() or any(not torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("manner", ["checkpointed", "scaled"])
def test_checkpointing_and_a_scaler_change_nothing(plain, name, manner):
    agree(runs.train(name, manner), plain[name])


@pytest.mark.parametrize("name", ["dropout", "lisa", "unfreezing", "fewer blocks", "sigma"])
def test_a_compiled_model_trains_the_same(plain, name):
    agree(runs.train(name, "compiled"), plain[name])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_resumed_ends_where_the_whole_one_does(plain, name):
    saved = {}
    agree(runs.train(name, saved=saved), plain[name])
    agree(runs.train(name, saved=saved, steps=range(2, runs.STEPS)), plain[name])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The weights of both ranks of two processes, replicated (DDP) and sharded (FSDP2)."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("helpers/intervention_runs.py", folder, 2, seconds=240)
    assert len(list(folder.glob("*.pt"))) == 4, (folder / "log0").read_text()[-3000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("manner", ["plain", "sharded"])
def test_two_processes_train_what_one_does(plain, two_processes, name, manner):
    agree(two_processes[f"{manner}-0"][name], plain[name])
    agree(two_processes[f"{manner}-1"][name], two_processes[f"{manner}-0"][name])
