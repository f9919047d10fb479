"""csrc/core/row_state.h alone: a commutative monoid whose values are the truth, however a row is cut."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.sources


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    module = tmp_path_factory.mktemp("core") / ("row_state" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(["c++", *flags, *includes, str(ROOT / "tests/core/bindings.cpp"), "-o", str(module)], check=True)
    spec = importlib.util.spec_from_file_location("row_state", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def pushed(core, x):
    state = core.RowState()
    state.push(x.astype(np.float32))
    return state


def truth(x):
    x = x[x > -np.inf].astype(np.float64)
    p = np.exp(x - x.max())
    lse = x.max() + np.log(p.sum())
    p /= p.sum()
    return {"entropy": (p * (lse - x)).sum(), "lse": lse, "collision": (p * p).sum()}


def assert_values(state, x, tolerance=3e-6):
    for name, value in truth(x).items():
        assert abs(getattr(state, name)() - value) <= tolerance * max(1, abs(value)), name
    assert state.max == x.max() and state.keys == (x > -np.inf).sum()


@pytest.mark.parametrize("std", [0.01, 3.0, 100.0])
def test_pushing_gives_the_truth(core, std):
    x = (np.random.default_rng(0).standard_normal(300) * std).astype(np.float32)
    assert_values(pushed(core, x), x)


@pytest.mark.parametrize("seed", range(8))
def test_any_split_in_any_order_merges_to_the_same(core, seed):
    random = np.random.default_rng(seed)
    x = (random.standard_normal(200) * 5).astype(np.float32)
    x[random.integers(200)] = 40
    x[random.random(200) < 0.2] = -np.inf
    parts = np.split(x, np.sort(random.integers(0, 200, size=9)))
    states = [pushed(core, part) for part in parts]
    random.shuffle(states)
    while len(states) > 1:  # merge random neighbours: any tree
        i = random.integers(len(states) - 1)
        states[i].merge(states.pop(i + 1))
    assert_values(states[0], x)


def test_an_empty_state_is_neutral_on_both_sides(core):
    x = np.array([1.0, -3.0, 2.5], dtype=np.float32)
    left, right = core.RowState(), pushed(core, x)
    left.merge(right)
    right.merge(core.RowState())
    for name in ("entropy", "lse", "collision"):
        assert getattr(left, name)() == getattr(right, name)() == getattr(pushed(core, x), name)()


def test_no_key_has_the_stated_values(core):
    state = pushed(core, np.full(5, -np.inf))
    assert (state.entropy(), state.lse(), state.collision(), state.sink(), state.keys) == (0, -np.inf, 0, 0, 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_survives_every_merge(core, poison):
    x = np.array([1.0, poison, 2.0, -np.inf])
    state = pushed(core, x)
    state.merge(pushed(core, np.array([5.0, -5.0])))
    other = pushed(core, np.array([7.0]))
    other.merge(state)
    for broken in (state, other):
        assert all(np.isnan(getattr(broken, name)()) for name in ("entropy", "collision"))


def test_the_sink_is_the_probability_of_the_column_that_was_seen(core):
    left, right = pushed(core, np.array([2.0, 1.0])), pushed(core, np.array([4.0]))
    left.see_first(2.0)
    right.merge(left)
    assert abs(right.sink() - np.exp(2.0) / np.exp([2.0, 1.0, 4.0]).sum()) < 1e-7
