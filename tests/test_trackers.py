"""What is measured reaches the trackers; the files that they write are read back."""

import json
import logging
import sqlite3
import struct
import time

import numpy as np
import pytest
import torch
from helpers import tiny_models, trainers
from helpers.tiny_models import one_thread  # noqa: F401
from transformers import TrainerCallback

from inflection_fast import MonitorConfig
from inflection_fast.integrations import InflectionCallback, track
from inflection_fast.integrations.scalars import Scalars, worst_layer
from inflection_fast.measure import Monitor
from inflection_fast.timeline import AlertRule, Column, Timeline

CONFIG = MonitorConfig(every=2, rows=None)
BLOCKS = 3
DOZEN = {
    f"inflection/{signal}/{how}"
    for signal in ("entropy", "activation_grad", "parameter_grad")
    for how in ("min", "mean", "max", "worst_layer")
} | {"inflection/alerts"}


def ours(rows):
    return [row for row in rows if "inflection/alerts" in row]


def expected(timeline, at):
    """The dozen, from the timeline alone."""
    found = {"inflection/alerts": 0.0}
    for name in ("entropy", "activation_grad", "parameter_grad"):
        values = np.nanmean(getattr(timeline, name)[at].reshape(len(timeline.layers), -1), 1)
        found |= {f"inflection/{name}/{how}": getattr(values, how)() for how in ("min", "mean", "max")}
    found["inflection/entropy/worst_layer"] = int(np.argmin(np.nanmean(timeline.entropy[at], 1)))
    return found


def run_plain_loop(**options):
    model, batch = tiny_models.model_and_batch("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, MonitorConfig(every=1, rows=None), **options) as monitor:
        for _ in range(3):
            model(**batch).loss.backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline


# ---- through the Trainer ---------------------------------------------------------------------------------------------


class Fails(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "inflection/alerts" in logs:
            raise ConnectionError("the tracker is away")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Reads what trackio has stored: rows (step, metrics) of a run, in order."""
    folder = tmp_path_factory.mktemp("trackio")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRACKIO_DIR", str(folder))
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):  # where it was imported before
        patch.setattr(module, "TRACKIO_DIR", folder, raising=False)

    def rows(project):
        (file,) = folder.glob(f"{project}*.db")
        with sqlite3.connect(file) as connection:
            found = connection.execute("select step, metrics from metrics order by id").fetchall()
        return [(step, json.loads(text)) for step, text in found]

    yield rows
    patch.undo()


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A training with TensorBoard and trackio, of which real files are left, and a reporter that fails."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("inflection_fast").addHandler(handler)
    callback = InflectionCallback(CONFIG, folder / "out", keys=("entropy/layer_01", "loss"))
    changes = {"report_to": ["tensorboard", "trackio"], "project": "measured", "run_name": "a", "save_steps": 3}
    made = trainers.trainer(folder, callback, save_strategy="steps", **changes)
    made.add_callback(Fails())
    made.train()
    logging.getLogger("inflection_fast").removeHandler(handler)
    yield made, callback, folder, messages
    patch.undo()


def test_every_measured_step_is_a_row_of_log_history_with_about_a_dozen_keys(trained):
    made, callback, _, _ = trained
    rows = ours(made.state.log_history)
    assert [row["step"] for row in rows] == [step + 1 for step in callback.timeline.steps] == [1, 3, 5]
    for at, row in enumerate(rows):
        assert set(row) == DOZEN | {"inflection/entropy/layer_01", "inflection/loss", "epoch", "step"}
        for key, value in expected(callback.timeline, at).items():
            assert row[key] == pytest.approx(value), key
        assert row["inflection/entropy/layer_01"] == pytest.approx(callback.timeline.entropy[at, 1].mean())
        trained_loss = next(r["loss"] for r in made.state.log_history if r["step"] == row["step"] and "loss" in r)
        assert row["inflection/loss"] == pytest.approx(trained_loss, rel=1e-3)
        assert row["epoch"] == pytest.approx(row["step"] / trainers.STEPS)


def test_a_checkpoint_holds_the_rows_of_its_steps(trained):
    _, _, folder, _ = trained
    for step, measured in ((3, [1, 3]), (6, [1, 3, 5])):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [row["step"] for row in ours(state["log_history"])] == measured


def test_tensorboard_files_hold_scalars_at_their_steps_and_a_heat_map_per_signal(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made, _, folder, _ = trained
    events = EventAccumulator(str(folder / "board")).Reload()
    for key in sorted(DOZEN):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        logged = [(row["step"], row[key]) for row in ours(made.state.log_history)]
        np.testing.assert_allclose(written, logged, rtol=1e-6, err_msg=key)
    names = ("entropy", "activation_grad", "parameter_grad")
    assert set(events.Tags()["images"]) == {f"inflection/{name}/map" for name in names}
    (image,) = events.Images("inflection/entropy/map")
    assert image.step == 5 and image.width > image.height > 100
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert len(list((folder / "board").iterdir())) == 1  # no second file after the Trainer has closed the first


def test_a_trackio_store_holds_the_rows_and_the_heat_maps(trained, store):
    made, _, _, _ = trained
    rows = [row for _, row in store("measured")]
    for row in ours(made.state.log_history):
        (found,) = (one for one in rows if one.get("train/inflection/loss") == row["inflection/loss"])
        assert found["train/global_step"] == row["step"]
        assert {key.removeprefix("train/") for key in found} >= DOZEN
    assert any("inflection/entropy/map" in one for one in rows)


def test_a_reporter_that_raises_is_told_once_and_the_training_goes_on(trained):
    made, _, _, messages = trained
    assert made.state.global_step == trainers.STEPS
    said = [message for message in messages if "the tracker is away" in message]
    assert len(said) == 1 and "Fails did not take" in said[0] and "goes on" in said[0]


def test_report_to_inflection_is_the_callback(tmp_path):
    made = trainers.trainer(tmp_path, None, report_to="inflection")
    (callback,) = (one for one in made.callback_handler.callbacks if isinstance(one, InflectionCallback))
    made.train()
    assert Timeline.load(tmp_path / "inflection").steps.tolist() == [0]
    assert [row["step"] for row in ours(made.state.log_history)] == [1]
    assert callback.folder == tmp_path / "inflection"


def test_two_callbacks_are_refused_in_a_sentence_that_says_what_to_do(tmp_path):
    made = trainers.trainer(tmp_path, InflectionCallback(CONFIG), report_to="inflection")
    with pytest.raises(ValueError, match="give the Trainer only one of them"):
        made.train()
    again = InflectionCallback(CONFIG)  # the first of the two is still attached, as after any training that raises
    trainers.trainer(tmp_path, again, model=made.model).train()
    assert again.timeline.steps.tolist() == [0, 2, 4]
    assert not any(module._forward_hooks for module in made.model.modules())


def test_evaluation_alone_measures_nothing_and_says_what_does(tmp_path):
    callback = InflectionCallback(CONFIG)
    made = trainers.trainer(tmp_path, callback, options={"eval_dataset": trainers.items(4)})
    assert "eval_loss" in made.evaluate()
    with pytest.raises(
        RuntimeError, match=r"Call trainer\.train\(\), which is measured; evaluate\(\) and predict\(\) are not"
    ):
        _ = callback.timeline


def test_missing_labels_are_told_with_what_to_do(tmp_path, caplog):
    data = [{key: value for key, value in item.items() if key != "labels"} for item in trainers.items()]
    with pytest.raises(ValueError, match="did not return a loss"), InflectionCallback(CONFIG) as callback:
        trainers.trainer(tmp_path, callback, data=data).train()
    assert "give the data a column `labels`" in caplog.text


def test_keys_none_logs_nothing(tmp_path):
    callback = InflectionCallback(CONFIG, keys=None)
    made = trainers.trainer(tmp_path, callback)
    made.train()
    assert not ours(made.state.log_history) and callback.timeline.steps.tolist() == [0, 2, 4]


# ---- plain loops -----------------------------------------------------------------------------------------------------


def test_a_plain_loop_writes_to_tensorboard_trackio_and_any_function(tmp_path, store):
    pytest.importorskip("tensorboard")
    import trackio
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    heard = []
    writer = SummaryWriter(tmp_path / "board")
    trackio.init(project="plain", name="b")
    report = track(writer, trackio, lambda scalars, step: heard.append((step, scalars)), keys=("entropy/layer_*",))
    timeline = run_plain_loop(on_row=report)
    report.heat_maps(timeline)
    writer.close()
    trackio.finish()
    assert [step for step, _ in heard] == [0, 1, 2]
    layers = {f"inflection/entropy/layer_{i:02d}" for i in range(BLOCKS)}
    for at, (_, scalars) in enumerate(heard):
        assert set(scalars) == DOZEN | layers
        for key, value in expected(timeline, at).items():
            assert scalars[key] == pytest.approx(value), key
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("inflection/entropy/min")] == [0, 1, 2]
    assert len(events.Tags()["images"]) == 3
    key = "inflection/entropy/min"
    stored = {step: row[key] for step, row in store("plain") if key in row}
    assert stored == {step: pytest.approx(scalars["inflection/entropy/min"]) for step, scalars in heard}


def test_wandb_offline_keeps_every_row_beside_those_of_the_loop(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=str(tmp_path), project="measured")
    timeline = run_plain_loop(on_row=track(run))
    run.finish()
    (file,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 30  # another process writes it
    while len(rows := [row for row in wandb_rows(file) if "inflection/step" in row]) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    assert [row["inflection/step"] for row in rows] == [0, 1, 2]
    for at, row in enumerate(rows):
        assert row["inflection/entropy/min"] == pytest.approx(expected(timeline, at)["inflection/entropy/min"])


def wandb_rows(file):
    """The history of an offline run, whose records are framed as in the log of LevelDB: 1 whole, 2 first, 4 last."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_mlflow_offline_keeps_every_row(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    mlflow.set_experiment("measured")
    with mlflow.start_run() as run:
        report = track(mlflow)
        timeline = run_plain_loop(on_row=report)
        report.heat_maps(timeline)
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "inflection/entropy/min")
    written = {metric.step: metric.value for metric in history}
    assert written == {at: pytest.approx(expected(timeline, at)["inflection/entropy/min"]) for at in range(3)}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "inflection/entropy")]


def test_a_tracker_that_raises_stops_no_plain_loop(caplog):
    def fail(scalars, step):
        raise ConnectionError("no network")

    timeline = run_plain_loop(on_row=track(fail))
    assert timeline.steps.tolist() == [0, 1, 2]
    assert caplog.text.count("no network") == 1 and "the training goes on" in caplog.text


def test_misuse_is_named(caplog):
    with pytest.raises(ValueError, match="expected at least one tracker"):
        track()
    with pytest.raises(TypeError, match=r"anything that takes log\(dict, step=...\), got int"):
        track(3)
    with pytest.raises(TypeError, match="keys: expected a sequence of patterns"):
        InflectionCallback(CONFIG, keys="entropy/*")
    run_plain_loop(on_row=track(lambda scalars, step: None, keys=("inflection/entrpy/layer_01",)))
    assert "'entrpy/layer_01' matches nothing that is measured; try 'entropy/layer_01'" in caplog.text


# ---- numbers ---------------------------------------------------------------------------------------------------------


def column(*tests):
    return Column("1", ("layer",), "x", "x", alerts=[AlertRule(test, 1.0) for test in tests])


@pytest.mark.parametrize(
    ("tests", "values", "worst"),
    [
        (("above",), [1.0, 3.0, 2.0], 1),
        (("falls_below",), [2.0, 3.0, 1.0], 2),
        (("exploding", "dead"), [1.0, 1.2, 1e-4, 50.0], 2),  # a factor of 1e4 down against 50 up
        (("exploding", "dead"), [1.0, 0.0, 1e9], 1),
        ((), [1.0, 3.0, 2.0], 1),
        (("below",), [1.0, np.nan, 0.5], 1),
        (("above",), np.ma.array([9.0, 1.0, 2.0], mask=[True, False, False]), 2),
    ],
)
def test_the_worst_block_is_what_the_rules_look_for(tests, values, worst):
    assert worst_layer(column(*tests), np.ma.asarray(values)) == worst


def test_what_was_not_measured_has_no_key_and_what_is_no_number_stays_one():
    from inflection_fast.measure import Row

    described = {"a": column("above"), "b": Column("1", (), "b", "b", quantity="b")}
    columns = {"a": np.ma.array([1.0, np.nan, 5.0], mask=[False, False, True]), "b": np.ma.masked}
    found = Scalars(("b", "a/layer_*")).of(Row(4, columns, described))
    assert found.pop("inflection/a/worst_layer") == 1.0 and found.pop("inflection/a/layer_00") == 1.0
    assert np.isnan(found.pop("inflection/a/mean")) and np.isnan(found.pop("inflection/a/layer_01"))
    assert "inflection/b" not in found and "inflection/a/layer_02" not in found
