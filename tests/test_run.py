import dataclasses
import json
import os
import time

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
import yaml
from helpers import programs
from helpers.small_runs import own_cache, small  # noqa: F401

pytest.importorskip("datasets")

from inflection_fast.decide import Plan, SelectConfig
from inflection_fast.measure import MonitorConfig, hooks
from inflection_fast.run import training
from inflection_fast.run.config import (
    DataConfig,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    TuneConfig,
    to_dict,
)
from inflection_fast.run.errors import UserError
from inflection_fast.run.models import load_model, load_tokenizer
from inflection_fast.run.stages import Stages
from inflection_fast.timeline import Timeline

STAGES = ["source", "measure", "plan", "tune", "baseline-last", "baseline-random", "report"]
TRAIN = TrainConfig(steps=6, batch_size=8, learning_rate=3e-3, checkpoint_every=2, log_every=2)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.write_csv(folder / "target.csv", tiny.reviews(150))
    tiny.write_csv(folder / "source.csv", tiny.reviews(100, seed=5))
    return folder


def config_of(files, output, **changes):
    settings = {
        "model": ModelConfig(str(files / "bert"), max_length=12),
        "target": DataConfig(str(files / "target.csv"), probe=8, group="film"),
        "output": str(output),
        "source": SourceConfig(DataConfig(str(files / "source.csv"), probe=0), TRAIN),
        "measure": MeasureConfig(unfreeze=1, train=TRAIN, monitor=MonitorConfig(every=2), overhead_pairs=0),
        "select": SelectConfig(method="top", k=2, significance=None),
        "tune": TuneConfig(train=TRAIN),
    }
    return RunConfig(**{**settings, **changes})


def run(config, report=False):
    said = []
    stages = Stages(config, say=said.append, quiet=True)
    stages.source()
    stages.measure()
    stages.plan()
    stages.tune()
    for name in config.baselines:
        stages.baseline(name)
    if report:
        stages.report()
    return said


def stage(folder, name):
    return json.loads((folder / name / "stage.json").read_text())


def lasting(folder, name):
    """What a stage found, without what the clock says."""
    found = stage(folder, name)
    return {key: value for key, value in found.items() if not key.endswith("_seconds") and key != "overhead"}


@pytest.fixture(scope="session")
def finished(files, tmp_path_factory):
    """One whole run, for tests that only look."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = config_of(files, folder, measure=dataclasses.replace(config_of(files, folder).measure, overhead_pairs=3))
    return config, folder, run(config, report=True)


def test_a_run_leaves_every_file_of_the_contract(finished):
    config, folder, said = finished
    facts = json.loads((folder / "run.json").read_text())
    assert facts["format"] == 2 and facts["finished"] == STAGES and facts["seed"] == 42
    assert {"inflection_fast", "torch", "transformers", "peft"} <= set(facts["versions"])
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_dict(config)
    assert (folder / "report" / "index.md").is_file()
    assert (folder / "source" / "model" / "model.safetensors").is_file()
    assert (folder / "tune" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("*/checkpoints")) and not list(folder.rglob("*.partial"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert any("baseline-last: accuracy" in line for line in said)


def test_stages_record_what_they_did(finished):
    _, folder, _ = finished
    plan = Plan.load(folder / "plan.json")
    assert len(plan.layers) == 2
    for name in ("source", "measure", "tune", "baseline-last", "baseline-random"):
        found = stage(folder, name)
        metrics = found["metrics"]
        assert found["stage"] == name and found["steps"] == 6
        assert metrics["correct"] == round(metrics["accuracy"] * metrics["n"]) and metrics["n"] == found["data"]["test"]
        assert metrics["right"].count("1") == metrics["correct"] and len(metrics["right"]) == metrics["n"]
        assert 0.5 <= found["majority"] < 1 and found["train_seconds"] > 0 and found["evaluate_seconds"] > 0
    source, measure, tune, last = (stage(folder, name) for name in ("source", "measure", "tune", "baseline-last"))
    assert source["trainable_parameters"] == source["total_parameters"] > measure["trainable_parameters"]
    assert tune["layers"] == list(plan.layers) and last["layers"] == [1, 2] and measure["layers"] is None
    rank, width, head = 4, 16, 2 * 16 + 2
    assert tune["trainable_parameters"] == 2 * 2 * (2 * rank * width) + head  # layers, query and value, A and B
    assert source["on_target"]["n"] == tune["metrics"]["n"]
    drawn = stage(folder, "baseline-random")
    assert drawn["draws"] >= 1 and ("draw " in drawn["label"]) == (drawn["draws"] > 1) and "draws" not in last
    assert drawn["layers"] != tune["layers"]
    assert set(measure["overhead"]) == {"off_ms", "on_ms", "noise", "ratio"}


def test_the_timeline_follows_the_schedule(finished):
    _, folder, _ = finished
    timeline = Timeline.load(folder / "measure")
    assert timeline.steps.tolist() == [0, 2, 4]
    for name in ("entropy", "activation_grad", "delta_cka", "loss"):
        assert np.isfinite(getattr(timeline, name)).all(), name
    trained = np.isfinite(timeline.parameter_grad).all(axis=0)
    assert trained.tolist() == [False, False, True]
    np.testing.assert_allclose(timeline.delta_cka[0], 0, atol=1e-5)
    assert timeline.delta_cka[2, 2] > 0 and timeline.delta_cka[2, 0] == pytest.approx(0, abs=1e-5)


def test_a_finished_run_is_not_run_again(finished):
    config, folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.json"}
    said = run(config)
    after = {path: path.stat().st_mtime_ns for path in before if path.parent.name != "report"}
    assert [line for line in said if "finished already" in line] and not [line for line in said if "begins" in line]
    assert after == {path: when for path, when in before.items() if path in after}


class Killed(BaseException):
    pass


def test_stages_that_were_stopped_halfway_go_on(files, finished, tmp_path, monkeypatch):
    _, whole, _ = finished
    folder, config = tmp_path / "run", config_of(files, tmp_path / "run", baselines=("last",))
    save, begin = training._Clock.on_save, training._Clock.on_train_begin
    begun = []

    def note_and_begin(self, args, state, control, **kwargs):
        begun.append((args.output_dir.split("/")[-2], state.global_step))
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Clock, "on_train_begin", note_and_begin)
    victims = [("source", 2), ("measure", 4), ("tune", 2), ("baseline-last", 4)]
    for victim, last in victims:

        def save_and_die(self, args, state, control, victim=victim, last=last, **kwargs):
            save(self, args, state, control, **kwargs)
            if victim in args.output_dir and state.global_step == last:
                raise Killed

        monkeypatch.setattr(training._Clock, "on_save", save_and_die)
        with pytest.raises(Killed):
            run(config)
        assert not (folder / victim / "stage.json").exists()
        assert (
            hooks.force_eager._holders == 0
        )  # no monitor is left open, which would keep all compiled code from running
        # A checkpoint that was being written when the process died.
        (folder / victim / "checkpoints" / f"checkpoint-{last + 2}").mkdir()
    monkeypatch.setattr(training._Clock, "on_save", save)
    write = training.write_json

    def die_after_training(path, content):
        if path.name == "log.json":
            raise Killed
        write(path, content)

    monkeypatch.setattr(training, "write_json", die_after_training)
    with pytest.raises(Killed):
        run(config)
    monkeypatch.setattr(training, "write_json", write)
    run(config)
    expected = [item for victim, last in victims for item in ((victim, 0), (victim, last))]
    assert begun == [*expected, expected[-1]]
    for victim, _ in victims:
        assert lasting(folder, victim) == lasting(whole, victim), victim
    a, b = Timeline.load(folder / "measure"), Timeline.load(whole / "measure")
    assert a.steps.tolist() == b.steps.tolist()
    np.testing.assert_allclose(a.entropy, b.entropy, rtol=1e-5)
    np.testing.assert_allclose(a.delta_cka, b.delta_cka, atol=1e-5)


def test_a_stage_that_had_trained_is_only_evaluated(files, finished, tmp_path, monkeypatch):
    _, whole, _ = finished
    config = config_of(files, tmp_path / "run", baselines=())
    evaluate = training.evaluate

    def die(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(training, "evaluate", die)
    with pytest.raises(Killed):
        run(config)
    monkeypatch.setattr(training, "evaluate", evaluate)
    trained = []
    monkeypatch.setattr(training._Clock, "on_train_begin", lambda self, args, *a, **k: trained.append(args.output_dir))
    run(config)
    assert not [folder for folder in trained if "source" in folder] and len(trained) == 2
    assert lasting(tmp_path / "run", "source") == lasting(whole, "source")
    assert lasting(tmp_path / "run", "tune") == lasting(whole, "tune")


def test_a_killed_process_leaves_what_the_next_one_needs(files, tmp_path):
    train = dataclasses.replace(TRAIN, steps=30)
    config = config_of(files, tmp_path / "run", source=None, baselines=())
    config = dataclasses.replace(config, measure=dataclasses.replace(config.measure, train=train))
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(to_dict(config)))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = ["-m", "inflection_fast", "run", "--config", settings]
    process = programs.start(words, tmp_path / "printed", environment=environment)
    try:
        while not (tmp_path / "run" / "measure" / "checkpoints" / "checkpoint-4" / "clock.json").exists():
            assert process.is_alive(), (tmp_path / "printed").read_text()
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    run(config)
    assert stage(tmp_path / "run", "measure")["steps"] == 30
    assert Timeline.load(tmp_path / "run" / "measure").steps.tolist() == list(range(0, 30, 2))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] == ["measure", "plan", "tune"]


def test_the_folder_of_another_run_is_refused_by_name(files, finished):
    config, folder, _ = finished
    other = dataclasses.replace(config, seed=7, tune=dataclasses.replace(config.tune, top=1))
    with pytest.raises(UserError) as caught:
        Stages(other, say=print, quiet=True)
    assert "tune.top (2 -> 1); seed (42 -> 7)" in str(caught.value)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_dict(config)


def test_a_folder_of_something_else_is_refused(files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty and holds no run"):
        Stages(config_of(files, tmp_path / "run"), say=print, quiet=True)
    with pytest.raises(UserError, match="is a file"):
        Stages(config_of(files, tmp_path / "run" / "thesis.tex"), say=print, quiet=True)


def test_settings_may_change_until_a_stage_begins(files, tmp_path):
    Stages(config_of(files, tmp_path / "run"), say=print, quiet=True)
    changed = config_of(files, tmp_path / "run", seed=7)
    Stages(changed, say=print, quiet=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == to_dict(changed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 7


def test_language_models_are_scored_by_loss_and_perplexity(files, tmp_path):
    config = config_of(
        files,
        tmp_path / "run",
        model=ModelConfig(str(files / "llama"), max_length=12),
        task="causal-lm",
        source=None,
        baselines=("all",),
    )
    run(config)
    tune, measure, every = (stage(tmp_path / "run", name) for name in ("tune", "measure", "baseline-all"))
    for found in (tune, measure, every):
        metrics = found["metrics"]
        assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"])) and "accuracy" not in metrics
        assert found["majority"] is None
    assert every["layers"] == [0, 1, 2]
    # The same loss by hand, over tokens and not over batches.
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, "causal-lm", tokenizer, folder=tmp_path / "run" / "measure" / "model").eval()
    stages = Stages(config, say=lambda line: None, quiet=True)
    total = count = 0
    for piece in stages.batches.items(stages.target.test):
        ids = torch.tensor(piece, dtype=torch.long)[None]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (len(piece) - 1)
        count += len(piece) - 1
    assert measure["metrics"]["n"] == count
    assert measure["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("when_empty", ["stop", "top"])
def test_an_empty_plan_is_told_honestly(files, finished, tmp_path, when_empty):
    config, whole, _ = finished
    config = config_of(files, tmp_path / "run", tune=TuneConfig(train=TRAIN, when_empty=when_empty, top=1))
    stages = Stages(config, say=lambda line: None, quiet=True)
    stages.source()
    stages.measure()
    plan = stages.plan()
    empty = dataclasses.replace(plan, layers=(), reasons={}, found={}, summary="Nothing was worth picking.")
    empty.save(tmp_path / "run" / "plan.json")
    run(config, report=when_empty == "stop")
    tune = stage(tmp_path / "run", "tune")
    if when_empty == "stop":
        assert tune["layers"] == [] and tune["trainable_parameters"] == 0 and "nothing injected" in tune["label"]
        assert tune["metrics"] == stage(whole, "source")["on_target"]
        assert not (tmp_path / "run" / "baseline-last" / "stage.json").exists()
    else:
        assert len(tune["layers"]) == 1 and "the plan was empty" in tune["label"]
        assert len(stage(tmp_path / "run", "baseline-last")["layers"]) == 1
    assert (tmp_path / "run" / "report" / "index.md").is_file() == (when_empty == "stop")


def test_a_source_with_other_labels_gives_its_body_only(files, tmp_path):
    rows = [{**row, "label": row["film"]} for row in tiny.reviews(100, seed=5)]
    data = DataConfig(str(tiny.write_csv(tmp_path / "films.csv", rows)), probe=0)
    config = config_of(files, tmp_path / "run", source=SourceConfig(data, TRAIN), baselines=())
    said = run(config)
    assert "on_target" not in stage(tmp_path / "run", "source")
    assert any("the source has 10 labels and the target 2" in line for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": MeasureConfig(unfreeze=4)}, "measure.unfreeze is 4, and .* has 3 blocks"),
        ({"tune": TuneConfig(when_empty="top", top=4)}, "tune.top is 4"),
        ({"select": SelectConfig(method="top", k=4)}, "select.k is 4"),
        ({"model": ModelConfig("/nowhere")}, "there is no folder /nowhere"),
        ({"measure": MeasureConfig(monitor=MonitorConfig(blocks=("bert.encoder.layer.9",)))}, "no module"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(files, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Stages(config_of(files, tmp_path / "run", **change), say=print, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_plan_for_another_model_is_refused(files, finished, tmp_path):
    _, folder, _ = finished
    config = config_of(files, tmp_path / "run", source=None)
    stages = Stages(config, say=lambda line: None, quiet=True)
    plan = Plan.load(folder / "plan.json")
    names = [*plan.model["layers"], "bert.encoder.layer.3"]
    other = dataclasses.replace(plan, model={**plan.model, "layers": names}, scores=np.zeros(4), profile={})
    other.save(tmp_path / "run" / "plan.json")
    with pytest.raises(UserError, match=r"the plan does not fit the model: .*4 blocks, this one has 3"):
        stages.tune()


def test_weights_in_pickles_are_refused(files, tmp_path):
    model = tmp_path / "pickled"
    tiny.bert(model)
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    config = config_of(files, tmp_path / "run", model=ModelConfig(str(model), max_length=12), source=None)
    with pytest.raises(UserError, match="could not be loaded"):
        Stages(config, say=lambda line: None, quiet=True).measure()
