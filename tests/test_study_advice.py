"""Claims and advice of the study, on cells whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.study_cells import cell, planted, study

from inflection_fast.study.advice import for_runs, score_rule
from inflection_fast.study.report import write
from inflection_fast.study.results import read_results


def sources(share):
    """Sources of four transfers whose saturation is `share` UNDER and OVER."""
    return {
        f"t{i}-{regime}": {"transfer": f"t{i}", "regime": regime,
                           "saturation": {"test": {"share_above_099": value + 0.01 * i}}}
        for i in range(4) for regime, value in zip(("under", "over"), share, strict=True)
    }  # fmt: skip


def choices(lower):
    """Measurements whose lower gradients are those factors of the last block's."""
    found = {}
    for i in range(4):
        for regime, factor in zip(("under", "over"), lower, strict=True):
            norms = [factor * (1 + 0.01 * i), factor, factor, 1, 1, 1]
            found[f"t{i}-{regime}-1"] = {
                "activation_grad": norms,
                "top": {"0.5": [0]},
                "greedy": {"1": [0]},
                "found": {},
            }
    return found


def test_claims_hold_where_they_are_true_and_not_where_they_are_not(tmp_path):
    def page(share, lower):
        planted(tmp_path, 0.0)
        (tmp_path / "sources.json").write_text(json.dumps(sources(share)))
        (tmp_path / "choices.json").write_text(json.dumps(choices(lower)))
        rows = write(tmp_path).read_text().splitlines()
        return {
            row.split("|")[1].strip()[:2]: row.split("|")[2].strip() for row in rows if row.startswith(("| 1a", "| 1b"))
        }

    assert page((0.1, 0.8), (1.0, 0.5)) == {"1a": "held", "1b": "held"}
    assert page((0.8, 0.1), (0.5, 1.0)) == {"1a": "the opposite held", "1b": "the opposite held"}
    assert page((0.5, 0.5), (1.0, 1.0)) == {"1a": "did not hold here", "1b": "did not hold here"}


def advised(folder, gain_above):
    """Cells in which `all` wins below a sureness of 0.8 and the family of that gain above."""
    cells = []
    for transfer in range(4):
        for regime, sure in (("under", 0.7 + transfer / 100), ("over", 0.9 + transfer / 100)):
            for arm in ("greedy", "all", "shallow"):
                gain = {"greedy": 0, "all": 4, "shallow": 0}[arm] if sure < 0.8 else gain_above[arm]
                right = np.arange(100) < 60 + gain
                name, content = cell(f"t{transfer}", regime, arm, 1, right)
                saturation = content["meta_info"]["dataset_info"]["source_training"]["saturation"]
                saturation["test"]["largest_probability"] = sure
                cells.append((name, content))
    return study(folder, cells)


def test_a_rule_that_is_there_is_found_on_transfers_that_are_left_out(tmp_path):
    score = score_rule(advised(tmp_path, {"greedy": 0, "all": 0, "shallow": 8}).cells)
    assert score.means == pytest.approx((66, 64, 66))
    assert score.advice.startswith("unfreezing above 0.8") and "LoRA everywhere below" in score.advice


def test_a_rule_by_probes_is_found_where_saturation_says_nothing(tmp_path):
    """`all` wins where the last block's probe is behind the best block's; how sure a source is has nothing to say."""
    cells, probes = [], {}
    for transfer, sure in enumerate((0.7, 0.9, 0.7, 0.9)):
        for regime, lost in (("under", 0.2), ("over", 0.0)):
            probes[f"t{transfer}-{regime}"] = {"accuracy": [0.6, 0.8, 0.8 - lost]}
            for arm in ("greedy", "all", "shallow"):
                gain = 4 * (arm == "all") if lost else 8 * (arm == "shallow")
                name, content = cell(f"t{transfer}", regime, arm, 1, np.arange(100) < 60 + gain)
                source = content["meta_info"]["dataset_info"]["source_training"]
                source["saturation"]["test"]["largest_probability"] = sure
                cells.append((name, content))
    cells = study(tmp_path, cells).cells
    assert not score_rule(cells).better
    score = score_rule(cells, probes)
    assert score.better and score.means == pytest.approx((66, 64, 66)) and "probe" in score.advice
    assert score_rule(cells, {name: one for name, one in probes.items() if name < "t2"}) is None
    (tmp_path / "probes.json").write_text(json.dumps(probes))
    assert "reaches 66.00 %, and is ahead of always one family (64.00 %)" in write(tmp_path).read_text()


def test_without_a_rule_the_advice_is_one_family(tmp_path):
    score = score_rule(advised(tmp_path, {"greedy": 0, "all": 4, "shallow": 0}).cells)
    assert score.means == pytest.approx((64, 64, 64))
    assert score.advice == "LoRA everywhere, whatever the state of the source."


@pytest.mark.sources
def test_the_report_of_a_run_says_what_the_published_cells_say():
    root = Path(__file__).resolve().parents[1]
    found = for_runs(read_results(root / "benchmarks" / "study").pooled())
    assert found == json.loads((root / "inflection_fast" / "report" / "regime.json").read_text())


def test_too_few_transfers_give_no_rule(tmp_path):
    results = advised(tmp_path, {"greedy": 0, "all": 0, "shallow": 8})
    assert score_rule([c for c in results.cells if c.transfer in ("t0", "t1")]) is None
