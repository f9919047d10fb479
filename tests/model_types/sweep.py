"""Measures tiny models of the types of Transformers and compares their entropies with those of eager attention.

python -m model_types.sweep [--out docs/models.md] [TYPE ...]      (with tests/ on the path)
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import signal
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig

from .tiny import batch_of, config_of, model_of
from .truth import truth_of

TOLERANCE = 1e-4  # nats, of float32 activations against float64
TOLERANCE_SINGLE = 1e-3  # where the truth itself runs in float32 (experts, masks that overflow)
SECONDS = 60  # for one type

QUANTITIES = ("attention", "cross_attention", "activation_grad", "parameter_grad")
CONFIG = MonitorConfig(every=1, rows=None, quantities=QUANTITIES)


@dataclass
class Result:
    """What became of one type."""

    model_type: str
    status: str  # "right", "wrong", "no attention", "refused", "not built"
    stacks: dict[str, int] = field(default_factory=dict)
    compared: int = 0  # layers and kinds of attention
    error: float = math.nan  # largest difference, nats
    confirmed: bool = False  # the weights that attention returns agree with the truth
    note: str = ""

    def line(self) -> str:
        """A row of the table."""
        stacks = ", ".join(f"{name} {count}" for name, count in self.stacks.items())
        error = "" if math.isnan(self.error) else f"{self.error:.0e}"
        return f"| {self.model_type} | {self.status} | {stacks} | {self.compared or ''} | {error} | {self.note} |"


def check(model_type: str) -> Result:
    """Build, measure and compare one type."""
    try:
        model = model_of(model_type, config_of(model_type))
        batch = batch_of(model_type, model)
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        return Result(model_type, "not built", note=_sentence(error))
    return compare(model_type, model, batch)


def compare(model_type: str, model, batch: dict) -> Result:
    """Measure a model and compare it with its own eager attention."""
    try:
        timeline, blocks = measured(model, batch)
    except (ValueError, TypeError, RuntimeError) as error:
        return Result(model_type, "refused", note=_sentence(error))
    result = Result(model_type, "right", dict(Counter(block.stack for block in blocks)))
    eager, note = reference(model_type, model, batch)
    try:
        truth, result.confirmed, runs, _ = truth_of(eager, batch, find_blocks)
        single = any(value.isnan().any() for value in truth.values())
    except RuntimeError:
        single = True
    if single:
        truth, result.confirmed, runs, _ = truth_of(eager, batch, find_blocks, double=False)
    wrong, errors = [], [0.0]
    for name, column in (("self", timeline.entropy), ("cross", timeline.cross_entropy)):
        for layer, block in enumerate(timeline.layers):
            base, _, run = block.partition("@")
            expected = truth.get((base, int(run or 0), name))
            actual = torch.from_numpy(column[0, layer])
            if expected is None:
                if not actual.isnan().all():
                    wrong.append(f"{block} has {name} entropy where none is expected")
                continue
            result.compared += 1
            if not actual[len(expected) :].isnan().all() or actual[: len(expected)].isnan().any():
                wrong.append(f"{block}: {name} entropy is {actual.tolist()}")
                continue
            errors.append(float((actual[: len(expected)] - expected).abs().max()))
            if not errors[-1] < (TOLERANCE_SINGLE if single else TOLERANCE):
                wrong.append(f"{block}: {name} entropy off by {errors[-1]:.2g}")
    result.error = max(errors) if result.compared else math.nan
    result.status = "wrong" if wrong else "right" if result.compared else "no attention"
    result.note = "; ".join(wrong[:2]) or note
    order = list(dict.fromkeys(runs))
    if sorted(order, key=[block.path for block in blocks].index) != order and not result.note:
        result.note = "stacks take turns"
    return result


def reference(model_type: str, model, batch: dict):
    """The model with eager attention, or with SDPA where eager gives nothing but NaN; and a note about that."""
    eager = model_of(model_type, model.config, implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = list(_tensors(eager(**batch)))
    if any(tensor.isnan().all() for tensor in outputs if tensor.is_floating_point() and tensor.numel()):
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sdpa")
        return twin, "its eager attention gives NaN; compared with its SDPA"
    return eager, ""


def measured(model, batch: dict):
    """The timeline of one step and the blocks."""
    torch.manual_seed(5)
    with Monitor(model, CONFIG, alerts=None) as monitor:
        blocks = monitor.blocks
        loss_of(model(**batch)).backward()
        monitor.step()
    model.zero_grad()
    return monitor.timeline, blocks


def loss_of(output):
    """A number that depends on everything that a model returns."""
    return sum(tensor.float().square().mean() for tensor in _tensors(output) if tensor.requires_grad)


def _tensors(output):
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")


@contextmanager
def at_most(seconds: int):
    """`TimeoutError` after so many seconds."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def quiet() -> None:
    """No warnings of models that nobody trains."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("inflection_fast").setLevel(logging.ERROR)


def main() -> None:
    """Sweep and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results = []
    for model_type in options.types or sorted(MODEL_MAPPING_NAMES):
        try:
            with at_most(SECONDS):
                results.append(check(model_type))
        except Exception as error:
            results.append(Result(model_type, "wrong", note="crash: " + _sentence(error)))
        if options.types or results[-1].status != "right":
            print(results[-1].line(), file=sys.stderr, flush=True)
    print(Counter(result.status for result in results), file=sys.stderr)
    if options.out:
        from .page import write

        write(options.out, results)
    sys.exit(any(result.status == "wrong" for result in results))


if __name__ == "__main__":
    main()
