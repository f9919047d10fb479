"""Which modules are the blocks of a model."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import HandWritten, bert, distilbert, gpt2, llama, one_thread, t5, vit  # noqa: F401
from model_types.tiny import config_of, model_of
from torch import nn

from inflection_fast.blocks import find_blocks, is_named_attention
from inflection_fast.measure.attention_places import AttentionPlaces

hf = pytest.importorskip("transformers")


def names(model, *args):
    return [block.name for block in find_blocks(model, *args)]


@pytest.mark.parametrize(
    "build, expected",
    [
        (bert, [f"bert.encoder.layer.{i}" for i in range(3)]),
        (distilbert, [f"distilbert.transformer.layer.{i}" for i in range(2)]),
        (gpt2, [f"transformer.h.{i}" for i in range(3)]),
        (llama, [f"model.layers.{i}" for i in range(3)]),
        (vit, [f"vit.layers.{i}" for i in range(3)]),
        (HandWritten, [f"blocks.{i}" for i in range(3)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blocks_are_found_by_structure(build, expected):
    model = build()
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == [block.path for block in blocks] == expected
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert all(block.module is model.get_submodule(block.path) for block in blocks)


def test_minilm_like_encoder_without_a_head():
    model = hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8))
    assert names(model) == [f"encoder.layer.{i}" for i in range(6)]


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_comes_before_decoder(layers):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 20, "num_layers": layers}
    expected = [f"{half}.block.{i}" for half in ("encoder", "decoder") for i in range(layers)]
    assert names(hf.T5ForConditionalGeneration(hf.T5Config(**sizes))) == expected

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8), layers)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), layers)

    assert names(Backwards()) == [f"{half}.layers.{i}" for half in ("encoder", "decoder") for i in range(layers)]


def test_a_block_with_a_list_of_parts_is_one_block():
    assert "encoder.block.0.layer.0" not in names(t5())


def test_stacks_inside_stacks_give_the_inner_blocks():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    assert names(hf.SwinModel(config)) == [f"encoder.layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]


def test_attention_is_recognised_by_the_call_where_no_name_says_so():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert names(nn.Sequential(nn.Linear(8, 8), nn.Sequential(Cell(), Cell()))) == ["1.0", "1.1"]


def test_a_normalisation_named_after_attention_is_not_attention():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    assert is_named_attention(Mixer().attention_norm, "attention_norm") is False
    assert not AttentionPlaces(find_blocks(nn.ModuleList([Mixer(), Mixer()]))).innermost


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(8, 8)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = nn.Sequential(nn.Linear(8, 8))


def held(**children):
    """A module whose forward names nothing."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def stacks(model):
    return {block.stack: [other.name for other in find_blocks(model) if other.stack == block.stack]
            for block in find_blocks(model)}  # fmt: skip


def test_layers_without_attention_are_blocks_too():
    hybrid = held(layers=nn.ModuleList([Mixing(), Mixing(), Attending(), Mixing()]))
    assert names(hybrid) == [f"layers.{i}" for i in range(4)]
    assert names(held(layers=nn.ModuleList([Mixing(), Attending()]))) == ["layers.0", "layers.1"]  # each class once


def test_a_model_without_attention_has_blocks():
    assert names(held(layers=nn.ModuleList([Mixing(), Mixing()]))) == ["layers.0", "layers.1"]
    experts = lambda: held(experts=nn.ModuleList([Mixing(), Mixing()]))  # noqa: E731
    model = held(layers=nn.ModuleList([experts(), experts()]), head=nn.Linear(8, 8))
    assert names(model) == ["layers.0", "layers.1"]


def test_linear_attention_is_not_attention():
    class GatedDeltaNet(Attention):
        pass

    assert not is_named_attention(GatedDeltaNet(), "linear_attn") and not is_named_attention(Attention(), "linear_attn")
    assert is_named_attention(Attention(), "self_attn")


def test_layers_with_a_list_of_latent_attentions_are_the_blocks():
    class ShortcutMLA(nn.Module):  # as LongCat's, it calls an interface and bears no other name
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), x)

    layer = lambda: held(  # noqa: E731
        self_attn=nn.ModuleList([ShortcutMLA(), ShortcutMLA()]), mlps=nn.ModuleList([Mixing(), Mixing()])
    )
    assert names(held(layers=nn.ModuleList([layer(), layer()]))) == ["layers.0", "layers.1"]


def test_bare_lists_are_no_blocks_and_the_attention_in_them_is():
    pair = lambda: nn.ModuleList([nn.ModuleList([nn.LayerNorm(8)]), Attention(), Mixing()])  # noqa: E731
    assert names(held(layers=nn.ModuleList([pair(), pair()]))) == ["layers.0.1", "layers.1.1"]
    parallel = held(attentions=nn.ModuleList([Attention(), Attention()]), ffns=nn.ModuleList([Mixing(), Mixing()]))
    assert names(parallel) == ["attentions.0", "attentions.1"]
    stages = held(stages=nn.ModuleList([nn.ModuleList([Attending(), Attending()]), nn.ModuleList([Attending()])]))
    assert names(stages) == ["stages.0.0", "stages.0.1", "stages.1.0"]


def test_a_module_that_runs_several_times_is_several_blocks():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "embedding_size": 8, "vocab_size": 9}
    layer = "encoder.albert_layer_groups.{}.albert_layers.{}{}".format
    albert = hf.AlbertModel(hf.AlbertConfig(**sizes, num_hidden_layers=3, num_hidden_groups=1))
    assert names(albert) == [layer(0, 0, f"@{run}") for run in range(3)]
    grouped = hf.AlbertModel(hf.AlbertConfig(**sizes, num_hidden_layers=3, num_hidden_groups=2, inner_group_num=2))
    ran = [(0, 0, "@0"), (0, 1, "@0"), (0, 0, "@1"), (0, 1, "@1"), (1, 0, ""), (1, 1, "")]
    assert names(grouped) == [layer(*one) for one in ran]
    block, other = Attending(), Attending()
    universal = held(layers=nn.ModuleList([block, other, block]))
    assert names(universal) == ["layers.0@0", "layers.1@0", "layers.0@1"]
    blocks = find_blocks(universal)
    assert [b.path for b in blocks] == ["layers.0", "layers.1", "layers.0"] and blocks[2].module is block
    assert names(held(layer=block), ["layer@0", "layer@1"]) == ["layer@0", "layer@1"]
    assert names(universal, names(universal)) == names(universal)
    with pytest.raises(ValueError, match="no module 'layer@x'"):
        find_blocks(held(layer=block), ["layer@x"])


def test_stacks_are_named_by_where_their_paths_differ():
    layers = lambda: nn.ModuleList([Attending(), Attending()])  # noqa: E731
    tower = held(vision_model=held(encoder=held(layers=layers())))
    model = held(model=held(vision_tower=tower, language_model=held(layers=layers())))
    assert {name: len(paths) for name, paths in stacks(model).items()} == {"vision_tower": 2, "language_model": 2}
    twice = held(pixel=held(encoder=held(layers=layers()), decoder=held(layers=layers())), head=held(layers=layers()))
    assert list(stacks(twice)) == ["pixel.encoder", "pixel.decoder", "head"]
    assert list(stacks(held(encoder=held(layers=layers())))) == ["encoder"]
    assert list(stacks(held(model=held(layers=layers())))) == ["blocks"]
    named = find_blocks(model, ["model.language_model.layers.1"])
    assert [block.stack for block in named] == ["language_model"]


def test_stacks_come_in_the_order_in_which_the_code_runs_them():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attending(), Attending()])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.late, self.vision = Vision(), Vision(), Vision()

        def forward(self, x):
            width = self.text.width  # looked up, not run
            x = self.seen(x)
            x = self.text(x)
            return self.late(x) + width

        def seen(self, x):
            return self.vision(x)

    assert list(stacks(Two())) == ["vision", "text", "late"]
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=SMALL, vision_config=SMALL | {"image_size": 8, "patch_size": 4}))
    assert list(stacks(clip)) == ["vision_model", "text_model"]


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def test_names_lack_the_prefixes_of_wrappers_and_paths_have_them():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    block = find_blocks(adapted)[0]
    assert (block.name, block.path) == ("bert.encoder.layer.0", "base_model.model.bert.encoder.layer.0")

    block = find_blocks(torch.compile(gpt2()))[1]
    assert (block.name, block.path) == ("transformer.h.1", "_orig_mod.transformer.h.1")

    class Wrapper(nn.Module):  # as DistributedDataParallel, which needs a process group
        __module__ = "torch.nn.parallel.distributed"

        def __init__(self, module):
            super().__init__()
            self.module = module

    block = find_blocks(Wrapper(adapted))[2]
    assert (block.name, block.path) == ("bert.encoder.layer.2", "module.base_model.model.bert.encoder.layer.2")


def test_a_submodule_that_happens_to_be_called_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = HandWritten()

    assert names(Holder())[0] == "module.blocks.0"


def test_blocks_by_name_keep_the_given_order():
    model = gpt2()
    assert names(model, ["transformer.h.2", "transformer.h.0"]) == ["transformer.h.2", "transformer.h.0"]
    compiled = torch.compile(model)
    for name in ("transformer.h.1", "_orig_mod.transformer.h.1"):
        assert find_blocks(compiled, [name])[0].path == "_orig_mod.transformer.h.1"


def test_a_name_that_does_not_exist_is_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"no module 'transformer.h.7'.*'transformer.h.[012]'"):
        find_blocks(gpt2(), ["transformer.h.7"])
    with pytest.raises(ValueError, match="is given twice"):
        find_blocks(gpt2(), ["transformer.h.1", "transformer.h.1"])
    with pytest.raises(TypeError, match=r"single string 'transformer.h.1'"):
        find_blocks(gpt2(), "transformer.h.1")


def test_models_without_blocks_are_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))):
        with pytest.raises(ValueError, match="no stack of blocks with attention"):
            find_blocks(model)
    with pytest.raises(ValueError, match="no stack of blocks with attention"):
        find_blocks(bert(), [])
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        find_blocks({})


def test_stacks_that_take_turns_are_in_the_order_of_their_turns():
    turns = ["gated_cross_attn_layers.0", "layers.0", "gated_cross_attn_layers.1", "layers.1"]
    assert [name for name in names(model_of("idefics", config_of("idefics"))) if "vision" not in name] == turns
    model = model_of("hrm_text", config_of("hrm_text"))
    blocks = find_blocks(model)
    high, low = model.config.H_cycles, model.config.L_cycles
    stacks = ("L_module", "H_module")
    depth = {stack: len({b.path for b in blocks if b.stack == stack}) for stack in stacks}
    expected = []
    for cycle in range(high):
        for turn in range(low):
            expected += [f"L_module.layers.{i}@{cycle * low + turn}" for i in range(depth["L_module"])]
        expected += [f"H_module.layers.{i}@{cycle}" for i in range(depth["H_module"])]
    assert [block.name for block in blocks] == expected and [b.index for b in blocks] == list(range(len(expected)))


def test_blocks_whose_forward_is_called_directly_are_their_attention():
    model = hf.SqueezeBertModel(
        hf.SqueezeBertConfig(hidden_size=8, embedding_size=8, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=8, q_groups=1, k_groups=1, v_groups=1, intermediate_groups=1,
                             output_groups=1)
    )  # fmt: skip
    assert names(model) == ["encoder.layers.0.attention", "encoder.layers.1.attention"]
    assert {block.stack for block in find_blocks(model)} == {"encoder"}
