import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("datasets")

import numpy as np

from inflection_fast.decide import Plan, SelectConfig
from inflection_fast.run.config import (
    DataConfig,
    LoraConfig,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TuneConfig,
    to_dict,
)
from inflection_fast.run.errors import UserError
from inflection_fast.run.folder import RunFolder


def config_of(path, **changes):
    source = SourceConfig(DataConfig("source.csv"))
    return RunConfig(ModelConfig("model"), DataConfig("target.csv"), str(path), source=source, **changes)


def begin(path, *stages, **changes):
    """A run folder with begun stages."""
    folder = RunFolder(config_of(path, **changes))
    for stage in stages:
        (path / stage).mkdir(exist_ok=True)
        (path / stage / "training.json").write_text("{}")
    return folder


CHANGES = {
    "seed": {"seed": 7},
    "measure": {"measure": MeasureConfig(unfreeze=1)},
    "select": {"select": SelectConfig(window=2)},
    "tune": {"tune": TuneConfig(lora=LoraConfig(r=8))},
    "baselines": {"baselines": ("all",)},
}
RESTS_ON = {
    "seed": ["source", "measure", "tune", "baseline-last"],
    "measure": ["measure", "tune", "baseline-last"],
    "select": ["tune", "baseline-last"],
    "tune": ["tune", "baseline-last"],
    "baselines": [],
}


@pytest.mark.parametrize("setting", CHANGES)
@pytest.mark.parametrize(
    "begun", [[], ["source"], ["source", "measure"], ["source", "measure", "tune", "baseline-last"]]
)
def test_settings_of_later_stages_may_change(tmp_path, setting, begun):
    path = tmp_path / "run"
    begin(path, *begun)
    changed = config_of(path, **CHANGES[setting])
    in_the_way = [stage for stage in RESTS_ON[setting] if stage in begun]
    if in_the_way:
        with pytest.raises(UserError, match=f"holds stages with other settings: {setting}") as caught:
            RunFolder(changed)
        assert all(str(path / stage) in str(caught.value) for stage in in_the_way)
        assert not [stage for stage in begun if stage not in in_the_way and str(path / stage) in str(caught.value)]
    else:
        RunFolder(changed)
        assert yaml.safe_load((path / "config.yaml").read_text()) == to_dict(changed)
        assert json.loads((path / "run.json").read_text())["seed"] == changed.seed


def test_a_folder_with_a_checkpoint_or_results_is_begun_and_one_with_leftovers_is_not(tmp_path):
    path = tmp_path / "run"
    begin(path, "source")
    (path / "measure" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (path / "measure" / "timeline.arrows").touch()
    changed = config_of(path, **CHANGES["measure"])
    RunFolder(changed)
    (path / "measure" / "checkpoints" / "checkpoint-2" / "clock.json").touch()
    with pytest.raises(UserError, match=r"measure.unfreeze \(1 -> 2\)"):
        RunFolder(config_of(path))


def test_a_moved_folder_is_still_its_own(tmp_path):
    begin(tmp_path / "run", "source")
    (tmp_path / "run").rename(tmp_path / "moved")
    RunFolder(config_of(tmp_path / "moved"))


@pytest.mark.parametrize("own", [True, False])
def test_a_plan_follows_its_settings_unless_it_came_from_elsewhere(tmp_path, own):
    path, made_with = tmp_path / "run", SelectConfig() if own else SelectConfig(method="top", k=1)
    folder = begin(path, "source", "measure")
    plan = Plan((), "", {}, np.zeros(2), {}, dataclasses.asdict(made_with), {"layers": ["a", "b"]})
    plan.save(path / "plan.json")
    folder.finish("plan")
    RunFolder(config_of(path, **CHANGES["select"]))
    assert (path / "plan.json").exists() is not own


def test_home_is_where_the_tilde_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    RunFolder(config_of("~/run"))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    path = tmp_path / "run"
    RunFolder(config_of(path))
    code = (
        "import sys\nfrom filelock import FileLock\n"
        f"with FileLock({str(path / '.lock')!r}):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"):
            RunFolder(config_of(path))
    finally:
        other.communicate("")
    first, second = RunFolder(config_of(path)), RunFolder(config_of(path))
    assert first.path == second.path
