"""Measures tiny models of the types of Transformers and compares their entropies with those of eager attention.

python -m model_types.sweep [--out docs/models.md] [--keep FILE] [--minutes N] [TYPE ...]   (with tests/ on the path)
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import math
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig

from .injection import injection
from .recipes import IN_SINGLE, INERT
from .tiny import NotBuilt, model_and_batch, model_of
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
    adapted: str = ""  # what `inject` did by default: rule and number of modules, or why not
    trains: list[int] = field(default_factory=list)  # blocks that a gradient reaches
    seconds: float = 0.0

    def line(self) -> str:
        """A row of the table."""
        stacks = ", ".join(f"{name} {count}" for name, count in self.stacks.items())
        error = "" if math.isnan(self.error) else f"{self.error:.0e}"
        cells = (self.model_type, self.status, stacks, self.compared or "", error, self.adapted, self.note)
        return f"| {' | '.join(map(str, cells))} |"


def check(model_type: str, adapt: bool = False) -> Result:
    """Build, measure and compare one type; `adapt`: then inject adapters and train a step."""
    try:
        model, batch = model_and_batch(model_type)
    except NotBuilt as error:
        return Result(model_type, "not built", note=str(error))
    result = compare(model_type, model, batch)
    if adapt:
        try:
            why = INERT.get(model_type)
            result.adapted = str(injection(model, batch, result.trains)).replace("|", "/")
            result.adapted += f" ({why})" if why and result.adapted.startswith("dead") else ""
        except Exception as error:
            result.adapted = "crash: " + _sentence(error)
    return result


def compare(model_type: str, model, batch: dict) -> Result:
    """Measure a model and compare it with its own eager attention."""
    try:
        timeline, blocks = measured(model, batch)
    except (ValueError, TypeError, RuntimeError) as error:
        return Result(model_type, "refused", note=_sentence(error))
    result = Result(model_type, "right", dict(Counter(block.stack for block in blocks)))
    result.trains = [int(layer) for layer in np.flatnonzero(timeline.activation_grad[0] > 0)]
    eager, note = reference(model_type, model, batch)
    try:
        truth, result.confirmed, runs, _ = truth_of(eager, batch, find_blocks)
        single = model_type in IN_SINGLE or any(value.isnan().any() for value in truth.values())
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
    config = copy.deepcopy(model.config)  # which holds the implementation
    eager = model_of(model_type, config, implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = zip(_tensors(eager(**batch)), _tensors(model(**batch)), strict=False)
    if any(theirs.isnan().any() and not ours.isnan().any() for theirs, ours in outputs if theirs.numel()):
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
    parser.add_argument("types", nargs="*", help="none: all")
    parser.add_argument("--out", help="page to be written")
    parser.add_argument("--keep", type=Path, help="results of earlier sweeps, not repeated unless named; JSON lines")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further type after so long")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results = _kept(options.keep)
    begin = time.monotonic()
    for model_type in options.types or [one for one in sorted(MODEL_MAPPING_NAMES) if one not in results]:
        if time.monotonic() - begin > 60 * options.minutes:
            break
        started = time.monotonic()
        try:
            with at_most(SECONDS):
                result = check(model_type, adapt=True)
        except Exception as error:
            result = Result(model_type, "wrong", note="crash: " + _sentence(error))
        result.seconds = round(time.monotonic() - started, 1)
        results[model_type] = result
        if options.types or result.status != "right":
            print(result.line(), file=sys.stderr, flush=True)
        if options.keep:
            with options.keep.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    print(Counter(result.status for result in results.values()), file=sys.stderr)
    if options.out:
        from .page import write

        write(options.out, [results[name] for name in sorted(results)])
    sys.exit(any(result.status == "wrong" for result in results.values()))


def _kept(path: Path | None) -> dict[str, Result]:
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    return {result.model_type: result for result in found}  # the last of each


if __name__ == "__main__":
    main()
