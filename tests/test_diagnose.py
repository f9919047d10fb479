"""One training in two phases: measured while shallow, planned, injected, and trained on."""

import json

import numpy as np
import peft
import pytest
import torch
from helpers import trainers
from helpers.tiny_models import one_thread  # noqa: F401
from transformers import TrainerCallback

from inflection_fast import MonitorConfig, Plan, SelectConfig
from inflection_fast.integrations import DiagnoseThenInject, InflectionCallback

STEPS, FIRST = 8, 3
CONFIG = MonitorConfig(every=1, rows=None)
SELECT = SelectConfig(method="top", k=1, significance=None)


class Watch(TrainerCallback):
    """What is trained at each step, with which learning rate."""

    def __init__(self):
        self.rates, self.trained, self.batches = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {name for name, p in model.named_parameters() if p.grad is not None}
        assert {id(p) for p in model.parameters() if p.requires_grad} == held
        self.trained.append(names)


class Stop(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise Stop


def made(folder, *callbacks, **changes):
    trainer = trainers.trainer(
        folder / "trained", None, data=trainers.items(STEPS * trainers.BATCH), max_steps=STEPS, warmup_steps=1,
        **{"save_strategy": "steps", "save_steps": 2, **changes},
    )  # fmt: skip
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, DiagnoseThenInject(
        trainer, steps=FIRST, top=1, config=CONFIG, select=SELECT, out=folder / "out", r=2
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("whole"), Watch()
    trainer, run = made(folder, watch)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = run.train()
    trainer.save_model(str(folder / "adapter"))
    return trainer, run, watch, before, result, folder


def test_the_phases_train_top_blocks_then_adapters_on_the_planned_blocks(whole):
    _, run, watch, _, result, folder = whole
    assert result.global_step == STEPS and len(watch.trained) == STEPS
    last = len(run.callback.timeline.layers) - 1
    for names in watch.trained[:FIRST]:
        assert any(f"layer.{last}." in name for name in names) and any("classifier" in name for name in names)
        assert not any(f"layer.{i}." in name for name in names for i in range(last))
    (layer,) = run.plan.layers
    for names in watch.trained[FIRST:]:
        assert {name for name in names if "layer." in name} == {name for name in names if "lora_" in name}
        assert all(f"layer.{layer}." in name for name in names if "lora_" in name)
        assert any("lora_A" in name for name in names) and any("classifier" in name for name in names)
    assert run.callback.timeline.steps.tolist() == [*range(FIRST)]
    assert Plan.load(folder / "out" / "plan.json").layers == run.plan.layers


def test_the_weights_of_the_model_are_those_from_before(whole):
    trainer, _, _, before, _, _ = whole
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p
        for name, p in trainer.model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert set(base) == set(before)
    for name, parameter in before.items():
        assert torch.equal(base[name], parameter), name


def test_each_phase_has_a_schedule_over_its_own_steps(whole):
    rate, rates = 1e-3, whole[2].rates

    def schedule(steps):  # a warm-up of one step, then linear to zero
        return [0.0] + [rate * (steps - i) / (steps - 1) for i in range(1, steps)]

    np.testing.assert_allclose(rates, [*schedule(FIRST), *schedule(STEPS - FIRST)], rtol=1e-6)


def test_log_history_and_steps_go_on_over_both_phases(whole):
    history = whole[0].state.log_history
    assert [row["step"] for row in history if "loss" in row] == [*range(1, STEPS + 1)]
    assert [row["step"] for row in history if "inflection/alerts" in row] == [1, 2, 3]
    epochs = [row["epoch"] for row in history if "loss" in row]
    np.testing.assert_allclose(epochs, np.arange(1, STEPS + 1) / STEPS, rtol=1e-6)


def test_what_is_saved_is_the_adapter_with_its_plan(whole):
    trainer, run, *_, folder = whole
    again = peft.PeftModel.from_pretrained(trainers.classifier(), folder / "adapter").eval()
    batch = {key: torch.stack([item[key] for item in trainers.items(4)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, trainer.model.eval()(**batch).logits)
    assert Plan.from_pretrained(folder / "adapter").layers == run.plan.layers


@pytest.mark.parametrize("stopped", [2, 6], ids=["while measuring", "while tuning"])
def test_a_resumed_training_ends_as_the_one_that_was_not_interrupted(whole, tmp_path, stopped):
    _, run = made(tmp_path, StopAfter(stopped))
    with pytest.raises(Stop):
        run.train()
    again, resumed = made(tmp_path)
    assert resumed.train(resume_from_checkpoint=True).global_step == STEPS
    assert resumed.plan.layers == whole[1].plan.layers
    assert (resumed.callback is None) == (stopped > FIRST)
    expected = dict(whole[0].model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    rows = [row for row in whole[0].state.log_history if "loss" in row]
    for row, other in zip(rows, (r for r in again.state.log_history if "loss" in r), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_without_checkpoints_none_is_left(tmp_path):
    trainer, run = made(tmp_path, save_strategy="no")
    run.train()
    assert not list((tmp_path / "trained").glob("checkpoint-*")) and trainer.state.global_step == STEPS


def test_no_layer_chosen_leaves_the_model_as_it_was(tmp_path):
    trainer, run = made(tmp_path)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in trainer.model.named_parameters()}
    model = {"layers": ["a", "b", "c"]}
    empty = Plan(layers=(), scores=[0.0] * 3, reasons={}, summary="Nothing.", profile={}, config={}, model=model)
    patch = pytest.MonkeyPatch()
    patch.setattr("inflection_fast.integrations.diagnose.select", lambda *args: empty)
    with patch.context(), pytest.raises(ValueError, match="no layer was chosen after 3 steps"):
        run.train()
    patch.undo()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1], name
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_misuse_is_named(tmp_path):
    trainer, run = made(tmp_path)
    with pytest.raises(ValueError, match="steps: expected fewer than the 8 steps of the training"):
        DiagnoseThenInject(trainer, steps=8, config=CONFIG).train()
    with pytest.raises(ValueError, match="steps: expected the number of measured steps"):
        DiagnoseThenInject(trainer, steps=0)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        run.train(resume_from_checkpoint=True)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    given = trainers.trainer(tmp_path, None, options={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs instead"):
        DiagnoseThenInject(given, steps=3)
    adapted = trainers.trainer(tmp_path, None, model=peft.get_peft_model(trainers.classifier(), peft.LoraConfig()))
    with pytest.raises(ValueError, match="carries adapters already"):
        DiagnoseThenInject(adapted, steps=3)
    with InflectionCallback(CONFIG) as callback:
        _, run = made(tmp_path / "both", callback)
        with pytest.raises(ValueError, match="give the Trainer only one of them"):
            run.train()


def test_the_state_in_between_is_plain_json(whole):
    state = json.loads((whole[-1] / "trained" / f"checkpoint-{FIRST}" / "trainer_state.json").read_text())
    assert state["global_step"] == FIRST and state["best_metric"] is None
