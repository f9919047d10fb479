"""Plugins of tools that do not install beside this package: on stand-ins of what they are built on."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from helpers import tiny_models, trainers
from helpers.tiny_models import one_thread  # noqa: F401

import inflection_fast.integrations
from inflection_fast import MonitorConfig, Plan
from inflection_fast.integrations import InflectionCallback

HERE = Path(inflection_fast.integrations.__file__).parent


def stand_in(monkeypatch, name, **contents):
    """A module of that name with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_composer_measures_batches_and_logs(monkeypatch, tmp_path, precision):
    stand_in(monkeypatch, "composer.core", Callback=object)
    # As llm-foundry makes it: by the name of an entry point, with what the YAML says.
    project = (HERE.parents[1] / "pyproject.toml").read_text()
    module, name = re.search(r'llmfoundry_callbacks\]\ninflection = "(.*):(.*)"', project).groups()
    settings = yaml.safe_load((HERE.parents[1] / "examples" / "llm_foundry.yaml").read_text())["callbacks"]
    made = getattr(load(HERE / f"{module.rsplit('.')[-1]}.py"), name)
    assert made(**settings["inflection"]).config == MonitorConfig(every=settings["inflection"]["config"]["every"])
    callback = made({"every": 2}, tmp_path / "out", keys=("loss",))
    model, batch = tiny_models.model_and_batch("bert")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # there is one always
    model(**batch).loss.backward()
    norm = float(sum(p.grad.square().sum() for p in model.bert.encoder.layer[1].parameters()) ** 0.5)
    rows = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))
    state = SimpleNamespace(model=model, scaler=scaler, precision=precision)
    callback.fit_start(state, logger)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model.zero_grad()
        loss = model(**batch).loss
        (scaler.scale(loss) if precision == "amp_fp16" else loss).backward()
        if precision == "amp_fp16":
            scaler.unscale_(optimizer)
        callback.after_train_batch(state, logger)
        if precision == "amp_fp16":
            scaler.step(optimizer), scaler.update()
    callback.fit_end(state, logger)
    callback.close(state, logger)
    timeline = callback.monitor.timeline
    assert timeline.steps.tolist() == [0, 2] and [step for step, _ in rows] == [0, 2]
    assert rows[0][1]["inflection/loss"] == pytest.approx(loss.item())
    assert timeline.parameter_grad[0, 1] == pytest.approx(norm, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_plugin_of_ms_swift_registers_the_callback(monkeypatch):
    known = stand_in(monkeypatch, "swift.callbacks", callbacks_map={}).callbacks_map
    load(HERE / "plugins" / "inflection_swift.py")
    assert isinstance(known["inflection"](None, None), InflectionCallback)
    # ms-swift puts this folder on the path.
    others = {path.stem for path in (HERE / "plugins").glob("*.py")} - {"__init__", "inflection_swift"}
    assert not others, "these would hide packages of that name"


@pytest.fixture
def axolotl(monkeypatch):
    pytest.importorskip("pydantic")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    return load(HERE / "axolotl.py")


def test_axolotl_gets_the_callback_with_its_arguments(axolotl, tmp_path):
    args = axolotl.InflectionArgs(inflection_every=7, inflection_keys=["loss"])
    (callback,) = axolotl.InflectionPlugin().add_callbacks_pre_trainer(
        SimpleNamespace(**args.model_dump(), output_dir=str(tmp_path)), None
    )
    assert callback.config.every == 7 and Path(callback.out) == tmp_path / "inflection"
    assert axolotl.InflectionPlugin().get_input_args().endswith(".InflectionArgs")


def test_axolotl_puts_lora_on_the_modules_of_a_plan(axolotl, tmp_path):
    model, plugin = trainers.classifier(), axolotl.InflectionPlugin()
    names = [f"bert.encoder.layer.{i}" for i in range(model.config.num_hidden_layers)]
    Plan(
        layers=(1,),
        summary="One.",
        reasons={1: "it"},
        scores=[0.0] * len(names),
        profile={},
        config={},
        model={"model_type": "bert", "layers": names},
    ).save(tmp_path / "plan.json")
    raw = {"inflection_plan": str(tmp_path / "plan.json"), "adapter": "lora"}
    plugin.register(raw)
    settings = SimpleNamespace(**raw, lora_r=8, lora_target_modules=None)
    plugin.pre_lora_load(settings, model)
    assert settings.lora_target_modules and settings.lora_target_linear is None
    assert all(name.startswith("bert.encoder.layer.1.") for name in settings.lora_target_modules)
    with pytest.raises(ValueError, match="remove one"):
        plugin.register({**raw, "lora_target_modules": ["q_proj"]})


def test_llama_factory_takes_the_callback(tmp_path):
    from helpers import llama_factory

    callback = InflectionCallback(MonitorConfig(every=2), tmp_path / "out")
    llama_factory.run_exp(trainers.arguments(tmp_path / "run", max_steps=3).to_dict(), callbacks=[callback])
    assert callback.timeline.steps.tolist() == [0, 2]
