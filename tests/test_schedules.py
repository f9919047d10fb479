"""Which parameters train, and how fast: unfreezing by plan, LISA, learning rates by block."""

import helpers.tiny_models as tiny
import numpy as np
import pytest
import torch
from helpers.injected import plan_for
from helpers.tiny_models import one_thread  # noqa: F401
from transformers import Trainer, TrainerCallback, TrainingArguments

from inflection_fast import Monitor, MonitorConfig, find_blocks
from inflection_fast.act import learning_rates, lisa, parameter_groups, unfreeze


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def blocks_in(names):
    return sorted({int(name.split("layer.")[1].split(".")[0]) for name in names if "layer." in name})


# ---- unfreeze --------------------------------------------------------------------------------------------------------


def test_the_planned_blocks_and_what_is_named_train_and_nothing_else():
    model = tiny.bert()
    model.bert.pooler.dense.bias.requires_grad_(False)
    before = training(model)
    handle = unfreeze(model, plan_for(model, 0, 2), also=["classifier", "bert.embeddings.LayerNorm.weight"])
    now = training(model)
    assert blocks_in(now) == [0, 2]
    outside = {name for name in now if "layer." not in name}
    assert outside == {"classifier.weight", "classifier.bias", "bert.embeddings.LayerNorm.weight"}
    assert handle.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    described = handle.describe()
    assert described["layers"] == [0, 2] and not described["permanent"] and described["words"].startswith("unfreezing")
    assert handle.record(plan_for(model, 0, 2)).actions == (described,)
    handle.remove()
    handle.remove()
    assert training(model) == before


@pytest.mark.parametrize(
    ("where", "also", "words"),
    [
        ([3], (), r"layers: expected distinct indices from 0 to 2, got \[3\]"),
        ([], (), "layers: expected at least one index"),
        ([0, 0], (), "distinct"),
        ([0], ("clasifier",), "also: BertForSequenceClassification has no parameters under 'clasifier'"),
    ],
)
def test_what_cannot_be_unfrozen_is_refused_and_nothing_changes(where, also, words):
    model = tiny.bert()
    model.bert.pooler.dense.bias.requires_grad_(False)
    before = training(model)
    with pytest.raises(ValueError, match=words):
        unfreeze(model, where, also=also)
    assert training(model) == before


def test_an_intervention_is_not_applied_twice():
    model = tiny.bert()
    handle = unfreeze(model, [0, 1])
    with pytest.raises(ValueError, match=r"unfreezing is applied already to blocks \[1\]; call remove"):
        unfreeze(model, 1)
    handle.remove()
    with unfreeze(model, 1):
        assert blocks_in(training(model)) == [1]
    with pytest.raises(ValueError, match="it is compiled; apply interventions before compiling"):
        unfreeze(torch.compile(model), 1)
    with pytest.raises(ValueError, match="DataParallel runs replicas"):
        unfreeze(torch.nn.DataParallel(model), 1)
    with pytest.raises(TypeError, match="layers: expected a Plan or indices"):
        unfreeze(model, "01")
    assert training(model) == training(tiny.bert())


# ---- LISA ------------------------------------------------------------------------------------------------------------


def test_lisa_trains_few_blocks_at_a_time_and_every_block_in_turn():
    model, batch = tiny.model_and_batch("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seen = []
    with lisa(model, active=1, interval=2) as handle:
        for step in range(24):
            chosen = handle.training
            assert blocks_in(training(model)) == chosen and "classifier.weight" in training(model)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            tiny.loss_of(model(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            assert blocks_in(moved) == chosen
            seen.append(chosen)
            assert step % 2 == 0 or seen[-1] == seen[-2]
            handle.step()
    assert {layer for chosen in seen for layer in chosen} == {0, 1, 2}
    assert blocks_in(training(model)) == [0, 1, 2]


def test_lisa_goes_on_where_it_was():
    first, second = lisa(tiny.bert(), active=2, interval=3, seed=5), lisa(tiny.bert(), active=2, interval=3, seed=5)
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    assert [second.training, blocks_in(training(second.model))] == [first.training] * 2
    for options, words in (
        ({"active": 4}, "active: expected at most 3, the number of blocks, got 4"),
        ({"active": 0}, "active"),
        ({"interval": 0}, "interval"),
    ):
        with pytest.raises(ValueError, match=words):
            lisa(tiny.bert(), **options)
    model = tiny.bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks \[0, 1, 2\] have no parameters that train"):
        lisa(model)


def train(model, batch, handle, folder, *, steps, resume=None):
    """Which blocks train after every step, by the Trainer's own counting."""
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(tuple(handle.training))

    args = TrainingArguments(
        str(folder), per_device_train_batch_size=3, max_steps=steps, save_steps=3, use_cpu=True, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", learning_rate=0.01,
    )  # fmt: skip
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[handle.callback(), Note()])
    trainer.train(resume_from_checkpoint=resume)
    return seen


def test_a_trainer_resumes_in_the_middle_of_a_schedule(tmp_path):
    model, batch = tiny.model_and_batch("bert")
    whole = train(model, batch, lisa(model, active=1, interval=2, seed=2), tmp_path, steps=6)
    again, _ = tiny.model_and_batch("bert")
    handle = lisa(again, active=1, interval=2, seed=2)
    rest = train(again, batch, handle, tmp_path, steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert rest == whole[3:] and len(set(whole)) > 1 and handle.steps_done == 6
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- learning rates --------------------------------------------------------------------------------------------------


def measured(model, batch):
    with Monitor(model, MonitorConfig(every=1, quantities=("parameter_grad",))) as monitor:
        for _ in range(2):
            tiny.loss_of(model(**batch)).backward()
            monitor.step()
            gradients = [
                np.sqrt(sum((p.grad.double() ** 2).sum().item() for p in block.module.parameters()))
                for block in monitor.blocks
            ]
            model.zero_grad()
    blocks = find_blocks(model)
    weights = [np.sqrt(sum((p.double() ** 2).sum().item() for p in b.module.parameters())) for b in blocks]
    return monitor.timeline, np.array(gradients) / weights


def test_rates_are_relative_gradient_norms():
    model, batch = tiny.model_and_batch("bert")
    timeline, relative = measured(model, batch)
    rates = learning_rates(model, timeline, 0.1)
    np.testing.assert_allclose(rates, 0.1 * relative / relative.max(), rtol=1e-5)
    np.testing.assert_allclose(learning_rates(model, timeline, 0.1, least=1.0), 0.1)
    timeline.parameter_grad[:, 1] = np.nan
    assert np.isfinite(learning_rates(model, timeline, 0.1)).all()
    timeline.parameter_grad[:] = np.nan
    with pytest.raises(ValueError, match="no block has a parameter gradient; measure 'parameter_grad'"):
        learning_rates(model, timeline, 0.1)


def test_groups_hold_every_parameter_once():
    model, batch = tiny.model_and_batch("bert")
    timeline, _ = measured(model, batch)
    model.bert.embeddings.requires_grad_(False)
    for decay in (None, 0.1):
        groups = parameter_groups(model, timeline, 0.1, weight_decay=decay)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        torch.optim.AdamW(groups, lr=1.0)
        by_name = {group["name"]: group["lr"] for group in groups}
        assert by_name["other"] == 0.1
        assert by_name["bert.encoder.layer.0"] == pytest.approx(learning_rates(model, timeline, 0.1)[0])
    with pytest.raises(ValueError, match="lr: expected a number > 0, got 0"):
        parameter_groups(model, timeline, 0)
    with pytest.raises(ValueError, match="it is of a model of 3 blocks, this one has 2"):
        learning_rates(tiny.distilbert(), timeline, 0.1)
    with pytest.raises(TypeError, match="timeline: expected a Timeline"):
        learning_rates(model, [1.0], 0.1)
