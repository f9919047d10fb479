"""The command `inherit`: it looks, builds, trains, compares and writes down what it found."""

import json

import pytest
import torch
from helpers import tiny_texts
from helpers.inherited import outputs
from helpers.tiny_models import one_thread  # noqa: F401
from helpers.tiny_study import write_texts
from transformers import AutoModelForSequenceClassification

from inflection_fast import Plan, cli, find_blocks
from inflection_fast.act import inherited_blocks
from inflection_fast.records import Metrics
from inflection_fast.run import inheriting


@pytest.fixture(scope="module")
def inherited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inherit")
    tiny_texts.bert(folder / "model")
    write_texts(folder / "a.csv", 120, seed=1)
    paths = [folder / "model", "--data", folder / "a.csv", "--out", folder / "out"]
    sizes = ["--steps", 6, "--batch-size", 8, "--max-length", 16, "--learning-rate", 0.01, "--blocks", 2, "--grow", 3]
    arguments = ["inherit", *paths, *sizes]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return folder, json.loads((folder / "out" / "inherit.json").read_text())


def test_models_of_one_size_are_compared_on_the_same_texts(inherited):
    folder, record = inherited
    arms = record["arms"]
    assert list(arms) == ["inherited", "random", "last", "fresh"]
    assert len({arm["parameters"] for arm in arms.values()}) == 1
    every = len(Plan.load(folder / "out" / "plan.json").scores)
    assert arms["last"]["blocks"] == [every - 2, every - 1] and arms["fresh"]["blocks"] == []
    assert arms["inherited"]["blocks"] == list(Plan.load(folder / "out" / "plan.json").layers)
    assert len(arms["random"]["blocks"]) == 2 and arms["random"]["blocks"] != arms["inherited"]["blocks"]
    for arm in arms.values():
        assert len(arm["losses"]) == 6 and arm["metrics"]["n"] > 10 and arm["metrics"]["loss"] > 0
    losses = {name: arm["metrics"]["loss"] for name, arm in arms.items()}
    page = (folder / "out" / "inherit.md").read_text()
    for name, loss in losses.items():
        assert f"{name} {loss:.4f}" in page
    assert record["verdict"] in page


@pytest.mark.parametrize(
    ("last", "says"),
    [(5.13572, "not lower than any"), (5.14, "lower than last, not lower than fresh"), (5.0, "not lower than any")],
)
def test_losses_that_are_nearly_equal_are_not_lower(last, says):
    arms = {name: inheriting._Arm([]) for name in ("inherited", "last", "fresh")}
    for name, loss in {"inherited": 5.13562, "last": last, "fresh": 5.1360}.items():
        arms[name].metrics = Metrics(100, loss)
    assert inheriting._verdict(arms).endswith(f"That of the inherited model is {says} by 0.001 or more.")


def test_the_smaller_model_was_grown_and_is_saved_whole(inherited):
    folder, record = inherited
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "model")
    assert inherited_blocks(model) == record["arms"]["inherited"]["blocks"]
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 2
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert outputs(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--blocks", "9"], "--blocks is 9, and the model has"),
        (["--blocks", "1", "--grow", "2"], "--grow names 1 steps, and the smaller model has 1 blocks"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--grow", "200"], "grow must be increasing steps between 0 and 100"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(inherited, options, words, capsys, tmp_path):
    folder, _ = inherited
    base = ["inherit", str(folder / "model"), "--data", str(folder / "a.csv"), "--max-length", "16"]
    assert cli.main([*base, "--out", str(tmp_path), *options]) == cli.USER_ERROR
    assert words in capsys.readouterr().err
    assert cli.main([*base, "--out", str(folder / "out")]) == cli.USER_ERROR
    assert "holds a comparison already" in capsys.readouterr().err
