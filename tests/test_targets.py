"""Which modules of a block carry adapters, rule by rule."""

import logging

import helpers.tiny_models as tiny
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.injected import adapted_names, plan_for
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import dead_adapters, inject
from inflection_fast.act.code import read_directly
from inflection_fast.act.targets import is_linear


def mixtral():
    sizes = tiny._SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 4}
    config = hf.MixtralConfig(**sizes, vocab_size=tiny.VOCAB)
    return hf.MixtralForCausalLM(config)


def qwen3_moe():
    sizes = tiny._SIZES | {"num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8}
    config = hf.Qwen3MoeConfig(
        **sizes, vocab_size=tiny.VOCAB, num_experts=4, num_experts_per_tok=4, mlp_only_layers=[0]
    )
    return hf.Qwen3MoeForCausalLM(config)


def falcon():
    config = hf.FalconConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    return hf.FalconForCausalLM(config)


def llava():
    text = hf.LlamaConfig(**tiny._SIZES, vocab_size=tiny.VOCAB, num_key_value_heads=2)
    vision = hf.CLIPVisionConfig(**tiny._SIZES, image_size=16, patch_size=8, projection_dim=16)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def rules_of(adapted):
    return adapted.inflection_plans["default"].actions[0]["rules"]


def leaves(adapted):
    return {name.rpartition(".")[2] for name in adapted_names(adapted)}


@pytest.mark.parametrize(
    ("build", "rule", "expected"),
    [
        (tiny.bert, "peft", {"query", "value"}),
        (tiny.gpt2, "peft", {"c_attn"}),  # Conv1D, queries, keys and values in one
        (falcon, "peft", {"query_key_value"}),  # a subclass of nn.Linear with a forward of its own
        (tiny.distilbert, "attention", {"q_lin", "k_lin", "v_lin", "out_lin"}),
        (tiny.vit, "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (qwen3_moe, "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (tiny.Encoder, "attention", {"self_attn"}),  # nn.MultiheadAttention, which peft adapts as a whole
        (tiny.weighted, "attention", {"qkv", "out", "both"}),
    ],
)
def test_the_first_rule_that_finds_something_chooses(build, rule, expected):
    model = build()
    adapted = inject(model, plan_for(model, 1))
    assert leaves(adapted) - ({"out_proj"} if expected & {"self_attn", "both"} else set()) == expected
    assert set(rules_of(adapted).values()) == {rule}


class Cell(nn.Module):
    """A block that attends by itself, with a router, experts, a tied layer and one whose weight is read."""

    def __init__(self, embedding):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.experts = nn.Linear(16, 3), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, tiny.VOCAB, bias=False)
        self.head.weight = embedding.weight
        self.read = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        routed = sum(
            w[..., None] * e(x) for w, e in zip(self.gate(x).softmax(-1).unbind(-1), self.experts, strict=True)
        )
        return routed + F.linear(x, self.read.weight, self.read.bias) + self.head(x).mean() * 0


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 16)
        self.cells = nn.ModuleList(Cell(self.embed) for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for cell in self.cells:
            x = cell(x)
        return x


def test_routers_experts_output_layers_and_what_is_not_called_are_left_out(caplog):
    caplog.set_level(logging.INFO, logger="inflection_fast")
    model = Cells()
    plan = plan_for(model, 0, 2)
    adapted = inject(model, plan)
    assert adapted_names(adapted) == [f"cells.{i}.{name}" for i in (0, 2) for name in ("qkv", "out")]
    assert set(rules_of(adapted).values()) == {"linear"}
    for words in (
        "cells.0.gate, cells.2.gate (a router)",
        "cells.0.read",
        "reads its weight without calling it",
        "tied",
    ):
        assert words in caplog.text
    adapted(torch.arange(8)[None]).sum().backward()
    assert dead_adapters(adapted) == []


def test_a_weight_that_a_decorated_method_reads_is_known_to_be_read():
    class Decorated(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return F.linear(x, self.read.weight) + self.called(x.to(self.called.weight.dtype))

    assert read_directly(Decorated) == {"read"}


def test_dead_adapters_are_found():
    model = Cells()
    adapted = inject(model, plan_for(model, 1), target_modules=["qkv", "read"])
    adapted(torch.arange(8)[None]).sum().backward()
    assert dead_adapters(adapted) == ["base_model.model.cells.1.read"]


def test_each_stack_of_a_multimodal_model_has_its_own_default():
    model = llava()
    adapted = inject(model, plan_for(model, *range(6)))
    by_block = {name: rule for name, rule in rules_of(adapted).items()}
    assert {rule for name, rule in by_block.items() if "vision" in name} == {"attention"}
    assert {rule for name, rule in by_block.items() if "language" in name} == {"peft"}


class Shared(nn.Module):
    """Two blocks that share their attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, tiny.WIDTH)
        self.blocks = nn.ModuleList(tiny.Layer(False) for _ in range(2))
        self.blocks[1].mixer = self.blocks[0].mixer

    def forward(self, input_ids):
        return self.blocks[1](self.blocks[0](self.embed(input_ids)))


def test_what_a_block_outside_of_the_plan_runs_too_is_left_out():
    model = Shared()
    assert adapted_names(inject(model, plan_for(model, 0))) == ["blocks.0.mlp.0", "blocks.0.mlp.2"]
    with pytest.raises(ValueError, match="belong to blocks outside the plan, too; add those blocks to the plan"):
        inject(Shared(), plan_for(Shared(), 0), target_modules=["mixer.out"])
    model = Shared()
    adapted = inject(model, plan_for(model, 0, 1))
    assert adapted_names(adapted) == ["blocks.0.mixer.qkv", "blocks.0.mixer.out"]


def test_a_block_without_a_linear_layer_is_refused_by_name():
    model = nn.ModuleDict({"layers": nn.ModuleList(tiny.Layer(False) for _ in range(2)), "x": nn.Identity()})
    model.layers[1] = nn.Sequential(nn.Conv1d(2, 2, 1))
    plan = plan_for(model, 1, named=True, layers=["layers.0", "layers.1"])
    with pytest.raises(ValueError, match=r"layers.1 has no linear layer, so there is nothing to adapt in it"):
        inject(model, plan)


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "layers"), [(mixtral, (0, 2)), (qwen3_moe, (1,)), (tiny.gpt_oss, (1,))])
def test_experts_are_adapted_on_request_in_the_planned_blocks_only(build, layers):
    model = build()
    adapted = inject(model, plan_for(model, *layers), target_parameters="experts")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in trained} == set(layers)
    experts = [name for name in trained if "experts" in name]
    assert len(experts) == 4 * len(layers)  # A and B of two parameters
    adapted(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    assert dead_adapters(adapted) == []


def test_names_that_peft_reads_as_the_fused_experts_are_refused_or_left_out():
    model = qwen3_moe()
    plan = plan_for(model, 0)
    with pytest.raises(ValueError, match=r"gate_proj.*fused experts of every block.*target_parameters='experts'"):
        inject(model, plan, target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match="'experts' matches nothing in the planned blocks"):
        inject(model, plan, target_parameters="experts")
    with pytest.raises(ValueError, match="expected 'experts' or a sequence of names, got 'all'"):
        inject(model, plan, target_parameters="all")


# ---- quantised -------------------------------------------------------------------------------------------------------


class QuantLinear(nn.Module):
    """As libraries of quantised layers have it."""

    infeatures, outfeatures = 16, 48


def test_a_linear_class_that_peft_does_not_know_is_refused_in_words():
    model = tiny.HandWritten()
    model.blocks[0].mixer.qkv = QuantLinear()
    with pytest.raises(ValueError, match=r"QuantLinear.*is not supported"):
        inject(model, plan_for(model, 0))


def test_a_linear_layer_is_known_by_its_sizes():
    assert is_linear(QuantLinear()) and is_linear(nn.Linear(2, 2)) and is_linear(hf.pytorch_utils.Conv1D(2, 2))
    assert not is_linear(nn.LayerNorm(4)) and not is_linear(nn.Embedding(2, 2)) and not is_linear(nn.Conv2d(1, 1, 1))


def test_ranks_of_single_layers_keep_the_scale_of_the_updates():
    model = tiny.llama()
    adapted = inject(model, plan_for(model, 0, 2), 4, ranks={2: 16})
    modules = {name: m for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    for name, module in modules.items():
        assert module.r["default"] == (16 if "layers.2." in name else 4)
        assert module.scaling["default"] == 2.0
    with pytest.raises(ValueError, match=r"ranks of the planned layers \[0, 2\], got \[1\]"):
        inject(tiny.llama(), plan_for(tiny.llama(), 0, 2), ranks={1: 2})
    with pytest.raises(ValueError, match=r"ranks\[2\]: expected an integer >= 1, got 0"):
        inject(tiny.llama(), plan_for(tiny.llama(), 0, 2), ranks={2: 0})
