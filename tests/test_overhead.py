"""`inflection-fast overhead` times a model of the user's, beside noise, and says in a sentence what it cannot."""

import json
from functools import partial

import helpers.tiny_texts as tiny
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three blocks."""
    folder = tmp_path_factory.mktemp("overhead")
    tiny.bert(folder / "bert")
    return folder


def overhead(folder, *options):
    return cli.main(["overhead", *options, "--batch-size", "4", "--length", "8", "--out", str(folder / "figures.json")])


@pytest.fixture(scope="module")
def figures(folder):
    asked = ("--task", "sequence-classification", "--per-quantity", "--train-top", "1", "--minutes", "0.01")
    assert overhead(folder, str(folder / "bert"), *asked, "--quantities", "attention,residual") == 0
    return json.loads((folder / "figures.json").read_text())


def test_every_race_has_its_arms_beside_noise(figures):
    races = {race["title"]: [cost["label"] for cost in race["costs"]] for race in figures["races"]}
    both = ["unmonitored", "unmonitored, again"]
    assert races == {
        "the model as it is written": [*both, "every step", "attached, never measured"],
        "each quantity by itself, every step": [*both, "attention alone", "residual alone"],
        "the last 1 blocks train, frozen_share=0.03125": [*both, "every step", "every step, frozen_share=1.0"],
    }
    for race in figures["races"]:
        for cost in race["costs"]:
            assert cost["ms"] > 0 and cost["error"] >= 0 and cost["rounds"] >= 5
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["settings"]["quantities"] == ["attention", "residual"]


def test_a_table_is_printed(folder, figures, capsys):
    assert overhead(folder, str(folder / "bert"), "--task", "sequence-classification", "--minutes", "0.001") == 0
    printed = capsys.readouterr().out
    assert "the model as it is written (5 rounds)" in printed and "one step in ten" in printed
    (measured,) = [line for line in printed.splitlines() if line.strip().startswith("every step")]
    assert "ms" in measured and measured.count("%") == 2


def test_a_compiled_model_is_raced_with_taps_and_without(folder, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a compiler of C++
    asked = ("--task", "sequence-classification", "--compiled", "--minutes", "0.001")
    one_block = tiny.bert(folder / "one", num_hidden_layers=1)  # compiled twice, a second for each block
    assert overhead(folder, str(one_block), *asked) == 0
    race = json.loads((folder / "figures.json").read_text())["races"][1]
    assert race["title"] == "compiled, measured in the graph"
    assert [cost["label"] for cost in race["costs"]] == [
        "unmonitored", "unmonitored, again", "every step", "attached, never measured",
    ]  # fmt: skip
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["MODEL", "--minutes", "0"], "--minutes: expected a number above 0, got 0.0"),
        (["MODEL", "--rows", "1"], "--rows: expected at least 2, got 1"),
        (["MODEL", "--quantities", "attention,warmth"], "--quantities: quantities: expected distinct names out of"),
        (["MODEL", "--train-top", "4"], "--train-top: expected at most 3, the number of blocks, got 4"),
        (["MODEL", "--device", "abacus"], "--device: "),
        (["MODEL", "--out", "no/such/folder/x.json"], "--out: expected a file in a folder that exists"),
        (["MODEL", "--length", "4096"], "bert takes at most 64 tokens, got 4096"),
        (["gpt2-small", "--length", "4096"], "--length: gpt2-small takes at most 1024 tokens, got 4096"),
    ],
)
def test_what_is_asked_wrong_is_named_in_one_sentence(folder, options, said, capsys):
    given = [str(folder / "bert") if one == "MODEL" else one for one in options]
    usual = ("--minutes", "0.001", "--length", "8", "--task", "sequence-classification")
    assert cli.main(["overhead", given[0], *usual, *given[1:]]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and printed.startswith("inflection-fast: ") and "\n" not in printed
