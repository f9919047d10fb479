"""The source debiasing phase: what it raises, what stops it, and what is said of the expectation."""

import helpers.tiny_models as tiny
import numpy as np
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast.act import debias_source
from inflection_fast.act.debias import held
from inflection_fast.timeline import TimelineWriter


def sure():
    """A classifier that is sure of its three source texts."""
    model, batch = tiny.model_and_batch("bert")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batch


def test_entropy_rises_and_nothing_else_is_touched():
    model, batch = sure()
    model.bert.embeddings.requires_grad_(False)
    trains = [p.requires_grad for p in model.parameters()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    phase = debias_source(model, [batch], [1], steps=12, lr=3e-3, least_accuracy=0.0)
    assert phase.history.entropy[-1] > phase.history.entropy[0] + 0.01 and len(phase.history) == 12
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".layer.1." in name for name in moved)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert model.classifier.weight.grad is kept and model.bert.pooler.dense.weight.grad is None
    assert "all done" in phase.describe()["words"] and phase.describe()["steps_done"] == 12


@pytest.mark.parametrize("bounds", [{"least_accuracy": 0.9}, {"least_accuracy": None, "largest_loss": 0.3}])
def test_the_guard_stops_the_phase_before_a_further_update(bounds):
    model, batch = sure()
    phase = debias_source(model, [batch], steps=200, lr=5e-3, ascent=5.0, **bounds)
    assert len(phase.history) < 200 and phase.stopped
    name, bound = next((name, value) for name, value in bounds.items() if value is not None)
    judged = {"least_accuracy": -np.mean(phase.history.accuracy[-4:]), "largest_loss": np.mean(phase.history.loss[-4:])}
    assert judged[name] > (-bound if name == "least_accuracy" else bound)
    assert f"stopped: {phase.stopped}" in phase.describe()["words"]
    assert phase.describe()["steps_done"] == len(phase.history) - 1
    with torch.no_grad():  # the last one was looked at and not followed by an update
        assert float(model(**batch).loss) == pytest.approx(phase.history.loss[-1], rel=1e-5)


def timeline(losses, gradients):
    writer = TimelineWriter(None, layers=["a", "b", "c", "d"], heads=1, meta={})
    for step, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
        writer.append(step, loss=np.array(loss), activation_grad=np.array([gradient, gradient, 9.0, 9.0]))
    return writer.timeline


def test_the_expectation_is_stated_as_held_or_not():
    plain, after = timeline([1, 0.9, 0.8], [1.0] * 3), timeline([2, 1.5, 1.0], [3.0] * 3)
    rising = [0.1, 0.5, 1.0]
    yes = held(plain, after, rising)
    assert (yes.held, yes.loss, yes.gradients) == (True, True, True)
    assert "3.00 times" in yes.words and yes.words.endswith("The expectation held.")
    assert held(after, plain, rising).gradients is False and held(after, plain, rising).held is False
    assert held(plain, after, rising[::-1]).loss is False
    assert held(plain, after).held is None and held(plain, after).gradients is True
    assert held(plain, timeline([2, 1, 0.5], [np.nan] * 3), rising).words.endswith("No verdict is possible.")
    with pytest.raises(ValueError, match="after: it was measured on other blocks"):
        held(plain, TimelineWriter(None, layers=["x"], heads=1, meta={}).timeline)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"lr": 0.0}, "lr: expected a number > 0"),
        ({"ascent": -1.0}, "ascent: expected a number >= 0"),
        ({"least_accuracy": 1.5}, r"least_accuracy: expected a number in \[0, 1\]"),
        ({"least_accuracy": None}, "as a limit that stops the phase"),
        ({"layers": [7]}, "layers: expected distinct indices"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_moves(options, words):
    model, batch = tiny.model_and_batch("bert")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        debias_source(model, [batch], **options)
    for batches, error, said in (
        ([{"input_ids": batch["input_ids"]}], ValueError, "expected `labels`"),
        ([], ValueError, "expected at least one, got none"),
        (iter([batch]), TypeError, "iterated repeatedly"),
    ):
        with pytest.raises(error, match=said):
            debias_source(model, batches)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())
