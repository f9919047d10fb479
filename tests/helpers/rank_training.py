"""Training of tiny models on a whole batch or on one rank's part of it, measured, and its timeline as JSON."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
from torch import distributed as dist

from helpers.packets import ALL
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS

BATCH, LENGTH, STEPS = 4, 12, 4
# Without `probe_share` no probe is left out on a busy machine.
CONFIG = MonitorConfig(every=2, rows=None, signals=ALL, cka_se=True, probe_share=None)
SAMPLED = MonitorConfig(every=2, rows=4, signals=ALL, cka_se=True, probe_share=None)
OF_PARAMETERS = MonitorConfig(every=1, quantities=("adapter", "update", "gradient_noise"))
ONLY_NOISE = MonitorConfig(every=1, quantities=("gradient_noise",))
OF_ADAPTERS = ("adapter_norm", "adapter_rank", "adapter_gradient", "adapter_idle", "adapter_share")
OF_UPDATES, OF_NOISE = ("weight_norm", "update_ratio"), ("gradient_signal", "gradient_variance", "noise_scale")
SIGNALS = (*HEAD_SIGNALS, *LAYER_SIGNALS, "loss")


def model_of(name):
    import helpers.tiny_models as tiny

    torch.manual_seed(0)
    return tiny.sharpened(tiny.CASES[name].build().train())


def with_adapters(name):
    """The same with LoRA that has learned something already."""
    import peft

    targets = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    return peft.get_peft_model(model_of(name), peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))


def batches_of(name):
    """The whole batch of every step, and a probe."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(STEPS + 1):
        batch = {"input_ids": torch.randint(3, 40, (BATCH, LENGTH), generator=generator)}
        if name == "bert":
            batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[12], [7], [9], [10]])).long()
            batch["labels"] = torch.tensor([0, 1, 1, 0])
        else:
            batch["labels"] = batch["input_ids"]
        batches.append(batch)
    return batches[:STEPS], [batches[STEPS]]


def uneven(batches):
    """The same with labels at fewer positions of some sequences, so that shares of a batch have unequal weights."""
    for batch in batches:
        labels = batch["labels"].clone()
        labels[1, 3:] = labels[2, 8:] = -100
        batch["labels"] = labels
    return batches


def part_of(batch, rank, parts=2):
    size = BATCH // parts
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def train(model, batches, probe, config=CONFIG, *, parts_of=lambda batch: [batch], out=None, **options):
    """Train on the parts of each batch, accumulated, and give back the timeline."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Monitor(model, config, out, probe=probe, **options) as monitor:
        for batch in batches[monitor._step :]:
            parts = parts_of(batch)
            for part in parts:
                output = model(**part)
                (output["loss"] / len(parts)).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline


def update(model, batches, parts_of=lambda batch: [batch]):
    """Train as `train` does, unmeasured, to where a run is resumed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        parts = parts_of(batch)
        for part in parts:
            (model(**part)["loss"] / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def whole(name, config=CONFIG, micro_batches=1, unequal=False, model=None):
    """One process, the whole batch."""
    batches, probe = batches_of(name)
    batches = uneven(batches) if unequal else batches
    parts_of = lambda batch: [part_of(batch, part, micro_batches) for part in range(micro_batches)]  # noqa: E731
    return as_json(train(model or model_of(name), batches, probe, config, parts_of=parts_of))


def rounding_of(name, config, expected, draws=3):
    """By signal, by how much values of this training differ where weights begin one rounding of float32 apart.

    Ranks that divide a matrix product add it up in another order, and training multiplies such differences.
    """
    moved = {signal: np.zeros_like(expected[signal]) for signal in SIGNALS}
    for seed in range(draws):
        model, generator = model_of(name), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape, generator=generator))
        found = whole(name, config, model=model)
        for signal in SIGNALS:
            moved[signal] = np.fmax(moved[signal], np.abs(np.subtract(found[signal], expected[signal])))
    return moved


def as_json(timeline, names=SIGNALS):
    return {"steps": timeline.steps.tolist()} | {name: getattr(timeline, name).tolist() for name in names}


def of_parameters(model, name, parts_of):
    """Of every step, what follows from parameters and their gradients."""
    batches, _ = batches_of(name)
    timeline = train(model, batches, None, OF_PARAMETERS, parts_of=parts_of)
    return as_json(timeline, (*OF_ADAPTERS, *OF_UPDATES, *OF_NOISE))


def mine(batch):
    return [part_of(batch, dist.get_rank())]


@contextlib.contextmanager
def warnings_of_monitors():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("inflection_fast").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("inflection_fast").removeHandler(handler)
