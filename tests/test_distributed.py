"""Two processes measure what one does on the whole batch, and neither waits for a lost one for long."""

import shutil

import helpers.rank_training as training
import numpy as np
import pytest
import rank_scenarios as scenarios
from helpers.rank_processes import run_ranks, told
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import find_alerts
from inflection_fast.timeline import Timeline

RELATIVE = 1e-4
PAIR_SECONDS = 300


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The output folder of two processes that have gone through all scenarios."""
    folder = tmp_path_factory.mktemp("pair")
    batches, probe = training.batches_of("bert")
    training.train(training.model_of("bert"), batches[:2], probe, out=folder / "resumed_from_one" / "run")
    return run_ranks("rank_scenarios.py", folder, 2, seconds=PAIR_SECONDS)


def assert_same(found, expected, signals=training.SIGNALS, rounding=None):
    assert "raised" not in found, found.get("traceback")
    assert found["steps"] == expected["steps"]
    for name in signals:
        # What is below the absolute tolerance is rounding: delta-CKA begins at 0, an error without samples is 0.
        slack = 1e-6 if rounding is None else 1e-6 + 4 * np.nan_to_num(rounding[name])
        bound = RELATIVE * np.abs(expected[name]) + slack
        np.testing.assert_array_less(np.abs(np.subtract(found[name], expected[name])), bound + 1e-30, err_msg=name)
        np.testing.assert_array_equal(np.isnan(found[name]), np.isnan(expected[name]), err_msg=name)


def assert_finite(expected, but=()):
    for name in training.SIGNALS:
        assert name in but or np.isfinite(expected[name]).all(), name


# ---- as one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "config", "micro_batches"),
    [
        ("ddp", "bert", training.CONFIG, 1),
        ("ddp_sampled", "bert", training.SAMPLED, 2),  # ranks draw rows of their own, as micro-batches do
        ("ddp_accumulated", "bert", training.CONFIG, 1),
        ("fsdp", "llama", training.CONFIG, 1),
        ("replicated_shards", "llama", training.CONFIG, 1),
        ("tensor_parallel", "llama", training.SAMPLED, 1),
        ("tensor_parallel_mlp_only", "llama", training.SAMPLED, 1),
        ("sharded_and_tensor_parallel", "llama", training.SAMPLED, 1),
    ],
)
def test_two_processes_measure_what_one_does_on_the_whole_batch(pair, name, model, config, micro_batches):
    expected = training.whole(model, config, micro_batches)
    assert_finite(expected)
    assert np.ptp(expected["entropy"]) > 0.1 and np.min(expected["activation_grad"]) > 1e-5
    assert (np.max(expected["entropy_se"]) > 0.01) == (config.rows is not None)
    rounding = training.rounding_of(model, config, expected) if "tensor_parallel" in name else None
    assert_same(told(pair, name, 0), expected, rounding=rounding)
    other = told(pair, name, 1)
    if (pair / name / "run").exists():  # then the file is the timeline
        assert "raised" not in other and other["steps"] == []
    else:
        assert_same(other, expected, rounding=rounding)


@pytest.mark.parametrize(
    ("name", "model", "pieces"),
    [("ddp_of_parameters", "bert", 2), ("fsdp_of_parameters", "llama", 2), ("fsdp_accumulated", "llama", 4)],
)
def test_what_follows_from_parameters_is_that_of_one_process(pair, name, model, pieces):
    parts = lambda batch: [training.part_of(batch, part, pieces) for part in range(pieces)]  # noqa: E731
    expected = training.of_parameters(training.with_adapters(model), model, parts)
    signals = (*training.OF_ADAPTERS, *training.OF_UPDATES, *training.OF_NOISE)
    for column in signals:
        assert np.isfinite(expected[column]).all(), column
    # The noise scale divides by a signal that is near 0 in some steps.
    assert_same(told(pair, name), expected, signals[:-1] if name == "fsdp_accumulated" else signals)


def test_what_ranks_of_one_batch_hold_alike_counts_once_in_the_noise_of_gradients(pair):
    batches, _ = training.batches_of("llama")
    halves = lambda batch: [training.part_of(batch, part) for part in range(2)]  # noqa: E731
    timeline = training.train(training.model_of("llama"), batches, None, training.ONLY_NOISE, parts_of=halves)
    found, expected = told(pair, "tensor_parallel_noise"), training.as_json(timeline, training.OF_NOISE)
    assert "raised" not in found, found.get("traceback")
    # Of the first step: ranks that divide a product add it up in another order, and training multiplies the difference.
    first = [{name: values[:1] for name, values in of.items() if isinstance(values, list)} for of in (found, expected)]
    assert_same(*first, training.OF_NOISE)


def test_sequences_that_ranks_have_split_count_once(pair):
    batches, _ = training.batches_of("llama")
    expected = training.as_json(training.train(scenarios.split_model(), batches, None, scenarios.NO_PROBE))
    found = told(pair, "sequence_parallel")
    assert_same(found, expected)
    assert np.isfinite(expected["entropy"]).all() and np.isfinite(expected["activation_grad"]).all()


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("trainer", "llama"),
        ("trainer_accumulated", "llama"),
        ("trainer_that_adds_means", "bert"),
        ("trainer_that_adds_means_accumulated", "bert"),
    ],
)
def test_the_trainer_measures_on_two_processes_what_one_does(pair, name, model):
    found = told(pair, name)
    assert "raised" not in found, found.get("traceback")
    assert found["world"] == 2
    expected = training.whole(model, unequal=model == "llama")
    first = {name: expected[name][:1] for name in ("steps", *training.SIGNALS)}
    assert_same(found, first)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor_parallel", "trainer"])
def test_one_rank_keeps_the_file(pair, name):
    found = told(pair, name)
    assert "raised" not in found, found.get("traceback")
    loaded = training.as_json(Timeline.load(pair / name / "run"))
    assert loaded["steps"] == found["steps"]
    np.testing.assert_array_equal(loaded["entropy"], found["entropy"])
    files = sorted(path.name for path in (pair / name / "run").iterdir())
    assert files == ["probe_reference.npz", "timeline.arrows"]


def test_a_resumed_run_on_two_processes_is_the_same_as_one_that_was_not_cut(pair):
    loaded = training.as_json(Timeline.load(pair / "resumed" / "cut"))
    # The model is another one after the cut, so the steps and the reference of the start are what is continued.
    assert loaded["steps"] == told(pair, "resumed")["steps"]
    assert np.isfinite(loaded["delta_cka"]).all()


def test_a_run_of_one_process_goes_on_on_two(pair):
    expected = training.whole("bert")
    assert "raised" not in told(pair, "resumed_from_one"), told(pair, "resumed_from_one").get("traceback")
    assert_same(training.as_json(Timeline.load(pair / "resumed_from_one" / "run")), expected)
    assert_finite(expected)


def test_a_run_of_two_processes_goes_on_on_one(pair, tmp_path):
    shutil.copytree(pair / "ddp" / "run", tmp_path / "run")  # whose second half is measured again
    batches, probe = training.batches_of("bert")
    model = training.update(training.model_of("bert"), batches[:2])
    training.train(model, batches, probe, out=tmp_path / "run", start_step=2)
    assert_same(training.as_json(Timeline.load(tmp_path / "run")), training.whole("bert"))


# ---- one path for all ranks ------------------------------------------------------------------------------------------


def test_a_rank_without_a_batch_takes_part(pair):
    ranks = [told(pair, "one_rank_without_a_batch", rank) for rank in range(2)]
    assert_same(ranks[1], ranks[0])
    batches, _ = training.batches_of("bert")
    alone = training.train(training.model_of("bert"), batches, None, parts_of=lambda b: [training.part_of(b, 0)])
    np.testing.assert_allclose(ranks[0]["entropy"][0], alone.entropy[0], rtol=RELATIVE)
    np.testing.assert_allclose(ranks[0]["loss"][0], alone.loss[0], rtol=RELATIVE)
    np.testing.assert_allclose(ranks[0]["activation_grad"][0], alone.activation_grad[0] / 2, rtol=RELATIVE)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("other_config", "ValueError: config must be equal on all ranks, and is", "must be equal on all ranks"),
        ("other_model", "ValueError: blocks must be equal on all ranks, and is", "must be equal on all ranks"),
        ("folder_of_another_run", "exists already: choose another folder", "ValueError: rank 0: "),
    ],
)
def test_what_one_rank_refuses_all_ranks_refuse(pair, name, first, second):
    assert first in told(pair, name, 0)["raised"]
    assert second in told(pair, name, 1)["raised"]


def test_a_step_without_a_batch_on_any_rank_is_told(pair):
    found = told(pair, "no_rank_with_a_batch")
    assert found["messages"] == ["measured step 0 saw no training forward of the monitored model on any rank"]
    assert found["steps"] == [0] and np.isnan(found["entropy"]).all() and np.isnan(found["loss"][0])


def test_a_step_that_one_rank_drops_is_missing_on_all_and_the_next_ones_are_right(pair):
    first, second = (told(pair, "dropped_on_one_rank", rank) for rank in range(2))
    assert first["steps"] == second["steps"] == [0, 2, 3]
    assert (first["dropped"], second["dropped"]) == (1, 1)
    assert first["messages"] == ["step 1 is missing from the timeline: LookupError('a rank has dropped its part')"]
    np.testing.assert_array_equal(first["entropy"], second["entropy"])
    assert np.isfinite(first["activation_grad"]).all()


def test_a_step_that_fails_on_one_rank_has_no_values_on_any(pair):
    found = told(pair, "failed_on_one_rank")
    assert found["steps"] == [0, 1, 2, 3]
    assert found["messages"] == ["measured step 1 failed on another rank; its values are NaN"]
    assert "planted" in told(pair, "failed_on_one_rank", 1)["messages"][0]
    for name in ("entropy", "max_logit", "activation_grad", "parameter_grad", "loss"):
        unknown = np.isnan(found[name]).reshape(4, -1)
        assert unknown[1].all() and not unknown[[0, 2, 3]].any(), name


# ---- lost ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["late_rank", "killed_rank"])
def test_a_lost_rank_costs_one_bounded_wait_and_one_warning(pair, name):
    found = told(pair, name)
    assert "raised" not in found, found.get("traceback")
    message, alert = found["messages"]
    assert message.startswith("a rank did not answer at step 2")
    assert message.endswith("its own share of the batch only, and norms over all ranks are NaN")
    assert alert == "Step 2: the values of the step are those of one rank alone, 1 missing."
    assert found["steps"] == [0, 1, 2, 3] and found["missing_ranks"] == [0, 0, 1, 1]
    timeline = Timeline.load(pair / name / "run")
    assert timeline.missing_ranks.tolist() == [0, 0, 1, 1]
    (lost,) = find_alerts(timeline, kinds=["rank_lost"])
    assert (lost.step, lost.value) == (2, 1)
    norms = np.array(found["activation_grad"])
    assert np.isfinite(norms[:2]).all() and np.isnan(norms[2:]).all()
    assert np.isfinite(found["entropy"]).all()
    assert max(found["waits"]) < 20  # the training waits for nothing; closing does, 1.5 s or until the rank is gone
