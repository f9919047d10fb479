"""find_blocks: the transformer blocks of a model, in forward order, by structure or by name."""

import pytest
import torch
from models import BLOCKS, KINDS, build
from torch import nn

from inflection_fast import find_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_by_structure_in_forward_order(kind):
    model = build(kind)
    blocks = find_blocks(model)
    assert [b.index for b in blocks] == [0, 1, 2]
    assert [b.name for b in blocks] == [f"{BLOCKS[kind]}.{i}" for i in range(3)]
    for block in blocks:
        assert model.get_submodule(block.path) is block.module


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_wrappers_change_the_path_and_not_the_name(kind):
    model = build(kind)
    compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(model)
    for wrapped in (compiled, parallel):
        blocks = find_blocks(wrapped)
        assert [b.name for b in blocks] == [f"{BLOCKS[kind]}.{i}" for i in range(3)]
        assert all(wrapped.get_submodule(b.path) is b.module for b in blocks)


def test_a_peft_model_keeps_its_names():
    import peft

    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    blocks = find_blocks(model)
    assert [b.name for b in blocks] == [f"model.layers.{i}" for i in range(3)]
    assert all(model.get_submodule(b.path) is b.module for b in blocks)


def test_names_choose_blocks_and_keep_forward_order():
    model = build("gpt2")
    blocks = find_blocks(model, ["transformer.h.2", "transformer.h.0"])
    assert {b.name for b in blocks} == {"transformer.h.0", "transformer.h.2"} and len(blocks) == 2


def test_a_name_that_does_not_exist_is_said_with_near_matches():
    with pytest.raises(ValueError, match=r"transformer\.h\.0") as caught:
        find_blocks(build("gpt2"), ["transformers.h.0"])
    assert "transformers.h.0" in str(caught.value)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), nn.Module()])
def test_a_model_without_attention_is_a_value_error(model):
    with pytest.raises(ValueError, match="attention"):
        find_blocks(model)


def test_pytorchs_own_encoder_is_found():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 4)
    assert [b.name for b in find_blocks(encoder)] == [f"layers.{i}" for i in range(4)]


def test_finding_blocks_changes_no_model():
    model = build("bert")
    before = {n: (id(m), m.training, dict(vars(m))) for n, m in model.named_modules()}
    find_blocks(model)
    assert {n: (id(m), m.training, dict(vars(m))) for n, m in model.named_modules()} == before
