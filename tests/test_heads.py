"""Lazy layers and collapsed heads, from timelines made by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

from inflection_fast import Plan, SelectConfig, select

sys.path.insert(0, str(Path(__file__).parent / "spec"))
from profiles import timeline

LAYERS, HEADS, STEPS = 4, 3, 5


def measured(**columns):
    made = timeline([2.0] * LAYERS, [-1.0] * LAYERS, heads=HEADS)
    steps = len(made.steps)
    for name, values in columns.items():
        object.__setattr__(made, name, np.broadcast_to(np.asarray(values, float), (steps, LAYERS, HEADS)).copy())
    return made


RANKS = [[9, 3, 1.2], [1.1, 1.2, 1.0], [1.4, 1.0, 1.1], [1.0, 1.1, 1.2]]
MASSES = [[0.1, 0.2, 0.9], [0.9, 0.8, 0.95], [0.02, 0.03, 0.02], [0.6, 0.6, 0.6]]


def test_lazy_layers_have_rank_one_in_one_column_in_every_head():
    found = select(measured(rank_k90=RANKS, column_mass=MASSES), SelectConfig("lazy"))
    assert found.layers == (1, 3)  # block 0 has a head of rank 9; block 2 attends uniformly, which is rank one, too
    assert found.reasons[1] == (
        "Block 1 is lazy: no head needs more than 1.20 singular values for 90 % of the squared norm of its attention, "
        "and a single column has 88% of it."
    )
    np.testing.assert_allclose(found.scores, [1 / 9, 1 / 1.2, 1 / 1.4, 1 / 1.2])
    assert found.found == {"lazy": [1, 3]} and "Lazy blocks" in found.summary
    assert select(measured(rank_k90=RANKS, column_mass=MASSES), SelectConfig("lazy", lazy_mass=0.7)).layers == (1,)
    assert select(measured(rank_k90=RANKS, column_mass=MASSES), SelectConfig("lazy", lazy_rank=10)).layers == (1, 3)
    none = select(measured(rank_k90=RANKS, column_mass=MASSES), SelectConfig("lazy", lazy_rank=1.05))
    assert none.layers == () and "No block is lazy: the lowest largest k* is 1.20, in block 1" in none.summary


def test_missing_values_and_heads_do_not_count():
    ranks = np.array(RANKS, float)
    ranks[1], ranks[0, :2] = np.nan, np.nan
    found = select(measured(rank_k90=ranks, column_mass=np.where(np.isnan(ranks), np.nan, 0.9)), SelectConfig("lazy"))
    assert found.layers == (0, 2, 3) and np.isnan(found.scores[1])
    nothing = select(measured(rank_k90=np.nan, column_mass=np.nan), SelectConfig("lazy"))
    assert nothing.layers == () and "no values of rank_k90" in nothing.summary


@pytest.mark.parametrize("present", ["rank_k90", "column_mass"])
def test_a_missing_column_is_named_with_what_measures_it(present):
    missing = ({"rank_k90", "column_mass"} - {present}).pop()
    made = measured(**{present: 1.0})
    if getattr(made, missing, None) is None:
        with pytest.raises(ValueError, match=rf"no column {missing}; measure the quantity 'rank'"):
            select(made, SelectConfig("lazy"))


def test_collapsed_heads_are_named_with_what_else_is_known(tmp_path):
    entropy = [[2.0, 1.0, 0.5], [0.01, 1.0, 0.04], [2.0, np.nan, 0.06], [np.nan] * 3]
    made = measured(entropy=entropy, sink=[[0.1] * 3, [0.99, 0.1, np.nan], [0.1] * 3, [0.1] * 3], rank_k90=RANKS)
    found = select(made, SelectConfig("collapsed"))
    assert found.layers == (1,) and found.heads == {1: (0, 2)}
    assert found.reasons[1] == (
        "Block 1 has collapsed heads: head 0 with 0.010 nats (rank 1.1, 99% on the first key); "
        "head 2 with 0.040 nats (rank 1.0)."
    )
    np.testing.assert_allclose(found.scores, [0, 2 / 3, 0, np.nan])
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").heads == {1: (0, 2)}
    assert select(made, SelectConfig("collapsed", collapsed_entropy=0.07)).heads == {1: (0, 2), 2: (2,)}
    healthy = select(measured(entropy=1.5), SelectConfig("collapsed"))
    assert healthy.layers == () and "No head is collapsed: the lowest, head 0 of block 0, has 1.500" in healthy.summary


@pytest.mark.parametrize("options", [{"lazy_rank": 0}, {"lazy_mass": 1.5}, {"collapsed_entropy": 0}])
def test_bad_limits_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SelectConfig("lazy", **options)
