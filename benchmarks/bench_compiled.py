"""What the monitor costs a step of a compiled model, measured in its graph, or on steps that run as written."""

import copy
from contextlib import ExitStack

import pytest
import torch
from bench_overhead import SIGNALS, Training, added, measuring, minilm
from cases import extra_bytes, race

ROUNDS = {"MiniLM": 20, "a GPT-2 shape": 8}


def gpt2():
    """The blocks of GPT-2 small, of which six, on one sequence: a step of a second, so that there are rounds enough."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=6, use_cache=False)
    ids = torch.randint(0, config.vocab_size, (1, 256))
    return Training(transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids})


SHAPES = {"MiniLM": minilm, "a GPT-2 shape": gpt2}


def compiled(training):
    """The same training of a copy, compiled."""
    model = copy.deepcopy(training.model)
    model.config.problem_type = "single_label_classification"  # or its first forward sets it, and is compiled anew
    return Training(torch.compile(model, dynamic=False), training.batch)


@pytest.mark.parametrize("shape", SHAPES)
def bench_compiled_step(benchmark, shape):
    training = SHAPES[shape]()
    plain, tapped = compiled(training), compiled(training)
    with ExitStack() as stack:
        measured = stack.enter_context(measuring(tapped))
        as_written = stack.enter_context(measuring(plain, compiled="eager"))
        rivals = {
            "measured": measured,
            "unmonitored": plain.unmonitored,
            "unmonitored, again": plain.unmonitored,
            "tapped, not measured": tapped.unmonitored,
            "measured, compiled='eager'": as_written,
        }
        for call in rivals.values():
            call()
        kib = {label: extra_bytes(call) / 1024 for label, call in rivals.items() if label != "unmonitored, again"}

        def extra(median):
            idle = added(median, "tapped, not measured")
            return {
                "% at every 1 steps": added(median, "measured"),
                "% at every 10 steps": (added(median, "measured") + 9 * idle) / 10,
                "% tapped, not measured": idle,
                "% at every 1 steps, compiled='eager'": added(median, "measured, compiled='eager'"),
                "% of noise": added(median, "unmonitored, again"),
                "peak KiB": kib["measured"] - kib["unmonitored"],
                "peak KiB, compiled='eager'": kib["measured, compiled='eager'"] - kib["unmonitored"],
            }

        race(
            benchmark,
            f"compiled training step of {shape}, {', '.join(SIGNALS)}",
            rivals,
            goals={"unmonitored": 1 / 1.04},
            extra=extra,
            rounds=ROUNDS[shape],
        )
