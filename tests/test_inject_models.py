"""Injection by default into many types of models, trained one step: inside the planned blocks, and alive.

`PYTHONPATH=. python tests/test_inject_models.py [TYPE ...]` tries all types and prints what becomes of each.
"""

import logging
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import one_thread  # noqa: F401
from model_types.sweep import at_most
from model_types.tiny import batch_of, config_of, model_of
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from inflection_fast import Plan, dead_adapters, find_blocks, inject

# Every rule, fused projections, Conv1D, experts, shared and hand-written attention, encoders with decoders, images and
# sounds, text beside images, blocks without attention.
TYPES = [
    "albert", "apertus", "bart", "beit", "bert", "bloom", "clip", "cohere", "ctrl", "deberta", "deberta-v2", "deit",
    "distilbert", "electra", "ernie4_5", "falcon", "gemma2", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "granite", "helium", "hubert", "llama", "mamba", "mistral", "mixtral", "modernbert", "mpnet", "olmo2", "opt", "phi",
    "phimoe", "qwen2", "qwen3", "qwen3_moe", "roberta", "siglip", "starcoder2", "t5", "vit", "wavlm", "xlm-roberta",
]  # fmt: skip


class NoModel(Exception):
    """The type cannot be built or run by the rules for tiny models."""


def model_and_batch(kind: str) -> tuple[nn.Module, dict]:
    try:
        model = model_of(kind, config_of(kind))
        batch = batch_of(kind, model)
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        raise NoModel(f"{type(error).__name__}: {str(error)[:100]}") from error
    return model, batch  # in evaluation mode: some types mask at random in training


def plan_of_every_other(model: nn.Module, kind: str) -> Plan:
    blocks = find_blocks(model)
    layers = tuple(range(0, len(blocks), 2))
    names = [block.name for block in blocks]
    made_for = {"model_type": model.config.model_type, "class": kind, "named": False, "layers": names}
    return Plan(layers, "", {i: "because" for i in layers}, np.zeros(len(blocks)), {}, {}, made_for)


def differentiable(output) -> torch.Tensor:
    tensors, queue = [], [output]
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Tensor) and value.requires_grad:
            tensors.append(value.float())
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
    generator = torch.Generator().manual_seed(1)
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)


def injected(kind: str) -> tuple[list[str], list[str], set[str]]:
    """(adapters outside of the planned blocks, dead adapters of blocks that ran, rules), after a step of training."""
    model, batch = model_and_batch(kind)
    plan = plan_of_every_other(model, kind)
    paths = [find_blocks(model)[layer].path for layer in plan.layers]
    ran: set[str] = set()
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.add(path))
    adapted = inject(model, plan)
    trained = [name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    outside = [n for n in trained if not any(n.startswith(f"{path}.") for path in paths)]
    differentiable(adapted(**batch)).backward()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    dead = [name.removeprefix("base_model.model.") for name in dead_adapters(adapted)]
    optimizer.step()
    dead = [name for name in dead if any(name.startswith(f"{path}.") for path in ran)]
    return outside, dead, set(adapted.inflection_plans["default"].actions[0]["rules"].values())


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_are_inside_the_planned_blocks_and_alive(kind):
    outside, dead, _ = injected(kind)
    assert outside == [] and dead == []


def main(kinds: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    counts: Counter = Counter()
    for kind in kinds or sorted(MODEL_MAPPING_NAMES):
        try:
            with at_most(60):
                outside, dead, rules = injected(kind)
            status = "outside" if outside else "dead" if dead else "right"
            words = f"{sorted(rules)} {(outside + dead)[:3]}"
        except NoModel as error:
            status, words = "not built", str(error)
        except Exception as error:
            status, words = "refused", f"{type(error).__name__}: {str(error)[:200]}"
        counts[status] += 1
        print(f"{kind}: {status} {words}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
