"""Tiny models whose weights or adapters move between probes."""

import pytest
import torch

from helpers.tiny_models import bert, sharpened
from inflection_fast.measure import Monitor, MonitorConfig

CKA = MonitorConfig(every=1, signals=("delta_cka",), cka_debiased=False, probe_share=None)


def moved(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def measured_after_moving(model, probe, config=CKA):
    with Monitor(model, config, probe=probe) as monitor:
        model(**probe[0]).loss.backward()
        monitor.step()
        moved(model)
        model(**probe[0]).loss.backward()
        monitor.step()
    return monitor.timeline.delta_cka


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(sharpened(bert()), peft.LoraConfig(target_modules=["query", "value"], r=2)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            if "layer.2" in name:
                parameter.requires_grad_(False)  # frozen by the user, which peft would undo
    return model
