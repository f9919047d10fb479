"""A plan as the configuration of any peft method, and as settings of other tools."""

import helpers.tiny_models as tiny
import peft
import pytest
import torch
import yaml
from helpers.injected import adapted_names, plan_for
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import dead_adapters, inject

QV = [f"model.layers.{i}.self_attn.{name}" for i in (0, 2) for name in ("q_proj", "v_proj")]


def plan_and_model():
    model = tiny.llama()
    return plan_for(model, 0, 2), model


def test_target_modules_are_full_names_that_peft_takes():
    plan, model = plan_and_model()
    assert plan.target_modules(model) == QV
    config = plan.lora_config(model, r=3, use_dora=True)
    assert (config.r, config.lora_alpha, config.use_dora, config.task_type) == (3, 6, True, "CAUSAL_LM")
    assert sorted(adapted_names(peft.get_peft_model(model, config))) == sorted(QV)
    with pytest.raises(ValueError, match="r: expected an integer >= 1, got 0"):
        plan.lora_config(tiny.llama(), r=0)


METHODS = {
    "lora": peft.LoraConfig(r=2),
    "dora": peft.LoraConfig(r=2, use_dora=True),
    "rslora": peft.LoraConfig(r=2, use_rslora=True),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10),
    "ia3": peft.IA3Config(),
    "vera": peft.VeraConfig(r=4),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "oft": peft.OFTConfig(oft_block_size=4),
    "boft": peft.BOFTConfig(boft_block_size=4),
    "hra": peft.HRAConfig(r=2),
    "fourierft": peft.FourierFTConfig(n_frequency=8),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2),
    "randlora": peft.RandLoraConfig(r=2),
    "ln_tuning": peft.LNTuningConfig(),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_any_method_of_peft_lands_on_the_planned_blocks_and_learns(name):
    plan, model = plan_and_model()
    given = METHODS[name].to_dict()
    adapted = inject(model, plan, config=METHODS[name])
    assert METHODS[name].to_dict() == given  # a copy is filled in
    if name == "ln_tuning":
        expected = {f"model.layers.{i}.{n}_layernorm" for i in (0, 2) for n in ("input", "post_attention")}
    else:
        expected = set(QV)
    assert set(adapted_names(adapted)) == expected
    _, batch = tiny.model_and_batch("llama")
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch).loss.backward()
    assert name == "vera" or dead_adapters(adapted) == []  # VeRA's B starts at a value without effect in float32
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in adapted.named_parameters() if n in before)


def test_methods_by_name():
    plan, model = plan_and_model()
    config = plan.peft_config(model, "ia3")
    assert isinstance(config, peft.IA3Config) and config.target_modules == set(QV) and not config.feedforward_modules
    assert plan.peft_config(model, "dora", r=2).use_dora
    mlp = plan.peft_config(model, peft.IA3Config(target_modules=["k_proj", "down_proj"]))
    assert mlp.feedforward_modules == {f"model.layers.{i}.mlp.down_proj" for i in (0, 2)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=2), "PrefixTuning does not adapt modules of chosen layers"),
        ("prompt_tuning", "PromptTuning does not adapt modules of chosen layers .it puts learned vectors"),
        (peft.AdaptionPromptConfig(), "it counts layers from the top"),
        ("lora2", r"config: expected a PeftConfig or one of \['ADALORA'"),
        (peft.LoraConfig(layers_to_transform=[1]), "layers_to_transform: the plan chooses the layers"),
        (peft.LoraConfig(target_modules=["nothing"]), "matches nothing in model.layers.0"),
    ],
)
def test_methods_and_settings_that_no_plan_applies_to_are_refused(config, words):
    plan, model = plan_and_model()
    with pytest.raises(ValueError, match=words):
        plan.peft_config(model, config)


def test_numbers_and_places_are_not_given_twice():
    plan, model = plan_and_model()
    for options, words in (
        ({"r": 3}, "r: set it in config"),
        ({"lora_dropout": 0.1}, "lora_dropout: set it in config"),
        ({"target_modules": ["q_proj"]}, "target_modules: it is given twice"),
        ({"target_parameters": "experts"}, "target_parameters: IA3 has none"),
        ({"ranks": {0: 2}}, "ranks: IA3 has no rank_pattern"),
    ):
        config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
        with pytest.raises(ValueError, match=words):
            inject(model, plan, config=config, **options)
    with pytest.raises(TypeError, match="config: expected a PeftConfig, got dict"):
        inject(model, plan, config={"r": 4})


# ---- other tools -----------------------------------------------------------------------------------------------------


def lora_of(tool, text):
    """What the tool hands to peft, as its source does it."""
    settings = yaml.safe_load(text)
    if tool == "llama-factory":
        return settings["lora_target"].split(","), settings["lora_rank"], settings["lora_alpha"]
    if tool == "ms-swift":
        return settings["target_modules"], settings["lora_rank"], settings["lora_alpha"]
    return settings["lora_target_modules"], settings["lora_r"], settings["lora_alpha"]


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory", "ms-swift", "trl"])
def test_settings_of_other_tools_give_the_same_adapters(tool):
    plan, model = plan_and_model()
    text = plan.to_yaml(tool, model, r=2)
    assert text.startswith("# LoRA on blocks 0, 2 of 3\n")
    names, r, alpha = lora_of(tool, text)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names))
    assert (r, alpha, sorted(adapted_names(adapted))) == (2, 4, sorted(QV))
    injected = inject(tiny.llama(), plan).inflection_plans["default"]
    assert lora_of(tool, injected.to_yaml(tool, r=2)) == (sorted(QV), 2, 4)


def test_trl_reads_its_settings(tmp_path):
    trl = pytest.importorskip("trl")
    plan, model = plan_and_model()
    path = tmp_path / "config.yaml"
    path.write_text(plan.to_yaml("trl", model, r=2, modules_to_save=["lm_head"]), encoding="utf-8")
    (read,) = trl.TrlParser((trl.ModelConfig,)).parse_args_and_config(["--config", str(path)])
    config = trl.get_peft_config(read)
    assert (config.r, config.lora_alpha, config.lora_dropout, list(config.modules_to_save)) == (2, 4, 0.0, ["lm_head"])
    assert set(config.target_modules) == set(QV)


def test_what_cannot_be_written_is_refused():
    plan, model = plan_and_model()
    with pytest.raises(ValueError, match=r"tool: expected one of \['axolotl', 'llama-factory', 'ms-swift', 'trl'\]"):
        plan.to_yaml("megatron", model)
    with pytest.raises(ValueError, match="model: expected the model, because this plan has layers"):
        plan.to_yaml("trl")
