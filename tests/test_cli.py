import errno
import json
import os
import subprocess
import sys

import helpers.tiny_texts as tiny
import pytest
import torch
import yaml
from helpers import programs
from helpers.small_runs import own_cache, small  # noqa: F401

pytest.importorskip("jsonargparse")

from inflection_fast import cli
from inflection_fast.decide import Plan
from inflection_fast.run import doctor
from inflection_fast.timeline import TimelineWriter


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """A small run as a YAML file, and the folder of its files."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.bert(folder / "bert")
    tiny.write_csv(folder / "target.csv", tiny.reviews(80))
    train = {"steps": 4, "batch_size": 8}
    tree = {
        "model": {"path": str(folder / "bert"), "max_length": 12},
        "target": {"path": str(folder / "target.csv"), "probe": 8},
        "output": "run",
        "measure": {"unfreeze": 1, "train": train, "monitor": {"every": 1}, "overhead_pairs": 0},
        "select": {"method": "top", "k": 1, "significance": None},
        "tune": {"train": train},
        "baselines": [],
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory):
    """The output of one run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    words = ["-m", "inflection_fast", "run", "--config", settings, "--output", folder, "--seed", 3]
    return folder, programs.run(words, folder.parent, environment=environment)


def failing(capsys, *argv):
    """The one sentence that a command of the user's gets for its mistake."""
    assert cli.main([str(argument) for argument in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("inflection-fast: ") and said.err.count("\n") == 1
    return said.err


def test_a_run_writes_its_settings_and_prints_its_results(finished):
    folder, process = finished
    assert process.returncode == 0, process.stderr
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    assert tree["seed"] == 3 and tree["output"] == str(folder)  # flags win over the file
    assert tree["measure"]["monitor"]["every"] == 1 and tree["select"]["k"] == 1
    assert tree["tune"]["lora"]["r"] == 4 and tree["measure"]["monitor"]["rows"] == 64  # defaults are written too
    tune = json.loads((folder / "tune" / "stage.json").read_text())
    assert f"{100 * tune['metrics']['accuracy']:.1f}" in process.stdout
    assert f"report: {folder / 'report' / 'index.md'}" in process.stdout
    assert process.stderr == "", "no progress bars and no chatter where nobody watches"


def test_the_written_settings_start_the_same_run(finished, settings, capsys):
    folder, _ = finished
    assert cli.main(["measure", "--config", str(folder / "config.yaml")]) == 0
    assert "finished already" in capsys.readouterr().out
    said = failing(capsys, "run", "--config", settings, "--output", folder, "--seed", 4)
    assert "seed (3 -> 4)" in said


def test_the_stages_one_by_one_make_the_same_run(finished, settings, tmp_path, capsys):
    whole, _ = finished
    settings = ["--config", str(settings), "--output", str(tmp_path / "run"), "--seed", "3"]
    assert cli.main(["measure", *settings]) == 0
    assert not (tmp_path / "run" / "plan.json").exists()
    assert cli.main(["plan", str(tmp_path / "run")]) == 0
    assert cli.main(["tune", *settings]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    for name in ("measure", "tune"):
        a, b = (json.loads((folder / name / "stage.json").read_text()) for folder in (tmp_path / "run", whole))
        assert a["metrics"] == b["metrics"] and a["layers"] == b["layers"]
    assert (tmp_path / "run" / "report" / "index.md").is_file()
    assert "plan: " in capsys.readouterr().out


def test_a_plan_starts_from_the_settings_of_its_run(finished, tmp_path, capsys):
    folder, _ = finished
    out = tmp_path / "plan.json"
    assert cli.main(["plan", str(folder), "--out", str(out)]) == 0
    assert Plan.load(out).config["method"] == "top" and len(Plan.load(out).layers) == 1
    assert cli.main(["plan", str(folder), "--out", str(out), "--select.k", "2"]) == 0
    assert len(Plan.load(out).layers) == 2
    said = " ".join(capsys.readouterr().out.split())
    for layer, reason in Plan.load(out).reasons.items():
        assert f"layer {layer}: {reason}" in said
    said = failing(capsys, "plan", folder, "--select.k", 3)
    assert "holds a model trained on layers" in said
    assert len(Plan.load(folder / "plan.json").layers) == 1


def test_a_plan_is_made_of_any_timeline(tmp_path, capsys):
    with TimelineWriter(tmp_path / "a", layers=["x.0", "x.1", "x.2"], heads=1, meta={}) as writer:
        for step in range(3):
            writer.append(step, entropy=[[3.0], [1.0], [2.0]], activation_grad=[3.0, 1.0, 2.0])
    arguments = ["--select.method", "top", "--select.k", "1", "--select.significance", "null"]
    assert cli.main(["plan", str(tmp_path / "a"), *arguments]) == 0
    assert Plan.load(tmp_path / "a" / "plan.json").layers == (1,)
    assert "layer 1:" in capsys.readouterr().out


def test_a_plan_from_elsewhere_is_adopted_once(finished, settings, tmp_path, capsys):
    whole, _ = finished
    out, settings = tmp_path / "other.json", ["--config", str(settings), "--output", str(tmp_path / "run")]
    assert cli.main(["measure", *settings]) == 0
    assert cli.main(["plan", str(tmp_path / "run"), "--select.k", "2", "--out", str(out)]) == 0
    assert cli.main(["tune", *settings, "--plan", str(out)]) == 0
    tuned = json.loads((tmp_path / "run" / "tune" / "stage.json").read_text())["layers"]
    assert tuned == list(Plan.load(out).layers) and len(tuned) == 2
    assert cli.main(["tune", *settings, "--plan", str(out)]) == 0
    capsys.readouterr()
    said = failing(capsys, "tune", *settings, "--plan", whole / "plan.json")
    assert f"trained on layers {tuned}" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tune.lora.r", "0"], "lora.r must be at least 1, got 0"),
        (["--source.data.path", "x.csv", "--source.train.steps", "0"], "train.steps must be null or at least 1"),
        (["--measure.monitor.every", "0"], "every: expected an integer >= 1"),
        (["--select.alpha", "2"], "alpha"),
        (["--seed", "many"], "seed"),
        (["--sead", "3"], "--sead"),
        (["--task", "translation"], "translation"),
        (["--baselines", "[worst]"], "worst"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--target.path", "nowhere.csv"], "nowhere.csv: there is no such file"),
        (["--target.text", "body"], "there is no column 'body'"),
        (["--target.labels", "[pos, mixed]"], "labels outside"),
        (["--model.path", "/nowhere"], "there is no folder /nowhere"),
        (["--measure.unfreeze", "9"], "measure.unfreeze is 9"),
    ],
)
def test_mistakes_are_one_sentence(settings, tmp_path, capsys, argv, message):
    assert message in failing(capsys, "measure", "--config", settings, "--output", tmp_path / "run", *argv)


def test_settings_that_are_missing_or_no_yaml_are_named(tmp_path, capsys):
    assert "model.path" in failing(capsys, "run")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [\n")
    assert "line 2" in failing(capsys, "run", "--config", broken)
    broken.write_text("model: {pth: x}\n")
    assert "pth" in failing(capsys, "run", "--config", broken)


def test_what_is_no_run_no_timeline_and_no_plan_is_named(settings, tmp_path, capsys):
    assert "not a run folder" in failing(capsys, "report", tmp_path)
    assert "no timeline" in failing(capsys, "plan", tmp_path)
    (tmp_path / "timeline.arrows").write_bytes(b"something else")
    assert "timeline" in failing(capsys, "plan", tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    run = ["--config", settings, "--output", tmp_path / "run"]
    assert "not a plan" in failing(capsys, "tune", *run, "--plan", tmp_path / "plan.json")
    assert "no timeline" in failing(capsys, "tune", *run)


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_is_there(settings, tmp_path, capsys, monkeypatch):
    from inflection_fast import records
    from inflection_fast.run import training

    run = ["run", "--config", str(settings), "--output", str(tmp_path / "run")]
    write = records.write_json

    def full(path, content):
        if path.name == "stage.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(records, "write_json", full)
        assert cli.main(run) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "measure" / "stage.json").exists()
    monkeypatch.setattr(training._Clock, "on_train_begin", lambda *a, **k: pytest.fail("trained again"), raising=True)
    assert cli.main(["measure", *run[1:]]) == 0


def test_a_folder_that_cannot_be_made_is_one_sentence(settings, tmp_path, capsys):
    (tmp_path / "file").touch()
    said = failing(capsys, "run", "--config", str(settings), "--output", str(tmp_path / "file" / "run"))
    assert said == f"inflection-fast: {tmp_path / 'file' / 'run'}: not a directory\n"


def test_measured_steps_that_the_disk_refused_are_measured_again(settings, tmp_path, capsys, monkeypatch):
    from inflection_fast.timeline import Timeline

    run = ["measure", "--config", str(settings), "--output", str(tmp_path / "run")]
    write = TimelineWriter._write

    def full(self, message):
        if self._last > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, message)

    with monkeypatch.context() as patched:
        patched.setattr(TimelineWriter, "_write", full)
        assert "because the disk was full" in failing(capsys, *run)
    assert Timeline.load(tmp_path / "run" / "measure").steps.tolist() == [0, 1]
    assert cli.main(run) == 0
    assert Timeline.load(tmp_path / "run" / "measure").steps.tolist() == [0, 1, 2, 3]


def test_an_error_of_ours_keeps_its_traceback(settings, tmp_path, monkeypatch):
    from inflection_fast.run import stages

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(stages.Stages, "measure", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["measure", "--config", str(settings), "--output", str(tmp_path / "run")])


def test_ctrl_c_says_how_to_go_on(settings, tmp_path, capsys, monkeypatch):
    from inflection_fast.run import stages

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Stages, "measure", interrupted)
    assert cli.main(["measure", "--config", str(settings), "--output", str(tmp_path / "run")]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "pip install 'inflection_fast[run]'" in failing(capsys, "run")


def test_help_is_quick_and_lists_every_command():
    code = (
        "import sys\nfrom inflection_fast.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert all(name in process.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["tune-up"]])
def test_an_unknown_command_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["measure", "tune", "run"])
def test_help_is_one_screen_with_a_sentence_for_every_option(capsys, command):
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    options = [line for line in lines if line.startswith("  --")]
    assert len(options) > 20 and all(len(line.split()) > 3 for line in options)
    said = " ".join(" ".join(lines).split())
    assert "sequence-classification | causal-lm" in said and "default 128" in said and "stop | top" in said
    assert "inflection-fast init" in said and f"{command} --help all" in said


def test_every_setting_has_a_flag_with_help(capsys):
    assert cli.main(["run", "--help", "all"]) == 0
    said = capsys.readouterr().out
    for flag in ("--model.path", "--target.group", "--measure.monitor.every", "--select.method", "--tune.lora.r"):
        assert flag in said
    assert "column whose values are never in both parts" in " ".join(said.split())


def test_doctor_tells_versions_kernels_and_what_is_missing(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in ("inflection_fast", "Python", torch.__version__, "CPU kernels", "CUDA toolkit", "GPU"):
        assert words in said
    version = doctor.version
    gone = {"peft": False, "pyarrow": True}

    def without(name):
        if name in gone:
            raise doctor.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "pip install --no-build-isolation 'inflection_fast[run]'" in said and "not usable: pyarrow" in said


def test_doctor_needs_no_more_than_the_base_install():
    code = (
        "import sys\n"
        f"for name in {list(cli.EXTRAS)}:\n"
        "    sys.modules[name] = None\n"
        "from inflection_fast.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "CPU kernels" in process.stdout


def test_doctor_names_the_command_for_kernels_that_do_not_load(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "inflection_fast.ops", None)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "not usable: CPU kernels" in said and "pip install --no-build-isolation inflection_fast" in said
