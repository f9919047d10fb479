"""Stages of a pipeline, ranks that share sequences and ranks that share experts measure what one process does."""

import numpy as np
import parallel_scenarios as scenarios
import pytest
import torch
from helpers.rank_processes import run_ranks, told
from helpers.rank_training import as_json, batches_of, train
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import ops
from inflection_fast.measure import Monitor
from inflection_fast.measure.context import merged
from inflection_fast.timeline import Timeline

SIGNALS = ("entropy", "entropy_se", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "delta_cka",
           "loss")  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    scenarios.experts_model().save_pretrained(folder / "experts_model")
    return run_ranks("parallel_scenarios.py", folder, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks("parallel_scenarios.py", tmp_path_factory.mktemp("four"), 4)


def one_process(config=scenarios.EXACT, micro_batches=1, model=None, probe=None):
    """The same training on whole batches, whose micro-batches are gone through one after the other."""
    parts_of = lambda batch: [  # noqa: E731
        {name: value.chunk(micro_batches)[i] for name, value in batch.items()} for i in range(micro_batches)
    ]
    return as_json(train(model or scenarios.model_of(), batches_of("llama")[0], probe, config, parts_of=parts_of))


def assert_same(found, expected):
    assert "raised" not in found, found.get("traceback")
    assert found["steps"] == expected["steps"] and np.min(expected["activation_grad"]) > 1e-5
    assert np.ptp(expected["entropy"]) > 0.1
    for name in SIGNALS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


# ---- pipeline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), [("gpipe", "EXACT"), ("one_forward_one_backward", "SAMPLED")])
def test_the_stages_of_a_pipeline_measure_what_one_process_does(two, name, config):
    found = told(two, name)
    expected = one_process(getattr(scenarios, config), scenarios.MICRO_BATCHES, probe=scenarios.PROBE)
    assert_same(found, expected)
    assert np.min(expected["delta_cka"][1]) > 1e-3
    timeline = Timeline.load(two / name / "run")
    np.testing.assert_array_equal(timeline.entropy, found["entropy"])
    prefixed = ["stage0.layers.0", "stage0.layers.1", "stage1.layers.0"]
    assert found["layers"] == (prefixed if config == "SAMPLED" else ["layers.0", "layers.1", "layers.2"])
    whole = sum(p.numel() for p in scenarios.model_of().parameters())
    assert found["meta"]["model"]["parameters"] == whole
    (stack,) = found["meta"]["stacks"]
    of_blocks = sum(p.numel() for p in scenarios.model_of().layers.parameters())
    assert (stack["layers"], stack["parameters"], stack["trainable"]) == ([0, 1, 2], of_blocks, of_blocks)


def test_a_pipeline_of_stages_that_fsdp_shards_measures_what_one_process_does(four):
    assert_same(told(four, "sharded_pipeline"), one_process(micro_batches=2, probe=scenarios.PROBE))


UNKNOWN = "pipeline: the schedule ScheduleInterleaved1F1B is not known"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown_schedule", [f"ValueError: rank 1: {UNKNOWN}", f"ValueError: {UNKNOWN}; those that are known are"]),
        ("other_number_of_micro_batches", ["the number of micro-batches is 2 on rank 0 and 4 on rank 1"]),
        ("stage_twice", ["the ranks [0, 1] hold the stages [0, 0]; expected each of the 2 once"]),
        ("probe_of_other_names", ["probe: the first stage of the pipeline, Model, needs ['input_ids']"]),
        (
            "probe_that_a_stage_cannot_take",
            ["IndexError: index out of range", "probe: rank 0 failed: index out of range"],
        ),
        ("quantity_across_stages", ["quantities: 'gradient_noise' counts micro-batches of all ranks"]),
        ("probe_entropy_in_a_pipeline", ["probe: no pipeline shows what ['probe_entropy'] look at"]),
        ("stage_without_its_schedule", ["Monitor(stage, pipeline=schedule)"]),
    ],
)
def test_what_cannot_be_measured_in_a_pipeline_is_named_on_all_ranks(two, name, said):
    for rank in range(2):
        assert said[min(rank, len(said) - 1)] in told(two, name, rank)["raised"]


def test_a_pipeline_is_a_schedule_of_torch():
    with pytest.raises(TypeError, match=r"pipeline: expected a schedule of .*, got Linear"):
        Monitor(scenarios.model_of(), pipeline=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="context: expected a DeviceMesh or a process group, got int"):
        Monitor(scenarios.model_of(), context=2)


# ---- context ---------------------------------------------------------------------------------------------------------


def test_ranks_that_share_sequences_measure_what_one_process_does(two):
    assert_same(told(two, "context_by_torch"), one_process(model=scenarios.model_of(causal=False)))
    assert_same(told(two, "context_by_gathered_keys"), one_process())


def test_rows_against_the_keys_of_all_ranks_are_those_of_the_whole(two):
    found = told(two, "context_rows")
    assert "raised" not in found, found.get("traceback")
    assert len(found) == 8
    for name, differences in found.items():
        np.testing.assert_allclose(differences, 0, atol=3e-6, err_msg=name)


def test_shared_sequences_that_nobody_told_of_are_named_at_the_first_step(two):
    assert "its mesh to the monitor: Monitor(model, context=mesh)" in told(two, "context_that_nobody_told")["raised"]
    assert "(rank, attention_detail) would see the keys of one rank alone" in told(two, "calls_under_context")["raised"]


def test_parts_of_rows_merge_by_their_log_sum_exp():
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(3, 5, 24, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 4, 400])[:, None, None]
    )
    logits[0, 0, 8:] = -torch.inf  # parts without any key
    logits[1, 1] = -torch.inf  # a row without any
    whole = ops.attention_stats(logits.float())
    parts = [ops.attention_stats(part.contiguous()) for part in logits.float().split([8, 5, 11], -1)]
    for name, found, expected in zip(whole._fields, merged(parts), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert merged(parts).entropy[1, 1] == 0 and merged(parts).keys[1, 1] == 0


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["experts_of_one_batch", "experts_of_two_batches"])
def test_ranks_that_share_experts_measure_what_one_process_does(two, name):
    assert_same(told(two, name), one_process(model=scenarios.experts_model()))
