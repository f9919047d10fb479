"""Tiny models of many types, through every way in which attention is seen, against their own eager attention.

The whole of Transformers is swept by `make test-models`, which writes docs/models.md.
"""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from helpers.tiny_models import one_thread  # noqa: F401
from model_types.sweep import at_most, check, quiet

# By the way in: Transformers' interface, softmax by hand, several stacks, windows, layers without attention.
INTERFACE = (
    "bert camembert clip_vision_model cohere2 dinov2 distilbert electra ernie4_5_moe esmc gemma2 gemma3_text glm4 gpt2 "
    "gpt_bigcode gpt_neox gpt_oss granite_swa hubert llama longcat_flash mistral mixtral modernbert nomic_bert olmo2 "
    "opt phi3 qwen2 qwen3 roberta smollm3 starcoder2 vit wav2vec2 xglm"
)
BY_HAND = (
    "big_bird bloom canine codegen convbert cpmant ctrl deberta deberta-v2 falcon flaubert funnel gpt_neox_japanese "
    "gptj ibert imagegpt longformer megatron-bert mpnet mpt openai-gpt rembert roformer wavlm xlm xlnet"
)
STACKS = "bart clip fsmt led longt5 marian prophetnet siglip t5 t5gemma"
WITHOUT = "fnet mamba rwkv"
TYPES = [*INTERFACE.split(), *BY_HAND.split(), *STACKS.split()]


@pytest.fixture(autouse=True)
def in_peace(one_thread):
    log = logging.getLogger("inflection_fast")
    level = log.level
    quiet()
    yield
    log.setLevel(level)


@pytest.mark.parametrize("model_type", TYPES)
def test_entropy_is_that_of_eager_attention(model_type):
    with at_most(60):
        result = check(model_type)
    assert (result.status, result.note) == ("right", "")
    assert result.compared >= 2


@pytest.mark.parametrize("model_type", WITHOUT.split())
def test_models_without_softmax_attention_have_gradients_and_no_entropy(model_type):
    with at_most(60):
        result = check(model_type)
    assert (result.status, result.compared) == ("no attention", 0)
    assert sum(result.stacks.values()) >= 2


def test_the_fixed_set_covers_sixty_types():
    assert len(set(TYPES)) == len(TYPES) >= 60 and torch.get_num_threads() == 1
