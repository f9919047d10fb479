"""Adapters on planned blocks of quantised models, as far as peft adapts the library's linear layers."""

import helpers.tiny_models as tiny
import pytest
import torch
from helpers.injected import adapted_names, plan_for
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import dead_adapters, inject

WANTED = [f"model.layers.{i}.self_attn.{name}" for i in (0, 2) for name in ("q_proj", "v_proj")]


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())


def by_bitsandbytes(model):
    nn = pytest.importorskip("bitsandbytes.nn")
    for layer in model.model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name, child in list(holder.named_children()):
                if type(child) is torch.nn.Linear:
                    new = nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=torch.float32,
                        quant_type="nf4",
                    )  # fmt: skip
                    new.weight = nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(holder, name, new.to("cpu"))
    model.is_loaded_in_4bit = True


@pytest.mark.parametrize("quantise", [by_torchao, by_bitsandbytes])
def test_adapters_on_a_quantised_base_are_in_the_planned_blocks_and_learn(quantise):
    model, batch = tiny.model_and_batch("llama")
    exact = model(**batch).logits.detach()
    quantise(model)
    rounded = model(**batch).logits.detach()
    assert rounded.isfinite().all() and not torch.equal(rounded, exact)
    adapted = inject(model, plan_for(model, 0, 2))
    assert sorted(adapted_names(adapted)) == sorted(WANTED)
    torch.testing.assert_close(adapted(**batch).logits, rounded)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch).loss.backward()
    assert dead_adapters(adapted) == []
    optimizer.step()
    assert not torch.equal(adapted(**batch).logits, rounded)
