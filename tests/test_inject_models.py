"""Injection by default into many types of models, trained one step: inside the planned blocks, and alive.

All types are swept by `make test-models`, which writes what became of each into docs/models.md.
"""

import pytest
from helpers.tiny_models import one_thread  # noqa: F401
from model_types.injection import injection, number_of, plan_of_every_other
from model_types.tiny import model_and_batch

from inflection_fast import dead_adapters, find_blocks, inject

# Every rule, fused projections, Conv1D, experts, shared and hand-written attention, encoders with decoders, images and
# sounds, text beside images, blocks without attention, weights that a decorated forward reads.
TYPES = [
    "albert", "apertus", "bart", "beit", "bert", "bloom", "clip", "cohere", "ctrl", "deberta", "deberta-v2", "deit",
    "distilbert", "electra", "ernie4_5", "falcon", "gemma2", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "granite", "helium", "hubert", "jamba", "llama", "mamba", "mistral", "mixtral", "modernbert", "mpnet", "olmo2",
    "opt", "phi", "phimoe", "qwen2", "qwen3", "qwen3_moe", "roberta", "siglip", "starcoder2", "t5", "vit", "wavlm",
    "xlm-roberta",
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_are_inside_the_planned_blocks_and_alive(kind):
    result = injection(*model_and_batch(kind))  # in evaluation mode: some types mask at random in training
    assert (result.status, result.note) == ("trained", "")
    assert result.modules >= 1


# Families whose gate, up and down projections peft takes for the fused experts of every block.
FUSED = [
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm4_moe", "hunyuan_v1_moe", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe",
    "qwen3_next", "solar_open",
]  # fmt: skip


@pytest.mark.parametrize("kind", FUSED)
def test_projections_that_peft_fuses_are_refused_with_what_works_instead(kind):
    model, batch = model_and_batch(kind)
    plan = plan_of_every_other(model, [len(find_blocks(model)) - 1])  # the first blocks of some have no experts
    leaf = "w1" if kind in ("minimax", "minimax_m2", "mixtral") else "up_proj"
    with pytest.raises(ValueError, match="target_parameters='experts'"):
        inject(model, plan, target_modules=[leaf])
    adapted = inject(model, plan, target_parameters="experts")
    experts = [name for name, p in adapted.named_parameters() if p.requires_grad and "experts" in name]
    inside = [name for name in experts if f".{plan.layers[0]}." in name]
    assert len(experts) == 4 and inside == experts  # A and B of two parameters, in the planned block alone
    number_of(adapted(**batch)).backward()
    assert dead_adapters(adapted) == []
