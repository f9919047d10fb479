"""The output quantity by hand, against float64."""

import pytest
import torch
from helpers.by_hand import measured, sums_of, values_of
from helpers.tiny_models import bert, gpt2

from inflection_fast.quantities.output import Output, counted_rows
from inflection_fast.quantities.quantity import ModelOutput


def seen(logits, labels=None, tokens=None):
    return ModelOutput({}, None, logits, labels, None, tokens, 0)


def prepared(model=None):
    quantity = Output()
    quantity.prepare(measured(model or torch.nn.Linear(1, 1)))
    return quantity


def truth(logits):
    z = logits.double()
    log_p, log_z = z.log_softmax(-1), z.logsumexp(-1)
    top = log_p.exp().amax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return {
        "output_confidence": top.mean(),
        "output_saturation": (top > 0.99).double().mean(),
        "output_entropy": entropy.mean(),
        "output_log_z": log_z.mean(),
        "output_log_z_squared": log_z.square().mean(),
        "output_max_logit": z.amax(),
    }


def check(found, logits, rel=1e-5):
    for name, value in truth(logits).items():
        assert getattr(found, name) == pytest.approx(value.item(), rel=rel), name


def logits_of(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(shape) * torch.rand(shape[:-1]).mul(12)[..., None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_with_the_label_of_a_next_token(dtype):
    quantity, logits = prepared(gpt2()), logits_of(4, 9, 31, dtype=dtype)
    labels = torch.randint(0, 31, (4, 9)).masked_fill(torch.rand(4, 9) < 0.4, -100)
    sums = sums_of(quantity, 1)
    quantity.on_model_output(sums, seen(logits[:1], labels[:1]))
    quantity.on_model_output(sums, seen(logits[1:], labels[1:]))
    trained = logits[:, :-1][labels[:, 1:] != -100]
    assert 0 < truth(trained)["output_saturation"] < 1
    check(values_of(quantity, sums), trained)


def test_rows_of_a_classifier_and_of_a_masked_model_are_not_shifted():
    quantity, logits = prepared(bert()), logits_of(5, 7)
    sums = sums_of(quantity, 1)
    quantity.on_model_output(sums, seen(logits, torch.tensor([0, 1, 2, -100, 4])))
    check(values_of(quantity, sums), logits[[0, 1, 2, 4]])
    labels = torch.full((2, 6), -100)
    labels[0, 5] = labels[1, 0] = 3
    assert torch.equal(counted_rows(labels.shape, labels, None, shifted=False), labels == 3)


def test_without_labels_rows_are_tokens_or_all():
    quantity, logits, tokens = prepared(), logits_of(3, 5, 11), torch.rand(3, 5) > 0.4
    sums = sums_of(quantity, 1)
    quantity.on_model_output(sums, seen(logits, tokens=tokens))
    check(values_of(quantity, sums), logits[tokens])
    sums = sums_of(quantity, 1)
    quantity.on_model_output(sums, seen(logits))
    check(values_of(quantity, sums), logits)


def test_a_step_without_a_row_has_no_value():
    quantity, sums = prepared(gpt2()), sums_of(Output(), 1)
    quantity.on_model_output(sums, seen(None))
    quantity.on_model_output(sums, seen(logits_of(2, 3, 5), torch.full((2, 3), -100)))
    assert sums["rows"] == 0 and values_of(quantity, sums).output_entropy != 0


def test_a_vocabulary_of_150000_is_read_without_a_second_copy():
    quantity, logits = prepared(), torch.randn(40, 150_000)
    sums = sums_of(quantity, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        quantity.on_model_output(sums, seen(logits))
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < logits.nbytes / 100
    check(values_of(quantity, sums), logits)


def test_poison_shows():
    quantity, logits = prepared(), logits_of(2, 3, 5)
    logits[1, 1, 2] = float("nan")
    sums = sums_of(quantity, 1)
    quantity.on_model_output(sums, seen(logits))
    found = values_of(quantity, sums)
    assert found.output_entropy != found.output_entropy and found.output_saturation != found.output_saturation
