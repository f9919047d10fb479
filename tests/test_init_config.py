import json

import helpers.tiny_texts as tiny
import pytest
import yaml

pytest.importorskip("jsonargparse")

from inflection_fast import cli
from inflection_fast.run import training


def init(capsys, *argv):
    code = cli.main(["init", *map(str, argv)])
    return code, capsys.readouterr()


def test_a_first_file_names_the_columns_and_runs(tmp_path, capsys, monkeypatch):
    rows = [{"id": i, "review": row["text"], "stars": row["label"]} for i, row in enumerate(tiny.reviews(80))]
    data, model, out = tiny.write_csv(tmp_path / "r: 1.csv", rows), tiny.bert(tmp_path / "bert"), tmp_path / "run.yaml"
    capsys.readouterr()
    code, said = init(capsys, "--model", model, "--data", data, "--out", out)
    assert code == 0 and f"inflection-fast run --config {out}" in said.out
    text = out.read_text()
    tree = yaml.safe_load(text)
    assert tree["target"] == {"path": str(data), "text": "review", "label": "stars"}
    assert tree["model"]["max_length"] == json.loads((model / "config.json").read_text())["max_position_embeddings"]
    assert len(text.splitlines()) <= 17 and text.count("#") >= 10
    assert "the data has: id, review, stars" in text and "neg, pos" in text and max(map(len, text.splitlines())) <= 140
    trained = []
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(a) or (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        cli.main(["run", "--config", str(out), "--output", str(tmp_path / "run")])
    assert trained  # everything before the first training step is right
    code, said = init(capsys, "--model", model, "--data", data, "--out", out)
    assert code == 2 and "exists already" in said.err and out.read_text() == text


def test_columns_that_are_named_are_taken(tmp_path, capsys):
    rows = [{"text": row["text"], "label": row["label"], "film": row["film"]} for row in tiny.reviews(80)]
    data = tiny.write_csv(tmp_path / "a.csv", rows)
    for more, label in (([], "label"), (["--label", "film"], "film")):
        out = tmp_path / f"{label}.yaml"
        assert init(capsys, "--model", "m", "--data", data, "--out", out, *more)[0] == 0
        assert yaml.safe_load(out.read_text())["target"] == {"path": str(data), "text": "text", "label": label}
    code, said = init(capsys, "--model", "m", "--data", data, "--out", tmp_path / "b.yaml", "--label", "stars")
    assert code == 2 and "no column 'stars'" in said.err and not (tmp_path / "b.yaml").exists()


def test_a_language_model_needs_no_label(tmp_path, capsys):
    data = tmp_path / "a.txt"
    data.write_text("\n".join(row["text"] for row in tiny.reviews(60)))
    out = tmp_path / "run.yaml"
    assert init(capsys, "--model", "m", "--data", data, "--task", "causal-lm", "--out", out)[0] == 0
    tree = yaml.safe_load(out.read_text())
    assert tree["model"]["max_length"] == 128  # the model is a name on the hub
    assert tree["task"] == "causal-lm" and tree["target"] == {"path": str(data), "text": "text"}
    code, said = init(capsys, "--model", "m", "--data", data, "--out", tmp_path / "b.yaml")
    assert code == 2 and "use --task causal-lm" in said.err
