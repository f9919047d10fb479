"""When to measure, which rows, and configurations that make no sense."""

import dataclasses

import pytest
import torch

from inflection_fast.measure import MonitorConfig
from inflection_fast.measure.schedule import RowSampler, is_due

CPU = torch.device("cpu")


def test_steps_are_due_from_zero_on():
    assert [step for step in range(13) if is_due(step, 5)] == [0, 5, 10]
    assert all(is_due(step, 1) for step in range(5))


@pytest.mark.parametrize("length, rows", [(64, 63), (100, 64), (1000, 7), (5, 2)])
def test_one_position_is_drawn_out_of_every_stratum(length, rows):
    sampler = RowSampler(rows, 0, CPU)
    seen = set()
    for step in range(200 if length < 200 else 20):
        sampler.begin(step)
        strata = sampler.draw(length)
        ends = strata.weights.cumsum(0)
        assert strata.rows.shape == strata.weights.shape == (rows,) and ends[-1] == length
        assert ((strata.rows < ends) & (strata.rows >= ends - strata.weights)).all()
        assert strata.weights.max() - strata.weights.min() <= 1
        seen |= set(strata.rows.tolist())
    assert length > 200 or seen == set(range(length))


def test_every_position_is_taken_where_there_are_no_more_than_rows():
    for sampler, length in (
        (RowSampler(None, 0, CPU), 10_000),
        (RowSampler(64, 0, CPU), 64),
        (RowSampler(64, 0, CPU), 3),
    ):
        assert sampler.draw(length).rows is None


def test_draws_depend_on_seed_and_step_alone():
    def rows(seed, step, sampler=None):
        sampler = sampler or RowSampler(8, seed, CPU)
        sampler.begin(step)
        return sampler.draw(500).rows.tolist(), sampler.draw(500).rows.tolist()

    used = RowSampler(8, 3, CPU)
    rows(3, 1, used)
    assert rows(3, 7) == rows(3, 7, used)  # whatever was drawn before: a resumed run samples the same rows
    assert len({str(rows(seed, step)) for seed in range(3) for step in range(3)}) == 9
    first, second = rows(0, 0)
    assert first != second  # micro-batches have draws of their own


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("every", 0, ValueError),
        ("every", 2.0, TypeError),
        ("every", True, TypeError),
        ("rows", 1, ValueError),
        ("rows", "all", TypeError),
        ("signals", (), ValueError),
        ("signals", ("entropy",), ValueError),
        ("signals", ("attention", "attention"), ValueError),
        ("signals", "attention", TypeError),
        ("blocks", "layer", TypeError),
        ("blocks", (), ValueError),
        ("blocks", (1,), TypeError),
        ("probe_every", 15, ValueError),
        ("probe_every", 0, ValueError),
        ("cka_rank", 0, ValueError),
        ("cka_debiased", 1, TypeError),
        ("cka_pooling", "max", ValueError),
        ("cka_rows", 3, ValueError),
        ("cka_reference", "zero", ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", None, TypeError),
    ],
)
def test_nonsense_is_refused_by_name_and_value(field, value, error):
    with pytest.raises(error, match=rf"^{field}: expected .*got .*"):
        MonitorConfig(**{field: value})


def test_configurations_are_frozen_and_take_lists():
    config = MonitorConfig(signals=["attention"], blocks=["a", "b"], probe_every=30)
    assert config.signals == ("attention",) and config.blocks == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.every = 3
