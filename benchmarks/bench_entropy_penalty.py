"""What a penalty on attention entropy costs a training step, on two blocks and on all, by its number of query rows."""

from contextlib import ExitStack

from bench_overhead import added, minilm
from cases import race

from inflection_fast.act import attention_entropy_loss

# Blocks, query rows per sequence (None: all).
CASES = {"2 blocks, 64 rows": ([0, 1], 64), "all blocks, 64 rows": (None, 64), "all blocks, 16 rows": (None, 16)}


def bench_entropy_penalty(benchmark):
    plain = minilm()
    rivals = {"without": plain.unmonitored, "without, again": plain.unmonitored}
    with ExitStack() as applied:
        for label, (layers, rows) in CASES.items():
            training = minilm()
            # Above what any row has, so that every head is penalised and has a gradient.
            loss = attention_entropy_loss(training.model, 9.0, layers, rows=rows, weight=1e-9, add_to_loss=True)
            applied.enter_context(loss)
            rivals[label] = training.unmonitored

        def percent(median):
            names = [*CASES, "without, again"]
            return {f"% {name}": added(median | {"unmonitored": median["without"]}, name) for name in names}

        race(benchmark, "entropy penalty in a training step of MiniLM", rivals, extra=percent, rounds=10)
