"""Injection by default into many types of models, trained one step: inside the planned blocks, and alive.

All types are swept by `make test-models`, which writes what became of each into docs/models.md.
"""

import pytest
from helpers.tiny_models import one_thread  # noqa: F401
from model_types.injection import injection
from model_types.tiny import model_and_batch

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
