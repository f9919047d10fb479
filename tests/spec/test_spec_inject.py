"""inject: LoRA on exactly the planned blocks, or a refusal that leaves the model as it was."""

import re

import pytest
import torch
from models import BLOCKS, batch, build
from profiles import pointing_at, timeline

from inflection_fast import Monitor, MonitorConfig, SelectConfig, find_blocks, inject, select

HF = ["bert", "gpt2", "llama"]
TARGETS = {"bert": {"query", "value"}, "gpt2": {"c_attn"}, "llama": {"q_proj", "v_proj"}}  # what peft itself would take


def meta_of(model, kind):
    """The description of a model as a measurement writes it."""
    with Monitor(model, MonitorConfig(every=1, rows=4, signals=("attention",))) as monitor:
        model(**batch(kind)).loss.backward()
        monitor.step()
    model.zero_grad()
    return monitor.timeline.meta


def plan_for(model, kind, layers):
    measured = pointing_at(layers, 3, layers=[b.name for b in find_blocks(model)], meta=meta_of(model, kind))
    plan = select(measured, SelectConfig(method="top", k=len(layers)))
    assert tuple(plan.layers) == tuple(layers)
    return plan


def adapted(model):
    """{layer: names of the modules with LoRA in it}, read from parameter names alone."""
    found = {}
    for name, _ in model.named_parameters():
        if "lora_" in name:
            layer, module = re.search(r"(?:layer|h|layers|body)\.(\d+)\.(.*?)\.lora_", name).groups()
            found.setdefault(int(layer), set()).add(module.split(".")[-1])
    return found


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", HF)
def test_exactly_the_planned_blocks_are_adapted(kind, layers):
    import peft

    model = build(kind)
    model = inject(model, plan_for(model, kind, layers), r=4)
    assert isinstance(model, peft.PeftModel)
    assert adapted(model) == {layer: TARGETS[kind] for layer in layers}


@pytest.mark.parametrize("kind", HF)
def test_only_lora_learns_and_the_start_is_the_model_itself(kind):
    model, one = build(kind).eval(), batch(kind)
    with torch.no_grad():
        before = model(**one).logits
    plan = plan_for(model, kind, (1,))
    model = inject(model.eval(), plan)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    allowed = "lora_|classifier" if kind == "bert" else "lora_"
    assert trainable and all(re.search(allowed, n) for n in trainable)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**one).logits, before, atol=1e-6)
    model.train()(**one).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_rank_alpha_and_dropout_arrive():
    model = build("llama")
    plan = plan_for(model, "llama", (0, 1))
    default = inject(build("llama"), plan).peft_config["default"]
    assert (default.r, default.lora_alpha, default.lora_dropout) == (4, 8, 0.0)
    chosen = inject(model, plan, r=3, lora_alpha=5, lora_dropout=0.25, adapter_name="mine").peft_config["mine"]
    assert (chosen.r, chosen.lora_alpha, chosen.lora_dropout) == (3, 5, 0.25)


def test_target_modules_may_be_chosen():
    model = build("llama")
    model = inject(model, plan_for(model, "llama", (1,)), target_modules=["o_proj", "up_proj"])
    assert adapted(model) == {1: {"o_proj", "up_proj"}}


def test_a_target_that_ends_like_another_does_not_leak():
    model = build("bert")  # "dense" names attention output, intermediate and output of every block
    model = inject(model, plan_for(model, "bert", (2,)), target_modules=["dense"])
    assert set(adapted(model)) == {2}
    assert not any("lora_" in n for n, _ in model.named_parameters() if "pooler" in n)


def test_block_one_is_not_block_ten_to_twelve():
    import transformers as hf

    config = hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=13, n_head=2, n_positions=16)
    model = hf.GPT2LMHeadModel(config)
    layers = [b.name for b in find_blocks(model)]
    meta = {"model": {"class": "GPT2LMHeadModel", "model_type": "gpt2", "parameters": model.num_parameters()}}
    plan = select(pointing_at((1, 12), 13, layers=layers, meta=meta), SelectConfig(method="top", k=2))
    assert set(adapted(inject(model, plan))) == {1, 12}


def untouched(model, before):
    return [n for n, _ in model.named_parameters()] == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "case", ["fewer layers", "another architecture", "other block names", "empty plan", "no target"]
)
def test_what_cannot_be_injected_exactly_is_refused_and_nothing_is_changed(case):
    import transformers as hf

    model, options = build("bert"), {}
    plan = plan_for(model, "bert", (0, 2))
    if case == "fewer layers":
        config = hf.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8
        )
        model = hf.BertForSequenceClassification(config)
    elif case == "another architecture":
        model = build("llama")
    elif case == "other block names":
        model = torch.nn.ModuleDict({"inner": model})
    elif case == "empty plan":
        names = [b.name for b in find_blocks(model)]
        plan = select(timeline([2.0] * 3, [-1.0] * 3, layers=names, meta=meta_of(model, "bert")))
        assert plan.layers == ()
    else:
        options = {"target_modules": ["q_projection"]}
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError) as refused:
        inject(model, plan, **options)
    assert len(str(refused.value).split()) >= 4
    assert untouched(model, before)


@pytest.mark.parametrize("options, word", [({"r": 0}, "r"), ({"r": -2}, "r"), ({"lora_dropout": 2.0}, "dropout")])
def test_bad_settings_are_refused(options, word):
    model = build("llama")
    plan, before = plan_for(model, "llama", (0,)), [n for n, _ in model.named_parameters()]
    with pytest.raises((ValueError, TypeError), match=word):
        inject(model, plan, **options)
    assert untouched(model, before)


def test_a_plan_that_is_no_plan_is_refused():
    with pytest.raises(TypeError, match="plan"):
        inject(build("llama"), [0, 1])


def test_an_adapted_model_is_saved_loaded_and_measured(tmp_path):
    import peft

    model = build("llama")
    plan = plan_for(model, "llama", (1,))
    model, one = inject(model, plan).train(), batch("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    config = MonitorConfig(every=1, rows=None, cka_reference="adapters_off")
    probe = [{k: v for k, v in one.items() if k != "labels"}]
    with Monitor(model, config, probe=probe) as monitor:
        for _ in range(3):
            model(**one).loss.backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.timeline.layers == [f"model.layers.{i}" for i in range(3)]
    moved = monitor.timeline.delta_cka
    assert abs(moved[0]).max() < 2e-6 and abs(moved[2][0]) < 2e-6 and moved[2][1] > 1e-7
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert adapted(again) == {1: TARGETS["llama"]}
    with torch.no_grad():
        assert torch.allclose(again.eval()(**one).logits, model.eval()(**one).logits, atol=1e-6)
    assert BLOCKS["llama"] in find_blocks(again)[0].name
