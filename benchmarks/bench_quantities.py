"""What each quantity costs a training step, alone, beyond what two runs of the same step differ by.

All quantities of a shape are measured in one race, beside the same unmonitored steps. Probes have the texts of the
batch and run in every measured step; what quantities leave to a thread of their own is waited for and counts in full.

    python -m pytest benchmarks/bench_quantities.py && python benchmarks/table.py

takes about six minutes on two quiet cores and writes the table of docs/quantities.md.
"""

from contextlib import ExitStack

import pytest
import torch
from bench_overhead import Training, _config, added, measuring, minilm
from cases import race

from inflection_fast import Monitor
from inflection_fast.quantities import QUANTITIES

LINE = "quantities on a training step of "  # how the names of these cases begin
EVERY = (1, 10)


def gpt2_small():
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 50257, (2, 128))
    return Training(transformers.GPT2LMHeadModel(transformers.GPT2Config()), {"input_ids": ids, "labels": ids})


def minilm_with_adapters():
    peft = pytest.importorskip("peft")
    training = minilm()
    model = peft.get_peft_model(training.model, peft.LoraConfig(r=8, target_modules=["query", "value"]))
    return Training(model, training.batch)


def mixture():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=6, num_local_experts=8, vocab_size=8000)
    ids = torch.randint(0, 8000, (4, 64))
    return Training(transformers.MixtralForCausalLM(config), {"input_ids": ids, "labels": ids})


OF_THEIR_OWN = {"adapter": "MiniLM with LoRA of rank 8", "router": "a mixture of 8 experts"}
EVERYWHERE = [name for name in QUANTITIES if name not in OF_THEIR_OWN]
SHAPES = {  # how to train, rounds, quantities
    "MiniLM, 8 x 64 tokens": (minilm, 20, EVERYWHERE),
    "GPT-2 small, 2 x 128 tokens": (gpt2_small, 3, EVERYWHERE),
    OF_THEIR_OWN["adapter"]: (minilm_with_adapters, 20, ["adapter"]),
    OF_THEIR_OWN["router"]: (mixture, 20, ["router"]),
}


def in_full(monitor: Monitor, measured):
    """A measured step and all that it leaves to another thread."""

    def step():
        measured()
        monitor._background._todo.join()

    return step


@pytest.mark.parametrize("shape", SHAPES)
def bench_quantities(benchmark, shape):
    make, rounds, names = SHAPES[shape]
    training = make()

    def percent(median):
        shares = {f"{name}, % at every {n} steps": added(median, name) / n for name in names for n in EVERY}
        return shares | {"% between two unmonitored steps": abs(added(median, "unmonitored, again"))}

    with ExitStack() as stack:
        arms = {}
        for name in names:
            monitor = Monitor(training.model, _config((name,)), probe=[training.batch])
            arms[name] = in_full(monitor, stack.enter_context(measuring(training, monitor=monitor)))
        record = race(
            benchmark,
            LINE + shape,
            {"unmonitored": training.unmonitored, "unmonitored, again": training.unmonitored, **arms},
            extra=percent,
            rounds=rounds,
            warmup=1,
        )
    for label, value in record["extra"].items():
        print(f"{shape}: {label.replace('%', f'{value:+.2f} %')}")
