"""Target modules from a short measurement, and a model that is left as it was."""

import helpers.tiny_models as tiny
import peft
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import SelectConfig, find_inflection_target_modules


def batches(count):
    for seed in range(count):
        torch.manual_seed(seed)
        yield tiny.continue_text()


def state(model):
    return (
        {name: (p.detach().clone(), p.grad, p.requires_grad) for name, p in model.named_parameters()},
        model.training,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_any_peft_configuration_is_one_line_away_and_the_model_is_as_it_was(frozen):
    model, batch = tiny.model_and_batch("llama")
    model(**batch).loss.backward()
    model.requires_grad_(not frozen)
    before = state(model)
    found = find_inflection_target_modules(
        model, batches(6), steps=4, select_config=SelectConfig("top", k=1, significance=None)
    )
    after = state(model)
    for name, (value, gradient, trains) in before[0].items():
        assert torch.equal(value, after[0][name][0]) and gradient is after[0][name][1] and trains == after[0][name][2]
    assert before[1:] == after[1:]
    assert list(found) == ["target_modules"] and len(found["target_modules"]) == 2
    adapted = peft.get_peft_model(model, peft.LoraConfig(**found))
    assert sorted(adapted.base_model.targeted_module_names) == sorted(found["target_modules"])


def test_what_cannot_be_measured_is_refused():
    model = tiny.llama()
    with pytest.raises(ValueError, match="steps: expected an integer >= 2, got 1"):
        find_inflection_target_modules(model, batches(3), steps=1)
    with pytest.raises(ValueError, match="expected at least 2 batches, got 1"):
        find_inflection_target_modules(model, batches(1))
    with pytest.raises(ValueError, match="the model returned no loss for a batch; add labels to the batches"):
        find_inflection_target_modules(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long)}] * 3)
    with pytest.raises(TypeError, match="expected mappings of tensors, got Tensor"):
        find_inflection_target_modules(model, [torch.ones(2, 4, dtype=torch.long)] * 3)
    with pytest.raises(ValueError, match=r"no layer was chosen.*SelectConfig"):
        find_inflection_target_modules(model, batches(2), steps=2)
