"""The router quantity on the routers of Transformers' mixtures of experts, against float64."""

import pytest
import torch
import transformers as hf
from helpers.by_hand import measured, sums_of, values_of

from inflection_fast import find_blocks
from inflection_fast.quantities.quantity import SubmoduleForward
from inflection_fast.quantities.router import Router

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "vocab_size": 40,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, head_dim=4, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZES, head_dim=4, num_local_experts=4, num_experts_per_tok=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_entropy_and_load_equal_the_truth_over_tokens(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    blocks = find_blocks(model)
    for block in blocks:
        for parameter in Router().submodules(block)["router"].parameters():
            torch.nn.init.normal_(parameter)  # some come as zeros, and all experts alike
    quantity = Router()
    quantity.prepare(measured(model, blocks))
    sums, outputs = sums_of(quantity, len(blocks)), {}
    tokens = torch.rand(3, 7) > 0.3
    hooks = []
    for block in blocks:
        ((key, module),) = quantity.submodules(block).items()

        def hook(module, args, output, layer=block.index, key=key):
            outputs[layer] = output
            quantity.on_submodule(sums, SubmoduleForward(layer, key, module, args, {}, output, tokens))

        hooks.append(module.register_forward_hook(hook))
    model(input_ids=torch.randint(0, 40, (3, 7)))
    found = values_of(quantity, sums)
    for layer, (logits, _, indices) in outputs.items():
        log_p = logits[tokens.flatten()].double().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
        load = torch.bincount(indices[tokens.flatten()].flatten(), minlength=log_p.shape[1]).double()
        load /= load.sum()
        assert found.router_entropy[layer] == pytest.approx(entropy, rel=1e-12)
        assert found.router_load[layer].tolist() == pytest.approx(load.tolist())
        assert found.router_load_max[layer] == pytest.approx(load.max().item())
        assert load.max() > 1.05 / log_p.shape[1]


def test_a_model_without_experts_is_refused():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="no router"):
        Router().prepare(measured(model, find_blocks(model)))
