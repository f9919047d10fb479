"""The statistics of the study, on cells whose truth is known."""

import json

import numpy as np
import pytest
from helpers.study_cells import cell, planted, study
from scipy import stats

from inflection_fast.study.analysis import (
    block_effects,
    compare,
    compare_all,
    compare_within,
    costs,
    expected_jaccard,
    holm,
    jaccard,
    means,
    stability,
)
from inflection_fast.study.report import write
from inflection_fast.study.results import read_results


def test_a_planted_difference_is_found_and_none_is_not(tmp_path):
    effect = compare(planted(tmp_path / "a", 0.05).cells, "greedy", "random")
    assert effect.low < 5 < effect.high and effect.p < 1e-4 and effect.clusters == 24
    effect = compare(planted(tmp_path / "b", 0.0).cells, "greedy", "random")
    assert effect.low < 0 < effect.high


def test_the_interval_covers_the_truth_as_often_as_it_says(tmp_path):
    covered = 0
    for seed in range(60):
        results = planted(tmp_path / str(seed), 0.0, transfers=3, seeds=4, n=60, spread=0.05, seed=seed)
        effect = compare(results.cells, "greedy", "random")
        covered += effect.low <= 0 <= effect.high
    # 57 are expected; fewer than 50 of 60 would have a chance below 1 %.
    assert covered >= 50


def test_with_equal_cells_the_interval_is_that_of_a_t_test_over_clusters(tmp_path):
    results = planted(tmp_path, 0.02, n=97)
    effect = compare(results.cells, "greedy", "random")
    right = {}
    for one in results.cells:
        right.setdefault((one.transfer, one.seed, one.arm), []).append(one.right.mean())
    places = sorted({key[:2] for key in right})
    means_ = np.array([np.mean(right[(*p, "greedy")]) - np.mean(right[(*p, "random")]) for p in places])
    # The clustered errors of a mean divide by G - 1 as a t test does, with statsmodels' factor (N - 1) / (N - 1).
    low, high = stats.t.interval(0.95, len(means_) - 1, means_.mean(), means_.std(ddof=1) / np.sqrt(len(means_)))
    assert effect.difference == pytest.approx(100 * means_.mean())
    assert (effect.low, effect.high) == pytest.approx((100 * low, 100 * high), rel=1e-3)
    assert effect.p == pytest.approx(stats.ttest_1samp(means_, 0).pvalue, rel=1e-2)


def test_within_transfers_the_interval_is_that_of_welch_over_seeds(tmp_path):
    rng, cells, by_transfer = np.random.default_rng(3), [], []
    for transfer, gain, seeds, spread in (("a", 0.3, 4, 0.1), ("b", 0.0, 7, 0.02), ("c", -0.1, 3, 0.05)):
        differences = []
        for seed in range(seeds):
            right, other = rng.random(200) < 0.5 + gain + rng.normal(0, spread), rng.random(200) < 0.5
            cells += [
                cell(transfer, "over", "greedy", seed, right),
                cell(transfer, "over", "random", seed, other, draw=0),
            ]
            differences.append(100 * (right.mean() - other.mean()))
        by_transfer.append(np.array(differences))
    effect = compare_within(study(tmp_path, cells).cells, "greedy", "random")
    variances = np.array([x.var(ddof=1) / len(x) for x in by_transfer])
    freedom = variances.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, by_transfer, strict=True))
    mean, error = np.mean([x.mean() for x in by_transfer]), np.sqrt(variances.sum()) / 3
    assert (effect.difference, effect.error, effect.freedom) == pytest.approx((mean, error, freedom))
    assert (effect.low, effect.high) == pytest.approx(stats.t.interval(0.95, freedom, mean, error))
    assert effect.p == pytest.approx(2 * stats.t.sf(mean / error, freedom)) and effect.clusters == 14
    two = [x for x in study(tmp_path, cells).cells if x.transfer != "c"]
    assert compare_within(two, "greedy", "random").texts == 11 * 200
    one_seed = [x for x in two if x.transfer == "a" or x.seed == 0]
    assert compare_within(one_seed, "greedy", "random") is None


def test_differences_between_transfers_do_not_widen_the_interval_within_them(tmp_path):
    rng, cells = np.random.default_rng(4), []
    for transfer, gain in (("a", 0.3), ("b", 0.0), ("c", 0.0)):
        for seed in range(5):
            cells.append(cell(transfer, "over", "last", seed, rng.random(2000) < 0.5 + gain))
            cells.append(cell(transfer, "over", "random", seed, rng.random(2000) < 0.5, draw=0))
    found = study(tmp_path, cells).cells
    within, pooled = compare_within(found, "last", "random"), compare(found, "last", "random")
    assert within.difference == pytest.approx(pooled.difference)
    assert within.low > 8 and within.p < 1e-6 and pooled.error > 3 * within.error


def test_every_transfer_has_the_same_weight_whatever_its_texts(tmp_path):
    cells = []
    for seed in (1, 2):
        for transfer, n, gain in (("big", 1000, 0), ("small", 50, 1)):
            cells.append(cell(transfer, "over", "greedy", seed, np.full(n, gain)))
            cells.append(cell(transfer, "over", "random", seed, np.zeros(n), draw=0))
    effect = compare(study(tmp_path, cells).cells, "greedy", "random")
    assert effect.difference == pytest.approx(50)


def test_the_smallest_difference_is_found_four_times_in_five(tmp_path):
    effect = compare(planted(tmp_path, 0.0).cells, "greedy", "random")
    error = (effect.high - effect.low) / 2 / stats.t.ppf(0.975, effect.clusters - 1) / 100
    power = stats.nct.sf(stats.t.ppf(0.975, effect.clusters - 1), effect.clusters - 1, effect.smallest / 100 / error)
    assert power == pytest.approx(0.8, abs=0.02)


def test_the_difference_that_is_needed_is_just_significant_after_correction(tmp_path):
    effect = compare(planted(tmp_path / "none", 0.0).cells, "greedy", "random")
    needed = effect.needed(0.01, tests=7)
    assert 7 * 2 * stats.t.sf(needed / effect.error, effect.clusters - 1) == pytest.approx(0.01)
    short = effect.needed(0.01, tests=1) - effect.difference
    row = next(line for line in write(tmp_path / "none").read_text().splitlines() if line.startswith("| `greedy`"))
    assert f"| {short:.2f} |" in row
    planted(tmp_path / "some", 0.05)
    row = next(line for line in write(tmp_path / "some").read_text().splitlines() if line.startswith("| `greedy`"))
    assert "| reached |" in row


def test_alike_trainings_have_no_difference_and_no_error(tmp_path):
    cells = [cell("t", "over", arm, seed, [1, 0, 1]) for arm in ("greedy", "random") for seed in (1, 2)]
    effect = compare(study(tmp_path, cells).cells, "greedy", "random")
    assert (effect.difference, effect.low, effect.high, effect.p) == (0, 0, 0, 1)


def test_one_cluster_gives_no_interval(tmp_path):
    cells = [cell("t", "over", arm, 1, [1, 0, 1]) for arm in ("greedy", "random")]
    assert compare(study(tmp_path, cells).cells, "greedy", "random") is None


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests(tmp_path):
    results = planted(tmp_path, 0.01)
    effect = compare(results.cells, "greedy", "random")
    corrected = holm({"a": effect, "b": effect})
    assert corrected == {"a": pytest.approx(min(1, 2 * effect.p)), "b": pytest.approx(min(1, 2 * effect.p))}
    assert list(compare_all(results.cells, ["greedy", "nowhere"], "random")) == ["greedy"]


def test_the_worth_of_blocks_is_found_from_random_draws(tmp_path):
    rng = np.random.default_rng(0)
    worth = np.array([-0.06, -0.02, 0.0, 0.01, 0.02, 0.05])
    cells = []
    for transfer in range(4):
        for seed in range(6):
            base = rng.uniform(0.6, 0.7)
            for draw in range(5):
                layers = sorted(rng.choice(6, 3, replace=False).tolist())
                right = rng.random(1500) < base + worth[layers].sum()
                cells.append(cell(f"t{transfer}", "over", "random", seed, right, draw=draw, layers=layers))
    found = block_effects(study(tmp_path, cells).cells)
    estimate = np.array([value for _, value, _, _ in found])
    truth = 100 * (worth - worth.mean())
    assert estimate.sum() == pytest.approx(0, abs=1e-8)
    assert estimate == pytest.approx(truth, abs=1.0)
    assert all(low < true < high for (_, _, low, high), true in zip(found, truth, strict=True))


def test_jaccard_of_random_draws_is_the_expected_one():
    rng = np.random.default_rng(0)
    draws = [rng.choice(6, 3, replace=False).tolist() for _ in range(300)]
    assert jaccard(draws) == pytest.approx(expected_jaccard(3, 6), abs=0.02)
    assert jaccard([[0, 1], [0, 1]]) == 1 and jaccard([[0], [1]]) == 0 and np.isnan(jaccard([[0]]))


def test_stability_compares_seeds_of_one_place_only(tmp_path):
    cells = [cell(t, "over", "greedy", s, [1, 0], layers=(i,)) for i, t in enumerate("ab") for s in (1, 2)]
    assert stability(study(tmp_path, cells).cells, "greedy") == 1


def test_costs_and_means_are_read_from_the_cells(tmp_path):
    results = study(tmp_path, [cell("t", "over", "greedy", s, [1, 1, 0, 0]) for s in (1, 2)])
    spent = costs(results.cells, "greedy")
    assert spent["train_cpu_s"] == 3 and spent["choose_steps"] == 5 and spent["forgotten"] == pytest.approx(20)
    assert means(results.cells) == {"greedy": 50}


# ---- the page --------------------------------------------------------------------------------------------------------


def test_hypotheses_are_tested_on_their_own_cells_which_stay_out_of_the_pool(tmp_path):
    rng = np.random.default_rng(5)
    cells = []
    for transfer, gain, held_out in (("a", 0.0, False), ("b", 0.0, False), ("x", 0.2, True), ("y", 0.2, True)):
        for seed in range(4):
            facts = {"held_out": held_out}
            cells.append(cell(transfer, "over", "last", seed, rng.random(500) < 0.5 + gain, **facts))
            cells.append(cell(transfer, "over", "random", seed, rng.random(500) < 0.5, draw=0, **facts))
    pooled_page = (write(tmp_path) if study(tmp_path, cells[:16]) else None).read_text()
    family = {"arms": ["last"], "transfers": ["x", "y"], "seeds": None}
    (tmp_path / "confirmations.json").write_text(json.dumps({"held_out": family}))
    results = study(tmp_path, cells)
    assert {one.transfer for one in results.pooled()} == {"a", "b"}
    page = write(tmp_path).read_text()
    section = page.split("## Confirmed on cells of their own?")[1].split("\n## ")[0]
    assert "16 cells: 2 transfers" in section and "after Holm: `last`. Worse: none" in section
    row = next(line for line in page.splitlines() if line.startswith("| `last` |"))
    assert row in pooled_page and "after Holm: none." in page


def test_the_page_marks_learning_rates_at_an_end_of_those_that_were_tried(tmp_path):
    planted(tmp_path, 0.0, transfers=2, seeds=2, n=20)
    found = {}
    for arm, taken in (("low", 0.1), ("inner", 0.2), ("high", 0.3)):
        tried = [{"learning_rate": rate, "accuracy": 0.5, "loss": 0.5} for rate in (0.1, 0.2, 0.3)]
        found[f"{arm}-over"] = {"arm": arm, "regime": "over", "learning_rate": taken, "tried": tried, "transfers": []}
    (tmp_path / "rates.json").write_text(json.dumps(found))
    rows = [line.split(" | ")[-1] for line in write(tmp_path).read_text().splitlines() if "0.2: 0.500" in line]
    assert rows == ["0.1, the smallest |", "0.2 |", "0.3, the largest |"]


def test_the_page_says_which_selectors_beat_random_layers_and_keeps_leaking_cells_apart(tmp_path):
    planted(tmp_path, 0.08)
    leaky = [cell("leaky", "over", "greedy", s, np.ones(50), leaking=True) for s in (1, 2)]
    leaky += [cell("leaky", "over", "random", s, np.zeros(50), leaking=True, draw=0) for s in (1, 2)]
    results = study(tmp_path, leaky)
    before = [r for r in results.cells if not r.leaking]
    page = write(tmp_path).read_text()
    effect = compare(before, "greedy", "random")
    assert f"{effect.smallest:.2f} points" in page and f"+{effect.difference:.2f} [" in page
    assert page.index("smallest difference") < page.index("Planned minus random")
    assert "Better than random layers at p < 0.01 after Holm: `greedy`" in page
    assert "These cells are in no number above." in page and "leaky" in page
    assert (tmp_path / "study_images" / "against_random.png").is_file()


def test_an_intervention_is_compared_with_the_same_adapters_without_it(tmp_path):
    planted(tmp_path, 0.0)
    rng = np.random.default_rng(7)
    for found in [one for one in read_results(tmp_path).cells if one.arm == "greedy"]:
        right = found.right | (rng.random(len(found.right)) < 0.1)
        name, content = cell(found.transfer, found.regime, "greedy_softer", found.seed, right)
        content["run_info"]["peft_config"]["options"] = {"intervention": "softer"}
        study(tmp_path, [(name, content)])
    results = read_results(tmp_path)
    page = write(tmp_path).read_text()
    section = page[page.index("## Interventions") :].split("##")[1]
    effect = compare(results.cells, "greedy_softer", "greedy")
    assert (
        effect.low > 1
        and f"| `greedy_softer` | `greedy` | 24 | {effect.smallest:.2f} | +{effect.difference:.2f} [" in section
    )
    assert "`greedy_softer`" not in page.split("## All arms")[0], "an intervention is no way to choose blocks"


def test_arms_of_other_sizes_are_marked(tmp_path):
    cells = []
    for seed in (1, 2, 3):
        for arm, adapter in (("random", 100), ("first", 102), ("last", 104)):
            cells.append(cell("t", "over", arm, seed, np.arange(9) % (seed + 1) == 0, draw=0, adapter=adapter))
    study(tmp_path, cells)
    page = write(tmp_path).read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| `")}
    rows = [line for line in page.splitlines() if line.startswith("| `last`") and "equal" in line]
    assert "not equal: 4 % apart" in rows[0] and lines
    assert [line for line in page.splitlines() if line.startswith("| `first`") and line.endswith("| equal |")]


def test_the_page_is_the_same_when_it_is_written_again(tmp_path):
    planted(tmp_path, 0.02)
    first = write(tmp_path).read_bytes()
    assert write(tmp_path).read_bytes() == first


def test_failed_cells_are_listed(tmp_path):
    planted(tmp_path, 0.0)
    name, content = cell("t9", "over", "greedy", 1, [1], error="NoArm: no such modules")
    study(tmp_path, [(name, content)])
    assert "NoArm: no such modules" in write(tmp_path).read_text()


def test_a_damaged_cell_is_named(tmp_path):
    results = planted(tmp_path, 0.0)
    path = tmp_path / "cells" / f"{results.cells[0].name}.json"
    content = json.loads(path.read_text())
    content["train_info"]["metrics"][0]["test"]["correct"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"0\.json is not a cell of a study: .* contradict"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no cells"):
        read_results(tmp_path / "empty")
