"""`inflection-fast overhead MODEL`: the cost of measuring on the user's model and machine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inflection_fast.atomic import write_json
from inflection_fast.blocks import find_blocks
from inflection_fast.measure import MonitorConfig
from inflection_fast.measure.cost import AGAIN, UNMONITORED, Cost, Steps, costs, extra_bytes, race
from inflection_fast.run.config import ModelConfig
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.machine import processor_name

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PRESETS", "Race", "command", "run"]

TASKS = ("causal-lm", "sequence-classification")
DEFAULT = ("attention", "activation_grad", "parameter_grad")  # the default quantities that need no probe
MEASURED, IDLE = "every step", "attached, never measured"


# Model class, configuration class and its settings, by name.
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minilm": (
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "gpt2-small": ("GPT2LMHeadModel", "GPT2Config", {"use_cache": False}),
    "llama-1b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192, "vocab_size": 32000, "use_cache": False,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Race:
    """One table: arms that ran interleaved."""

    title: str
    costs: tuple[Cost, ...]
    extra_kib: float | None  # peak memory of a measured step minus that of an unmonitored one; None: not on a GPU

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Arm, time, percent added to a step, percent added if one step in ten is measured."""
        added = {cost.label: cost.added for cost in self.costs}
        # Only what is compiled into a model stays attached between measured steps.
        idle = added.get(IDLE, 0.0) if "compiled" in self.title else 0.0
        found = []
        for cost in self.costs:
            percent = "" if cost.label == UNMONITORED else f"{100 * cost.added:+.2f} +- {100 * cost.error:.2f} %"
            one_in_ten = f"{100 * (cost.added + 9 * idle) / 10:+.2f} %"
            plain = cost.label in (UNMONITORED, AGAIN, IDLE)
            found.append((cost.label, f"{cost.ms:.1f} ms", percent, "" if plain else one_in_ten))
        return found


def command(argv: list[str], console: Console) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    for name, least in (("batch_size", 1), ("length", 2), ("rows", 2), ("train_top", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if not args.minutes > 0:
        raise UserError(f"--minutes: expected a number above 0, got {args.minutes}")
    out = Path(args.out).expanduser()
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out: expected a file in a folder that exists, got {args.out}")
    config = _config(args)
    from inflection_fast.run.quiet import quiet_libraries

    quiet_libraries()
    device = _device(args.device)
    model, batch = _model_and_batch(args, device)
    with user_errors(about=f"model {args.model}"):
        blocks = len(find_blocks(model))
    if args.train_top is not None and args.train_top > blocks:
        raise UserError(f"--train-top: expected at most {blocks}, the number of blocks, got {args.train_top}")
    races = []
    for result in run(model, batch, config, args):
        races.append(asdict(result))
        _show(result, console)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["quantities"] = list(config.names)
    write_json(out, {"settings": settings, "machine": _machine(device), "races": races})
    console.print(f"figures: {out}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inflection-fast overhead",
        description="Time training steps with and without measuring, interleaved, beside noise (the same step twice).",
    )
    parser.add_argument("model", help=f"folder of a saved model, its name on the hub, or a shape: {', '.join(PRESETS)}")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help=f"what the model is trained for ({TASKS[0]})")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a batch (8)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence (128)")
    parser.add_argument("--rows", type=int, default=64, help="query rows that are sampled per sequence (64)")
    parser.add_argument("--quantities", default=",".join(DEFAULT), help=f"what is measured ({','.join(DEFAULT)})")
    parser.add_argument("--per-quantity", action="store_true", help="also each quantity by itself")
    parser.add_argument("--train-top", type=int, help="also where only so many of the last blocks and the head train")
    parser.add_argument("--compiled", action="store_true", help="also compiled by torch.compile, which takes minutes")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to time in all, loading apart (10)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--out", default="overhead.json", help="file for the figures (overhead.json)")
    return parser


def _config(args: argparse.Namespace) -> MonitorConfig:
    names = tuple(name.strip() for name in args.quantities.split(",") if name.strip())
    with user_errors(ValueError, TypeError, about="--quantities"):
        return MonitorConfig(quantities=names, rows=args.rows, probe_share=None)


def _device(name: str | None) -> torch.device:
    with user_errors(RuntimeError, about="--device"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    return device


# ---- the model and its batch -----------------------------------------------------------------------------------------


def _model_and_batch(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    from inflection_fast.run.models import check_model, load_model, load_tokenizer, most_tokens

    torch.manual_seed(0)
    if args.model in PRESETS:
        cls, config_cls, settings = PRESETS[args.model]
        model = getattr(transformers, cls)(getattr(transformers, config_cls)(**settings))
    else:
        config = ModelConfig(args.model, max_length=2)
        check_model(config, args.task, None)
        model = load_model(config, args.task, load_tokenizer(config), labels=("0", "1"))
    longest = most_tokens(model)
    if longest is not None and args.length > longest:
        raise UserError(f"--length: {args.model} takes at most {longest} tokens, got {args.length}")
    model.config.problem_type = "single_label_classification"  # else the first forward sets it, and recompiles
    classifies = "Classification" in type(model).__name__
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.length)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, shape, generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if classifies:  # texts differ in length
        lengths = torch.randint(max(args.length // 4, 1), args.length + 1, (args.batch_size, 1), generator=generator)
        lengths[0] = args.length
        batch["attention_mask"] = (torch.arange(args.length) < lengths).long()
        batch["labels"] = torch.arange(args.batch_size) % 2
    return model.to(device).train(), {name: value.to(device) for name, value in batch.items()}


# ---- races -----------------------------------------------------------------------------------------------------------


def run(
    model: nn.Module, batch: dict[str, torch.Tensor], config: MonitorConfig, args: argparse.Namespace
) -> Iterator[Race]:
    """The results of the races that `args` asks for, one by one."""
    kinds = [_as_written]
    kinds += [_by_quantity] if args.per_quantity else []
    kinds += [_shallow] if args.train_top else []
    kinds += [_compiled] if args.compiled else []
    seconds = 60 * args.minutes / len(kinds)
    for arms_of in kinds:
        fresh = copy.deepcopy(model) if arms_of in (_shallow, _compiled) else model
        with user_errors(ValueError, RuntimeError, about=f"model {args.model}"), ExitStack() as stack:
            title, arms = arms_of(Steps(fresh, batch), config, args, stack)
            yield _raced(title, arms, batch["input_ids"].device, seconds)


def _raced(title: str, arms: dict[str, Callable[[], None]], device: torch.device, seconds: float) -> Race:
    plain = arms[UNMONITORED]
    times = race({UNMONITORED: plain, AGAIN: plain} | arms, seconds=seconds)
    alone = extra_bytes(plain, device)
    measured = extra_bytes(arms[MEASURED], device) if MEASURED in arms else None
    extra = None if alone is None or measured is None else (measured - alone) / 1024
    return Race(title, tuple(costs(times)), extra)


Arms = tuple[str, dict[str, Callable[[], None]]]


def _as_written(steps: Steps, config: MonitorConfig, args: argparse.Namespace, stack: ExitStack) -> Arms:
    measured, idle = stack.enter_context(steps.watched(config))
    return "the model as it is written", {UNMONITORED: steps, MEASURED: measured, IDLE: idle}


def _by_quantity(steps: Steps, config: MonitorConfig, args: argparse.Namespace, stack: ExitStack) -> Arms:
    arms: dict[str, Callable[[], None]] = {UNMONITORED: steps}
    for name in config.names:
        alone = replace(config, quantities=(name,), every=1)
        arms[f"{name} alone"], _ = stack.enter_context(steps.watched(alone))
    return "each quantity by itself, every step", arms


def _shallow(steps: Steps, config: MonitorConfig, args: argparse.Namespace, stack: ExitStack) -> Arms:
    from inflection_fast.act.unfreeze import unfreeze_top

    unfreeze_top(steps.model, find_blocks(steps.model), args.train_top)
    measured, _ = stack.enter_context(steps.watched(config))
    exact, _ = stack.enter_context(steps.watched(replace(config, frozen_share=1.0)))
    title = f"the last {args.train_top} blocks train, frozen_share={config.frozen_share:g}"
    return title, {UNMONITORED: steps, MEASURED: measured, f"{MEASURED}, frozen_share=1.0": exact}


def _compiled(steps: Steps, config: MonitorConfig, args: argparse.Namespace, stack: ExitStack) -> Arms:
    tapped = _compiled_steps(copy.deepcopy(steps.model), steps.batch)
    measured, idle = stack.enter_context(tapped.watched(config))
    plain = _compiled_steps(steps.model, steps.batch)
    return "compiled, measured in the graph", {UNMONITORED: plain, MEASURED: measured, IDLE: idle}


def _compiled_steps(model: nn.Module, batch: dict[str, object]) -> Steps:
    compiled = torch.compile(model, dynamic=False)
    assert isinstance(compiled, nn.Module), "torch.compile returns a module for a module"
    return Steps(compiled, batch)


# ---- output -------------------------------------------------------------------------------------------------


def _show(race: Race, console: Console) -> None:
    rounds = race.costs[0].rounds
    console.print(f"\n{race.title} ({rounds} rounds)", markup=False)
    head = ("step", "median", "added to a step", "one step in ten")
    rows = [head, *race.rows()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        line = "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        console.print(f"  {line.rstrip()}", markup=False)
    if race.extra_kib is not None:
        console.print(f"  a measured step holds {race.extra_kib:.0f} KiB more at its peak", markup=False)


def _machine(device: torch.device) -> dict[str, Any]:
    from inflection_fast import build_info

    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "instructions": build_info()["cpu"]["isa"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
