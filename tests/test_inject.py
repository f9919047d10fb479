"""LoRA on exactly the planned blocks: what is adapted, what trains, and what is refused without a trace."""

import copy

import helpers.tiny_models as tiny
import peft
import pytest
import torch
import transformers as hf
from helpers.injected import adapted_names, plan_for
from torch import nn

from inflection_fast import Plan, inject
from inflection_fast.act import restore_adapter

BERT = "bert.encoder.layer.{}.attention.self"


def t5_classifier():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": tiny.VOCAB}
    return hf.T5ForSequenceClassification(hf.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def multiple_choice():
    return hf.BertForMultipleChoice(tiny.bert().config)


def trained_beside(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    return sorted({name.removeprefix("base_model.model.").split(".modules_to_save")[0] for name in names})


def state_of(model):
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "trainable": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "attributes": set(vars(model)),
    }


# ---- what is adapted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "layers", "options", "modules", "head"),
    [
        (tiny.bert, (0, 2), {}, [f"{BERT}.query", f"{BERT}.value"], ["classifier"]),
        (
            tiny.distilbert,
            (1,),
            {"target_modules": ["q_lin", "v_lin"]},
            ["distilbert.transformer.layer.{}.attention.q_lin", "distilbert.transformer.layer.{}.attention.v_lin"],
            ["classifier", "pre_classifier"],
        ),
        (tiny.gpt2, (1,), {}, ["transformer.h.{}.attn.c_attn"], []),
        (tiny.llama, (0, 2), {}, ["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"], []),
        (multiple_choice, (0,), {}, [f"{BERT}.query", f"{BERT}.value"], ["classifier"]),
        (tiny.vit, (1,), {"target_modules": ["q_proj"]}, ["vit.layers.{}.attention.q_proj"], ["classifier"]),
        (
            tiny.HandWritten,
            (1,),
            {"target_modules": "all-linear"},
            [f"blocks.{{}}.{name}" for name in ("mixer.qkv", "mixer.out", "mlp.0", "mlp.2")],
            [],
        ),
    ],
    ids=["bert", "distilbert", "gpt2", "llama", "multiple choice", "vit", "hand-written"],
)
def test_only_the_planned_blocks_are_adapted_and_an_untrained_head_trains(build, layers, options, modules, head):
    model = build()
    adapted = inject(model, plan_for(model, *layers), **options)
    assert adapted_names(adapted) == [name.format(layer) for layer in layers for name in modules]
    assert trained_beside(adapted) == head


def test_encoder_and_decoder_blocks_are_told_apart():
    model = tiny.t5()  # blocks 0, 1 are the encoder's, 2, 3 the decoder's
    adapted = inject(model, plan_for(model, 0, 3))
    attentions = [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    ]
    assert adapted_names(adapted) == [f"{attention}.{name}" for attention in attentions for name in "qv"]


def test_a_head_that_peft_does_not_know_trains_too():
    model = t5_classifier()
    assert trained_beside(inject(model, plan_for(model, 0))) == ["classification_head"]


def test_dense_means_what_the_target_says():
    model = tiny.bert()
    adapted = inject(model, plan_for(model, 1), target_modules=["attention.output.dense"])
    assert adapted_names(adapted) == ["bert.encoder.layer.1.attention.output.dense"]
    model = tiny.bert()
    adapted = inject(model, plan_for(model, 1), target_modules=r".*\.intermediate\.dense")
    assert adapted_names(adapted) == ["bert.encoder.layer.1.intermediate.dense"]


def test_many_targets_are_matched_as_exactly_as_few():
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 16}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=40))
    adapted = inject(model, plan_for(model, 0, 1, 4, 5, 6, 10, 11), target_modules="all-linear")
    assert {int(name.split(".")[2]) for name in adapted_names(adapted)} == {0, 1, 4, 5, 6, 10, 11}
    assert len(adapted_names(adapted)) == 7 * 6


@pytest.mark.parametrize(
    ("build", "task"),
    [(tiny.bert, "SEQ_CLS"), (tiny.gpt2, "CAUSAL_LM"), (tiny.t5, "SEQ_2_SEQ_LM"), (multiple_choice, None)],
)
def test_the_task_follows_from_the_class_of_the_model(build, task):
    model = build()
    assert inject(model, plan_for(model, 0)).peft_config["default"].task_type == task


def test_options_reach_peft():
    model = tiny.bert()
    adapted = inject(model, plan_for(model, 0), 3, lora_dropout=0.1, modules_to_save=["pooler"], adapter_name="mine")
    config = adapted.peft_config["mine"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.1)
    assert trained_beside(adapted) == ["bert.pooler", "classifier"]
    model = tiny.bert()
    assert inject(model, plan_for(model, 0), lora_alpha=32).peft_config["default"].lora_alpha == 32


# ---- what training does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_step_changes_only_adapters_and_head_and_merging_changes_nothing(name, recwarn):
    model, batch = tiny.model_and_batch(name)
    adapted = inject(model, plan_for(model, 1))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    before = {key: value.detach().clone() for key, value in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # B starts at zero, so A moves in the second step only
        tiny.loss_of(adapted(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, value in adapted.named_parameters() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "lora_" in key or "modules_to_save" in key}
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_input_embeddings_is_adapted_and_saved(tmp_path):
    model = tiny.llama()

    def none(self):
        raise NotImplementedError("get_input_embeddings")

    asked = type("Bare", (type(model),), {"get_input_embeddings": none})
    model.__class__ = asked
    adapted = inject(model, plan_for(model, 1))
    assert len(adapted_names(adapted)) == 2 and "get_input_embeddings" not in vars(model)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_saved_adapter_and_its_head_come_back(tmp_path):
    model, batch = tiny.model_and_batch("bert")
    base = copy.deepcopy(model)
    adapted = inject(model, plan_for(model, 0, 2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert adapted_names(again) == adapted_names(adapted)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, adapted.eval()(**batch).logits)


# ---- which plans fit -------------------------------------------------------------------------------------------------


def test_a_plan_made_on_the_backbone_fits_the_model_with_a_head_and_back():
    model = tiny.bert()
    inject(model, plan_for(model.bert, 1))
    model = tiny.bert()
    assert adapted_names(inject(model.bert, plan_for(model, 1)))[0] == "encoder.layer.1.attention.self.query"


def test_a_plan_for_blocks_given_by_name_finds_them_by_name():
    model = tiny.bert()
    names = ["bert.encoder.layer.0", "bert.encoder.layer.2"]
    plan = plan_for(model, 1, named=True, layers=names)
    assert adapted_names(inject(model, plan))[0] == "bert.encoder.layer.2.attention.self.query"


def refused(model, plan, words, **options):
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        inject(model, plan, **options)
    assert state_of(model) == before


def test_an_empty_plan_is_refused_with_its_own_words():
    model = tiny.bert()
    refused(model, plan_for(model), "no blocks to act on. Nothing was worth picking")


def test_a_plan_for_another_model_is_refused():
    bert, gpt2 = tiny.bert(), tiny.gpt2()
    refused(gpt2, plan_for(bert, 0), "for a model of type bert, this one is gpt2")
    refused(bert, plan_for(bert, 0, layers=["bert.encoder.layer.0"]), "a model of 1 blocks, this one has 3")
    refused(bert, plan_for(bert, 0, layers=[f"bert.blocks.{i}" for i in range(3)]), "with bert.blocks.0 as block 0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["c_attn"]}, r"\['c_attn'\] matches nothing in bert.encoder.layer.1, which has .*query"),
        ({"target_modules": ["query", "valeu"]}, r"\['valeu'\] match nothing in the planned blocks"),
        ({"modules_to_save": ["clasifier"]}, r"has no modules \['clasifier'\]"),
        ({"modules_to_save": "pooler"}, "got the string 'pooler'"),
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number > 0, got '8'"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": "0"}, "lora_dropout"),
        ({"target_modules": "*.query"}, r"'\*.query' is not a regular expression: nothing to repeat"),
        ({"target_modules": 3}, "target_modules: expected a string or a sequence of names, got 3"),
        ({"adapter_name": "a.b"}, "adapter_name: expected a name without dots, got 'a.b'"),
        ({"adapter_name": ""}, "adapter_name"),
        ({"target_modules": ["attention.self"]}, "not supported"),
        ({"target_modules": ["query", "LayerNorm"]}, "not supported"),
        ({"modules_to_save": ["query"]}, "peft would match other modules than the planned ones: without"),
    ],
)
def test_what_cannot_be_injected_is_refused_and_leaves_the_model_as_it_was(options, words):
    model = tiny.bert()
    model.bert.pooler.dense.weight.requires_grad_(False)
    refused(model, plan_for(model, 1), words, **options)


def test_a_failure_after_everything_was_frozen_leaves_the_model_as_it_was(monkeypatch):
    injected = peft.get_peft_model

    def fail(*args, **options):
        injected(*args, **options)
        raise ValueError("too late")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    model = tiny.bert()
    model.bert.pooler.dense.weight.requires_grad_(False)
    refused(model, plan_for(model, 1), "too late")


def test_names_that_end_alike_elsewhere_are_not_hit():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = tiny.HandWritten().blocks
            self.extra = nn.ModuleDict({"blocks": nn.ModuleDict({"1": nn.ModuleDict({"out": nn.Linear(2, 2)})})})
            self.extra.blocks["1"].mixer = nn.Module()
            self.extra.blocks["1"].mixer.out = nn.Linear(2, 2)

    model = Twice()
    plan = plan_for(model, 1, named=True, layers=[f"blocks.{i}" for i in range(3)])
    assert plan.target_modules(model, ["mixer.out"]) == ["blocks.1.mixer.out"]
    assert adapted_names(inject(model, plan, target_modules=["mixer.out"])) == ["blocks.1.mixer.out"]


# ---- models that are wrapped, or have adapters -----------------------------------------------------------------------


def compiled(model):
    return torch.compile(model)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.DataParallel, "wrapped by DataParallel; pass the model inside .model.module."),
        (compiled, "it is compiled; pass the model that was compiled"),
        (lambda model: peft.get_peft_model(model, peft.LoraConfig()).base_model, "has adapters already"),
        (
            lambda model: peft.get_peft_model(model, peft.LoraConfig()),
            "has an adapter 'default' already",
        ),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_do(wrap, words):
    model = tiny.bert()
    plan = plan_for(model, 0)
    refused(wrap(model), plan, words)


def test_a_second_adapter_is_added_by_name_and_the_first_one_stays(tmp_path):
    model, batch = tiny.model_and_batch("llama")
    first, second = plan_for(model, 0), plan_for(model, 2)
    adapted = inject(model, first)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        expected = adapted.eval()(**batch).logits
    assert inject(adapted, second, 3, adapter_name="late") is adapted
    assert adapted.active_adapters == ["late"]
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("layers.2." in name and ".late." in name for name in trained)
    adapted.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(adapted.eval()(**batch).logits, expected)
    adapted.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).layers == (0,)
    assert Plan.from_pretrained(tmp_path / "late").layers == (2,)
    refused(adapted, second, "has an adapter 'late' already", adapter_name="late")


def test_a_second_adapter_that_fails_leaves_the_first_one_active():
    model = tiny.llama()
    plan = plan_for(model, 1)
    adapted = inject(model, plan)
    refused(adapted, plan, "Cannot combine adapters", config=peft.IA3Config(), adapter_name="late")
    refused(adapted, plan, "not supported", target_modules=["q_proj", "input_layernorm"], adapter_name="late")
    assert list(adapted.peft_config) == adapted.active_adapters == ["default"]


# ---- the plan beside the adapter -------------------------------------------------------------------------------------


def test_the_plan_and_its_rule_are_saved_beside_the_adapter(tmp_path, caplog):
    model = tiny.bert()
    caplog.set_level("INFO", logger="inflection_fast")
    adapted = inject(model, plan_for(model, 0, 2))
    assert "LORA on 4 modules of 2 blocks by the rule 'peft'" in caplog.text
    for holder in (adapted, copy.deepcopy(adapted)):
        holder.save_pretrained(tmp_path)
        plan = Plan.from_pretrained(tmp_path)
        (tmp_path / Plan.FILE).unlink()
    (action,) = plan.actions
    assert (action["method"], action["r"], action["lora_alpha"]) == ("LORA", 4, 8)
    assert action["rules"] == {f"bert.encoder.layer.{i}": "peft" for i in (0, 2)}
    assert action["modules"] == adapted_names(adapted)
    with pytest.raises(FileNotFoundError, match=r"holds no inflection_plan\.json"):
        Plan.from_pretrained(tmp_path)


def test_a_restored_adapter_has_its_plan(tmp_path):
    model = tiny.bert()
    inject(model, plan_for(model, 1)).save_pretrained(tmp_path)
    again = restore_adapter(tiny.bert(), tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert Plan.from_pretrained(tmp_path / "again").layers == (1,)


def test_evaluation_of_an_encoder_layer_of_torch_does_not_pass_by_the_adapters(tmp_path):
    model, batch = tiny.model_and_batch("encoder")
    adapted = inject(model, plan_for(model, 0))
    assert adapted_names(adapted)[0] == "encoder.layers.0.self_attn"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.eval()
    trained = adapted(**batch)["logits"].detach()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch)["logits"], trained)
        assert not torch.allclose(model.eval()(**batch)["logits"], adapted.base_model.unload()(**batch)["logits"])
