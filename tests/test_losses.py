"""The loss in the timeline is the one that was differentiated, whoever computed it."""

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import trainers
from helpers.tiny_models import one_thread  # noqa: F401
from torch.nn import functional as F
from transformers import Trainer

from inflection_fast.integrations import InflectionCallback
from inflection_fast.integrations.losses import listen_to_losses
from inflection_fast.measure import MonitorConfig

CONFIG = MonitorConfig(every=1, rows=None, signals=("attention", "activation_grad"))
BACKWARD = Accelerator.backward


@pytest.fixture(autouse=True)
def accelerate_is_left_alone():
    yield
    assert Accelerator.backward is BACKWARD


def smoothed(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.3) * 7


class Own(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **more):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 3 * F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Ignoring(Trainer):
    """The model computes a loss, which nobody differentiates."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **more):
        loss = (model(**inputs).logits ** 2).mean()
        return (loss, None) if return_outputs else loss


HALVES = {"per_device_train_batch_size": trainers.BATCH // 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "changes"),
    [
        (Trainer, {}, {}),
        (Trainer, {}, {"label_smoothing_factor": 0.2}),
        (Trainer, {"compute_loss_func": smoothed}, {}),
        (Own, {}, {}),
        (Ignoring, {}, {}),
    ],
    ids=["model", "label smoothing", "compute_loss_func", "compute_loss", "ignored"],
)
def test_it_is_the_one_that_the_trainer_logs(tmp_path, kind, options, changes, accumulated):
    callback, model = InflectionCallback(CONFIG), trainers.classifier()
    model.accepts_loss_kwargs = False  # the sum of the parts' means is tested with the callback
    changes = {**changes, **(HALVES if accumulated else {})}
    trainer = trainers.trainer(tmp_path, callback, model=model, kind=kind, options=options, **changes)
    trainer.train()
    np.testing.assert_allclose(callback.timeline.loss, trainers.logged(trainer), rtol=1e-4)


def test_a_loss_that_goes_another_way_is_not_known(tmp_path, caplog):
    class Direct(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss * 5
            loss.backward()
            return loss.detach()

    callback = InflectionCallback(CONFIG)
    trainers.trainer(tmp_path, callback, kind=Direct).train()
    assert np.isnan(callback.timeline.loss).all() and np.isfinite(callback.timeline.activation_grad).all()
    assert caplog.text.count("no loss went through Accelerator.backward") == 1


def test_losses_of_another_accelerator_do_not_count(tmp_path):
    class Critic(Trainer):
        """Trains a model of its own in the middle of each step."""

        def training_step(self, *arguments, **options):
            other = Accelerator(cpu=True)
            critic = other.prepare_model(torch.nn.Linear(2, 1))
            optimizer = other.prepare_optimizer(torch.optim.SGD(critic.parameters(), 0.1))
            other.backward(critic(torch.ones(3, 2)).mean() + 1000)
            optimizer.step()
            return super().training_step(*arguments, **options)

    callback = InflectionCallback(CONFIG)
    trainer = trainers.trainer(tmp_path, callback, kind=Critic)
    trainer.train()
    np.testing.assert_allclose(callback.timeline.loss, trainers.logged(trainer), rtol=1e-4)


def test_several_listen_and_stop_in_any_order():
    accelerator, heard = Accelerator(cpu=True, gradient_accumulation_steps=4), []
    weight = torch.ones(1, requires_grad=True)
    stops = [listen_to_losses(lambda _, loss, i=i: heard.append((i, loss.item()))) for i in range(2)]
    accelerator.backward(weight.sum() * 8)
    assert heard == [(0, 2.0), (1, 2.0)] and weight.grad.item() == 2.0
    stops[0]()
    accelerator.backward(weight.sum() * 8)
    assert heard[2:] == [(1, 2.0)]
    stops[0]()
    stops[1]()
    accelerator.backward(weight.sum() * 8)
    assert len(heard) == 3 and weight.grad.item() == 6.0


# ---- TRL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def preferences(**columns):
    from datasets import Dataset

    rows = [row["text"] for row in tiny.reviews(24)]
    return Dataset.from_dict({name: [f(text) for text in rows] for name, f in columns.items()})


def words(text):
    return " " + text


@pytest.mark.parametrize("method", ["DPO", "KTO", "SFT", "Reward", "GRPO"])
def test_the_trainers_of_trl_differentiate_what_the_timeline_holds(tmp_path, decoder, method):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    kind = AutoModelForSequenceClassification if method == "Reward" else AutoModelForCausalLM
    model = kind.from_pretrained(decoder, **({"num_labels": 1} if method == "Reward" else {}))
    data = {
        "DPO": lambda: preferences(prompt=lambda t: "good", chosen=words, rejected=lambda t: " bad word1"),
        "Reward": lambda: preferences(chosen=words, rejected=lambda t: " bad word1"),
        "KTO": lambda: preferences(prompt=lambda t: "good", completion=words, label=lambda t: len(t) % 2 == 0),
        "SFT": lambda: preferences(text=str),
        "GRPO": lambda: preferences(prompt=lambda t: "good " + t),
    }[method]()
    changes = {"max_steps": 3, "bf16": False, **HALVES}
    options = {}
    if method == "GRPO":
        changes |= {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2}
        options["reward_funcs"] = lambda completions, **more: [float(len(one)) for one in completions]
    arguments = trainers.arguments(tmp_path, getattr(trl, f"{method}Config"), **changes)
    callback = InflectionCallback(CONFIG)
    trainer = getattr(trl, f"{method}Trainer")(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback], **options
    )
    trainer.train()
    losses = trainers.logged(trainer)
    np.testing.assert_allclose(callback.timeline.loss, losses, rtol=2e-3, atol=2e-4)
    if method == "DPO":
        assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # before the first update both models agree
