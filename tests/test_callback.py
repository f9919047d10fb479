import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.callbacks import BATCH, CONFIG, STEPS, items, model, trainer_of  # noqa: F401
from helpers.tiny_models import one_thread  # noqa: F401
from transformers import TrainerCallback

from inflection_fast.alerts import AlertConfig, alert_lines, find_alerts
from inflection_fast.integrations import InflectionCallback
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS, Timeline


def batch(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@pytest.fixture
def probe(items):
    return [{key: value for key, value in batch(items[:5]).items() if key != "labels"}]


def assert_same(a, b, rtol=1e-5):
    np.testing.assert_array_equal(a.steps, b.steps)
    for name in (*HEAD_SIGNALS, *LAYER_SIGNALS, "loss"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-6, err_msg=name)


def plain_loop(model, items, probe, config, accumulate=1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    size = BATCH // accumulate
    with Monitor(model, config, probe=probe) as monitor:
        for step in range(STEPS):
            for part in range(accumulate):
                begin = step * BATCH + part * size
                (model(**batch(items[begin : begin + size])).loss / accumulate).backward()
            monitor.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline


def test_the_trainer_measures_what_a_plain_loop_measures(model, items, probe, tmp_path):
    expected = plain_loop(copy.deepcopy(model), items, probe, CONFIG)
    callback = InflectionCallback(CONFIG, tmp_path / "out", probe=probe)
    trainer_of(model, items, tmp_path, [callback]).train()
    assert expected.steps.tolist() == [0, 2, 4]
    for name in ("entropy", "activation_grad", "parameter_grad", "delta_cka", "loss"):
        assert np.isfinite(getattr(expected, name)).all(), name
    assert (expected.activation_grad > 1e-3).all()  # the norms before clipping, which leaves less than this
    assert_same(callback.timeline, expected)
    assert_same(Timeline.load(tmp_path / "out"), expected)


def test_accumulated_batches_count_as_one_step(model, items, probe, tmp_path):
    expected = plain_loop(copy.deepcopy(model), items, probe, CONFIG, accumulate=2)
    model.accepts_loss_kwargs = False  # or the Trainer adds the losses of the parts, which this head does not divide
    callback = InflectionCallback(CONFIG, probe=probe)
    arguments = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    trainer_of(model, items, tmp_path, [callback], **arguments).train()
    assert_same(callback.timeline, expected)


def test_batches_whose_means_the_trainer_adds_up_count_as_one_step_too(model, items, probe, tmp_path):
    """The head ignores how many items there are, so the Trainer trains with the sum of two means, here clipped."""
    expected = plain_loop(copy.deepcopy(model), items, probe, CONFIG, accumulate=2)
    callback = InflectionCallback(CONFIG, probe=probe)
    arguments = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(model, items, tmp_path, [callback], **arguments)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert_same(callback.timeline, expected, rtol=1e-4)


def test_losses_that_are_shares_of_a_batch_add_up(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = LlamaForCausalLM(LlamaConfig(**settings, intermediate_size=32, max_position_embeddings=32))
    ids = torch.randint(4, 60, (STEPS * BATCH, 8), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[::3, 2:] = -100  # a sequence with fewer labels weighs less
    items = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels, strict=True)]
    with Monitor(decoder.train(), CONFIG) as monitor:
        decoder(input_ids=ids[:BATCH], labels=labels[:BATCH]).loss.backward()
        monitor.step()
    decoder.zero_grad()
    callback = InflectionCallback(CONFIG)
    arguments = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    trainer_of(decoder, items, tmp_path, [callback], **arguments).train()
    for name in ("loss", "activation_grad", "parameter_grad"):
        actual, expected = (getattr(timeline, name)[0] for timeline in (callback.timeline, monitor.timeline))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)


def test_evaluation_in_between_changes_nothing(model, items, probe, tmp_path):
    expected = plain_loop(copy.deepcopy(model), items, probe, CONFIG)
    callback = InflectionCallback(CONFIG, probe=probe)
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    trainer_of(model, items, tmp_path, [callback], eval_dataset=items[:7], **arguments).train()
    assert_same(callback.timeline, expected)


def test_a_resumed_training_continues_the_timeline(model, items, probe, tmp_path):
    whole = InflectionCallback(CONFIG, tmp_path / "whole", probe=probe)
    trainer_of(copy.deepcopy(model), items, tmp_path / "a", [whole]).train()

    class Stop(Exception):
        pass

    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Stop

    saving = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Stop), InflectionCallback(CONFIG, tmp_path / "out", probe=probe) as torn:
        trainer_of(copy.deepcopy(model), items, tmp_path / "b", [torn, StopAfter()], **saving).train()
    assert Timeline.load(tmp_path / "out").steps.tolist() == [0, 2, 4]

    again = InflectionCallback(CONFIG, tmp_path / "out", probe=probe)
    resumed = trainer_of(copy.deepcopy(model), items, tmp_path / "b", [again], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert_same(Timeline.load(tmp_path / "out"), whole.timeline)


def test_the_model_is_left_as_it_was_also_when_training_raises(model, items, tmp_path):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]

    before, attention = hooks(), model.config._attn_implementation
    trainer_of(model, items, tmp_path, [InflectionCallback(CONFIG)]).train()
    assert hooks() == before and model.config._attn_implementation == attention

    items[9] = {**items[9], "input_ids": torch.full((9,), 10_000)}  # no such token
    with pytest.raises(IndexError), InflectionCallback(MonitorConfig(every=1)) as callback:
        trainer_of(model, items, tmp_path, [callback]).train()
    assert hooks() == before and model.config._attn_implementation == attention
    assert callback.timeline.steps.tolist() == [0, 1]


def test_alerts_reach_the_log_and_who_asks_for_them(model, items, tmp_path, caplog):
    limits, heard = AlertConfig(max_logit=1e-9), []  # which every head is above
    callback = InflectionCallback(CONFIG, alerts=limits, on_alert=heard.append)
    trainer_of(copy.deepcopy(model), items, tmp_path, [callback]).train()
    expected = find_alerts(callback.timeline, limits)
    assert [alert for found in heard for alert in found] == expected
    assert {(alert.step, alert.kind) for alert in expected} == {(4, "max_logit")}  # the third measurement completes it
    assert [record.getMessage() for record in caplog.records if record.name == "inflection_fast.alerts"] == [
        *alert_lines(expected)
    ]
    caplog.clear()
    silent = InflectionCallback(CONFIG, alerts=None, on_alert=heard.append)
    trainer_of(model, items, tmp_path, [silent]).train()
    assert len(heard) == 1 and "attention logit" not in caplog.text


def test_an_alert_handler_that_raises_stops_no_training(model, items, tmp_path, caplog):
    def fail(found):
        raise ZeroDivisionError

    callback = InflectionCallback(CONFIG, alerts=AlertConfig(max_logit=1e-9), on_alert=fail)
    assert trainer_of(model, items, tmp_path, [callback]).train().global_step == STEPS
    assert callback.timeline.steps.tolist() == [0, 2, 4] and "on_alert raised" in caplog.text


def test_steps_between_measurements_find_no_hooks(model, items, tmp_path):
    hooks = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            hooks.append(any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()))

    trainer_of(model, items, tmp_path, [InflectionCallback(MonitorConfig(every=4)), Look()]).train()
    assert hooks == [i % 4 == 0 for i in range(STEPS)]


def test_the_model_may_be_saved_as_a_whole_before_a_measured_step(model, items, tmp_path):
    class Save(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            torch.save(model, tmp_path / "whole.pt")

    heard = InflectionCallback(MonitorConfig(every=1), on_alert=lambda alerts: None)  # no file holds a lambda
    trainer_of(model, items, tmp_path, [heard, Save()]).train()
    assert heard.timeline.steps.tolist() == list(range(STEPS))
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert again._forward_hooks and again(**batch(items[:BATCH])).loss.isfinite()
    unattached = pickle.loads(pickle.dumps(InflectionCallback(CONFIG)))
    assert unattached.config == CONFIG


def test_steps_between_measurements_hand_nothing_over(model, items, tmp_path, monkeypatch):
    callback = InflectionCallback(MonitorConfig(every=4))
    seen = []
    trainer = trainer_of(model, items, tmp_path, [callback])
    step = Monitor.step

    def watched(self, *args, **kwargs):
        seen.append((self.measuring, bool(args or kwargs)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Monitor, "step", watched)
    trainer.train()
    assert seen == [(i % 4 == 0, i % 4 == 0) for i in range(STEPS)]


# ---- the rows that the Trainer logs ----------------------------------------------------------------------------------


LOGGING = {"logging_strategy": "steps", "logging_steps": 1, "max_grad_norm": 1.0}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def of_the_trainer(rows):
    return [row for row in rows if not any(key.startswith("inflection/") for key in row)]


def test_the_trainer_logs_the_rows_that_it_logs_without_the_callback(model, items, tmp_path):
    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append(dict(logs))

    histories = []
    for callbacks in ([], [InflectionCallback(CONFIG)]):
        reporter = Reporter()
        reporter.rows = []
        trainer = trainer_of(copy.deepcopy(model), items, tmp_path, [*callbacks, reporter], **LOGGING)
        trainer.train()
        histories.append([of_the_trainer(trainer.state.log_history), of_the_trainer(reporter.rows)])
    for row in (row for history in histories for rows in history for row in rows):
        for name in TIMES:
            row.pop(name, None)
    assert histories[0] == histories[1]
    assert [row["step"] for row in histories[0][0]] == [1, 2, 3, 4, 5, 6, 6]


def test_rows_may_be_edited_before_they_are_logged(model, items, probe, tmp_path):
    """What was measured can be added to them; what the Trainer wrote there can be changed, as nothing is read there."""
    expected = plain_loop(copy.deepcopy(model), items, probe, CONFIG)
    callback = InflectionCallback(CONFIG, probe=probe)
    trainer = trainer_of(model, items, tmp_path, [callback], **LOGGING | {"max_grad_norm": 1e-3})
    log = trainer.log

    def edited(logs, *args, **kwargs):
        logs["loss"] = logs["grad_norm"] = -1.0
        logs["entropy"] = callback.timeline.entropy[-1].mean()  # of this step already, if it is a measured one
        log(logs, *args, **kwargs)

    trainer.log = edited
    trainer.train()
    assert_same(callback.timeline, expected)
    rows = of_the_trainer(trainer.state.log_history)[:STEPS]
    assert {(row["loss"], row["grad_norm"]) for row in rows} == {(-1.0, -1.0)}
    np.testing.assert_array_equal([row["entropy"] for row in rows], callback.timeline.entropy.mean((1, 2)).repeat(2))


def test_the_scale_of_a_gradient_scaler_is_taken_out(model, items):
    class Optimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    norms = []
    for scale, optimizer in ((1.0, None), (8.0, Optimizer())):
        callback = InflectionCallback(MonitorConfig(every=1))
        callback.attach(model)
        (model(**batch(items[:BATCH])).loss * scale).backward()
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        callback.close()
        model.zero_grad()
        norms.append(callback.timeline.activation_grad)
        assert callback.timeline.skipped.tolist() == [0.0] if optimizer else np.isnan(callback.timeline.skipped).all()
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_misuse_is_named(model, items, tmp_path):
    callback = InflectionCallback(CONFIG)
    with pytest.raises(RuntimeError, match="nothing was measured yet"):
        _ = callback.timeline
    callback.attach(model, 3)
    with pytest.raises(ValueError, match="attached to a model already"):
        callback.attach(model)
    with pytest.raises(ValueError, match="attached at step 3, and training begins at step 0"):
        trainer_of(model, items, tmp_path, [callback]).train()
    assert not any(module._forward_hooks for module in model.modules())
