"""The card of an adapter tells its plan."""

import pytest
from helpers import trainers
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import Plan, inject
from inflection_fast.act.card import write_section


@pytest.fixture
def plan():
    names = [f"bert.encoder.layer.{i}" for i in range(3)]
    return Plan(
        layers=(1, 2),
        summary="Two of three.",
        reasons={1: "entropy | minimum", 2: "beside it"},
        scores=[0.0, 1.0, 0.5],
        profile={"entropy": [1.0, 0.5, 0.7], "activation_grad": [1.0, 1.0, 0.1]},
        config={"method": "greedy", "window": 1, "k": None},
        model={"model_type": "bert", "layers": names},
    )


def test_save_pretrained_writes_layers_reasons_measurement_and_baselines(plan, tmp_path):
    adapted = inject(trainers.classifier(), plan, r=2)
    adapted.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.startswith("---\n") and "library_name: peft" in card  # what peft writes stays
    assert "Two of three." in card and "| 1 | `bert.encoder.layer.1` | entropy \\| minimum |" in card
    assert "entropy, activation grad, by layer" in card and "method greedy, window 1" in card
    assert "LORA on" in card and "None were recorded" in card
    adapted.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text("utf-8")
    assert again.count("## Where the adapters are, and why") == 1
    write_section(tmp_path, plan, ["random layers: +1.2 ± 2.0, within noise"])
    told = (tmp_path / "README.md").read_text("utf-8")
    assert "- random layers: +1.2 ± 2.0, within noise" in told and "None were recorded" not in told
    assert told.count("### Against which baselines") == 1 and told.startswith("---\n")


def test_a_folder_without_a_card_gets_one(plan, tmp_path):
    write_section(tmp_path, plan)
    assert (tmp_path / "README.md").read_text("utf-8").startswith("<!-- inflection_fast:begin -->")
