"""csrc/core alone, without torch: what the kernels of all devices have in common, against its definition in float64."""

import importlib.util
import itertools
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
    module = tmp_path_factory.mktemp("core") / ("core" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(["c++", *flags, *includes, str(ROOT / "tests/core/bindings.cpp"), "-o", str(module)], check=True)
    spec = importlib.util.spec_from_file_location("core", module)
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
    reported = state.report()
    for name, value in truth(x).items():
        assert abs(reported[name] - value) <= tolerance * max(1, abs(value)), name
    assert reported["max_logit"] == x.max() and reported["keys"] == (x > -np.inf).sum()
    assert abs(reported["lse"] + np.float64(reported["lse_low"]) - truth(x)["lse"]) <= 1e-7 * max(1, x.size**0.5)


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
    assert left.report() == right.report() == pushed(core, x).report()


def test_no_key_has_the_stated_values(core):
    assert pushed(core, np.full(5, -np.inf)).report() == {
        "entropy": 0, "lse": -np.inf, "lse_low": 0, "max_logit": -np.inf, "keys": 0, "collision": 0, "sink": 0,
    }  # fmt: skip


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_survives_every_merge(core, poison):
    x = np.array([1.0, poison, 2.0, -np.inf])
    state = pushed(core, x)
    state.merge(pushed(core, np.array([5.0, -5.0])))
    other = pushed(core, np.array([7.0]))
    other.merge(state)
    for broken in (state, other):
        values = broken.report()
        assert all(np.isnan(values[name]) for name in ("entropy", "lse", "max_logit", "collision", "sink"))
        assert values["keys"] == (5 if broken is state else 6)


def test_the_sink_is_the_probability_of_the_column_that_was_seen(core):
    left, right = pushed(core, np.array([2.0, 1.0])), pushed(core, np.array([4.0]))
    left.see_first(2.0)
    right.merge(left)
    assert abs(right.report()["sink"] - np.exp(2.0) / np.exp([2.0, 1.0, 4.0]).sum()) < 1e-7


def test_what_a_sum_loses_is_exact(core):
    a, b = np.float32(1.0), np.float32(1e-5 / 3)
    assert np.float64(a + b) + core.lost_in_sum(a, b) == np.float64(a) + np.float64(b)


def test_the_gradient_of_a_row_is_that_of_its_statistics(core):
    """Against differences of the statistics in float64."""
    random = np.random.default_rng(1)
    scores, grads = random.standard_normal(7), random.standard_normal(4)

    def statistics(s):
        lse = np.log(np.exp(s).sum())
        p = np.exp(s - lse)
        return np.array([(p * (lse - s)).sum(), lse, (p * p).sum(), p[0]])

    def loss(s):
        return (grads * statistics(s)).sum()

    step = 1e-6
    expected = [(loss(scores + e) - loss(scores - e)) / (2 * step) for e in np.eye(7) * step]
    row = statistics(scores)
    found = core.gradient(list(scores - row[1]), list(row), list(grads))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.isnan(core.gradient([-1.0, -2.0], list(row), [np.inf, 0.0, 0.0, 0.0])).all()
    assert core.gradient([-1.0, -2.0], [0.0, -np.inf, 0.0, 0.0], [np.inf] * 4) == [0.0, 0.0]  # no keys


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left, right", [(-1, -1), (2, 0), (0, 3)])
@pytest.mark.parametrize("starts", [[], [0, 4, 5, 9], [2, 6, 8]])
def test_rows_and_keys_find_each_other(core, causal, left, right, starts):
    length, packed = 9, []
    for i in range(length) if starts else []:
        inside = [pair for pair in itertools.pairwise(starts) if pair[0] <= i < pair[1]]
        packed += inside[0] if inside else (0, 0)
    found = core.rows_and_keys(length, left, right, causal, packed)
    for i in range(length):
        low, high, _, _, sink = found[i]
        begin, end = packed[2 * i : 2 * i + 2] if packed else (0, length)
        attended = [
            j for j in range(begin, end)
            if (left < 0 or j >= i - left) and (right < 0 or j <= i + right) and (not causal or j <= i)
        ]  # fmt: skip
        assert list(range(low, high)) == attended and sink == begin
        if end > begin:  # a key that is in no sequence has no rows, whatever is said of it
            assert [k for k in range(length) if found[k][2] <= i < found[k][3] and begin <= k < end] == attended


@pytest.mark.parametrize(
    "scale, keep, expected",
    [
        (0.5, True, [1, 0.5]),
        (-3.0, True, [-1, 3]),
        (0.5, False, [0.5, 1]),
        (1e-30, True, [1e-30, 1]),
        (0.0, True, [0, 1]),
    ],
)
def test_a_scale_is_taken_apart_where_nothing_follows_it(core, scale, keep, expected):
    assert core.scale(scale, keep) == expected


@pytest.mark.parametrize("dim", [1, 4, 101])
def test_the_massive_limit_is_a_thousand_lower_medians(core, dim):
    x = np.abs(np.random.default_rng(dim).standard_normal(dim)).astype(np.float32)
    if dim > 1:
        x[0] = 1e5
    median = np.sort(x)[(dim - 1) // 2]
    if dim == 1:
        assert np.isnan(core.massive_limit(x))  # the largest is below a thousand medians: none is massive
    else:
        assert core.massive_limit(x) == float(median) * 1000.0


@pytest.mark.parametrize("debiased", [False, True])
def test_terms_of_cka_are_those_of_the_centred_gram_matrices(core, debiased):
    n, random = 12, np.random.default_rng(3)
    u, v = random.standard_normal((n, 3)) + 0.2, random.standard_normal((n, 4))
    p, q, d = (u * u).sum(1), (v * v).sum(1), {0: u.mean(0), 1: v.mean(0)}
    sides, pairs = {0: u, 1: v}, [(0, 1), (0, 0), (1, 1)]
    centred = {i: x - x.mean(0) for i, x in sides.items()}
    sums = [p.sum(), q.sum(), *(d[i] @ d[i] for i in (0, 1)), *(d[i] @ (p @ sides[i]) for i in (0, 1))]
    sums += [*(d[i] @ (q @ sides[i]) for i in (0, 1)), p @ q, p @ p, q @ q]
    sums += [((centred[i].T @ centred[j]) ** 2).sum() for i, j in pairs]
    sums += [sides[i].sum(0) @ (sides[i].T @ sides[j]) @ sides[j].sum(0) for i, j in pairs]
    for term, (i, j) in enumerate(pairs):
        k, l = centred[i] @ centred[i].T, centred[j] @ centred[j].T  # noqa: E741
        expected = (k * l).sum()
        if debiased:  # n (n - 3) HSIC_1 of Song et al. 2012
            k, l = (m - np.diag(np.diag(m)) for m in (k, l))  # noqa: E741
            expected = (k * l).sum() + k.sum() * l.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * k.sum(0) @ l.sum(0)
        assert abs(core.cka_term(float(n), sums, term, debiased) - expected) < 1e-9 * abs(expected)
    assert np.isnan(core.cka_term(3.0, sums, 0, True)) and core.cka_term(float(n), [0.0] * 17, 1, False) == 0.0
