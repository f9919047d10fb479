"""A smaller model of the early blocks of a model: measured, built, trained, and compared with others of that size.

Inheritune (Sanyal et al. 2024, arXiv 2404.08634) takes the early blocks of a model, whose attention is not lazy, and
trains them further. The baselines have the same size and training: as many random blocks, the last blocks, and new
weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from inflection_fast.act.inherit import grow, inherit, inherited_blocks
from inflection_fast.atomic import write_text
from inflection_fast.blocks import find_blocks
from inflection_fast.decide import Plan, SelectConfig, select
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.records import Metrics
from inflection_fast.report.verdict import SAME_LOSS
from inflection_fast.run.batches import Batches
from inflection_fast.run.chats import template_of
from inflection_fast.run.config import DataConfig, ModelConfig
from inflection_fast.run.data import read
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.evaluation import classification_metrics, described, language_metrics, token_losses
from inflection_fast.run.models import load_model, load_tokenizer
from inflection_fast.run.quiet import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ARMS", "InheritConfig", "command", "run_inherit"]

DESCRIPTION = "Build a smaller model of the early blocks, train it on, and compare it with others of that size."

ARMS = ("inherited", "random", "last", "fresh")


@dataclass(frozen=True)
class InheritConfig:
    """Which models are built, and how they are trained and compared.

    Args:
        model: the large model
        data: the data set of all models
        output: folder for the timeline, the plan, the page and the trained smaller model
        task: what the models are trained for
        blocks: number of blocks of the smaller models; null: half
        grow: steps at which the inherited model gains a block; it begins with one block less for each of them
        steps: optimizer steps of every model
        batch_size: texts per step
        learning_rate: of AdamW, after a tenth of warm-up, falling to zero
        look: number of batches that the large model is measured on
        arms: models to compare
        seed: of weights, batches and random blocks
    """

    model: ModelConfig
    data: DataConfig
    output: str
    task: str = "sequence-classification"
    blocks: int | None = None
    grow: tuple[int, ...] = ()
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 3e-4
    look: int = 4
    arms: tuple[str, ...] = ARMS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "look"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if any(not 0 < step < self.steps for step in self.grow) or list(self.grow) != sorted(set(self.grow)):
            raise ValueError(f"grow must be increasing steps between 0 and {self.steps}, got {list(self.grow)}")
        unknown = set(self.arms) - set(ARMS)
        if unknown or "inherited" not in self.arms:
            raise ValueError(f"arms must be some of {', '.join(ARMS)}, with inherited, got {', '.join(self.arms)}")


@dataclass
class _Arm:
    blocks: list[int]  # of the large model; empty: new weights
    parameters: int = 0
    begins_at: float = float("nan")  # loss on the test texts before training
    metrics: Metrics = field(default_factory=lambda: Metrics(0, float("nan")))  # after training
    train_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of training, by step


def run_inherit(config: InheritConfig, say: Callable[[str], None]) -> Path:
    """Measure, build, train and compare; return the path of the page. `UserError` if a model cannot be built."""
    folder = Path(config.output).expanduser()
    if (folder / "inherit.json").exists():
        raise UserError(f"{folder} holds a comparison already: name another folder with --out")
    tokenizer = load_tokenizer(config.model)
    render = template_of(tokenizer, config.model.path) if config.data.messages is not None else None
    data = read(config.data, config.task, render)
    torch.manual_seed(config.seed)
    model = load_model(config.model, config.task, tokenizer, labels=data.labels)
    nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    texts = Batches(tokenizer, config.task, config.model.max_length)
    items, held_out = texts.items(data.train), texts.items(data.test, by_length=True)
    rng = np.random.default_rng([config.seed, 1])
    order = [rng.choice(len(items), min(config.batch_size, len(items)), replace=False) for _ in range(config.steps)]
    first = [texts.collate([items[i] for i in rows]) for rows in order[: config.look]]

    say(f"measure: attention of {len(find_blocks(model))} blocks on {len(first)} batches")
    plan = _plan(model, first, config, folder)
    plan.save(folder / "plan.json")
    say(f"plan: {plan.summary}")
    arms = {name: _Arm(blocks) for name, blocks in _blocks_of(plan, config).items()}
    for name, arm in arms.items():
        with user_errors(about=name):
            small = _built(model, name, arm, config)
        arm.begins_at = _evaluated(small, texts, held_out, config).loss
        batches = (texts.collate([items[i] for i in rows]) for rows in order)
        small = _train(small, model, batches, config, arm, grows=name == "inherited")
        arm.parameters = sum(p.numel() for p in small.parameters())
        arm.metrics = _evaluated(small, texts, held_out, config)
        say(f"{name}: loss {arm.begins_at:.4f} -> {arm.metrics.loss:.4f}, {described(arm.metrics)}")
        if name == "inherited":
            cast("PreTrainedModel", small).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    record = {"config": asdict(config), "plan": plan.summary, "verdict": _verdict(arms)}
    record["arms"] = {name: asdict(arm) for name, arm in arms.items()}
    write_text(folder / "inherit.json", json.dumps(record, indent=2, default=str) + "\n")
    page = folder / "inherit.md"
    write_text(page, _page(plan, arms, config))
    say(_verdict(arms))
    return page


def _plan(model: nn.Module, batches: list[dict], config: InheritConfig, folder: Path) -> Plan:
    """The plan of the smaller model: the first blocks that are not lazy."""
    blocks = find_blocks(model)
    count = config.blocks or -(-len(blocks) // 2)
    if count >= len(blocks):
        raise UserError(f"--blocks is {count}, and the model has {len(blocks)}: name fewer")
    if len(config.grow) >= count:
        raise UserError(f"--grow names {len(config.grow)} steps, and the smaller model has {count} blocks: name fewer")
    device = next(model.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    model.eval()
    settings = MonitorConfig(every=1, quantities=("attention", "rank"), probe_share=None)
    with Monitor(model, settings, folder, probe=batches, alerts=None) as monitor:
        model(**batches[0]).loss.backward()
        monitor.step()
        timeline = monitor.timeline
    model.zero_grad(set_to_none=True)
    found = select(timeline, SelectConfig("lazy"))
    potent = [layer for layer in range(len(blocks)) if layer not in found.layers]
    chosen = sorted((potent + list(found.layers))[:count])
    reasons = {
        layer: f"Block {layer} is number {place + 1} of the first {count} blocks that are not lazy."
        if layer in potent
        else f"{found.reasons[layer]} It is taken because only {len(potent)} blocks are not lazy."
        for place, layer in enumerate(chosen)
    }
    summary = f"{count} of {len(blocks)} blocks: {', '.join(map(str, chosen))}. {found.summary}"
    return Plan(tuple(chosen), summary, reasons, found.scores, found.profile, found.config, found.model)


def _blocks_of(plan: Plan, config: InheritConfig) -> dict[str, list[int]]:
    count, every = len(plan.layers), len(plan.scores)
    rng = np.random.default_rng([config.seed, 2])
    drawn = list(plan.layers)
    while drawn == list(plan.layers):  # ends, because the plan has fewer than all blocks
        drawn = sorted(rng.choice(every, count, replace=False).tolist())
    chosen = {"inherited": list(plan.layers), "random": drawn, "last": list(range(every - count, every)), "fresh": []}
    return {name: chosen[name] for name in ARMS if name in config.arms}


def _built(model: nn.Module, name: str, arm: _Arm, config: InheritConfig) -> nn.Module:
    if name != "fresh":
        blocks = arm.blocks[: len(arm.blocks) - len(config.grow)] if name == "inherited" else arm.blocks
        return inherit(model, blocks)
    count = config.blocks or -(-len(find_blocks(model)) // 2)
    like = cast("PreTrainedModel", inherit(model, list(range(count))))
    torch.manual_seed(config.seed)
    fresh = like._from_config(copy.deepcopy(like.config))
    return fresh.to(next(model.parameters()).device, next(model.parameters()).dtype)


def _train(
    small: nn.Module, model: nn.Module, batches: Iterator[dict], config: InheritConfig, arm: _Arm, *, grows: bool
) -> nn.Module:
    torch.manual_seed(config.seed)
    device, warmup = next(small.parameters()).device, max(1, config.steps // 10)
    losses: list[torch.Tensor] = []
    optimizer = torch.optim.AdamW(small.parameters(), config.learning_rate)
    small.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if grows and step in config.grow:
            held = len(inherited_blocks(small))
            small = grow(small, model, blocks=arm.blocks[held : held + 1])
            optimizer = torch.optim.AdamW(small.parameters(), config.learning_rate)
        factor = min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        loss = small(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    arm.losses = torch.stack(losses).float().cpu().tolist()
    arm.train_seconds = round(time.perf_counter() - started, 3)
    return small


def _evaluated(small: nn.Module, texts: Batches, items: Any, config: InheritConfig) -> Metrics:
    small.eval()
    device, found, labels = next(small.parameters()).device, [], []
    with torch.inference_mode():
        for begin in range(0, len(items), 2 * config.batch_size):
            batch = texts.collate(items[begin : begin + 2 * config.batch_size])
            labels.append(batch.pop("labels"))
            logits = small(**{key: value.to(device) for key, value in batch.items()}).logits
            if config.task == "causal-lm":
                logits = token_losses(logits, labels[-1].to(device))
            found.append(logits.float().cpu().numpy())
    if config.task == "causal-lm":
        return language_metrics(np.concatenate(found), np.zeros(0))
    return classification_metrics(np.concatenate(found), torch.cat(labels).numpy())


def _verdict(arms: dict[str, _Arm]) -> str:
    losses = {name: arm.metrics.loss for name, arm in arms.items()}
    listed = ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
    differences = {name: loss - losses["inherited"] for name, loss in losses.items() if name != "inherited"}
    worse = [name for name, difference in differences.items() if difference >= SAME_LOSS]
    verdict = f"lower than {' and '.join(worse)}" if worse else "not lower than any"
    others = [name for name in differences if name not in worse]
    verdict += f", not lower than {' and '.join(others)}" if worse and others else ""
    return f"Loss on the test texts: {listed}. That of the inherited model is {verdict} by {SAME_LOSS:g} or more."


def _page(plan: Plan, arms: dict[str, _Arm], config: InheritConfig) -> str:
    rows = [
        f"| {name} | {', '.join(map(str, arm.blocks)) or 'none'} | {arm.parameters:,} | {arm.begins_at:.4f} | "
        f"{arm.metrics.loss:.4f} | {described(arm.metrics)} | {arm.train_seconds:.0f} |"
        for name, arm in arms.items()
    ]
    grown = f" The inherited model gained a block at each of the steps {list(config.grow)}." if config.grow else ""
    return "\n".join(
        [
            "# Smaller models of the same size",
            "",
            f"{plan.summary} Every model was trained for {config.steps} steps of {config.batch_size} texts, on the "
            f"same batches, and tested on the same texts.{grown}",
            "",
            "| model | blocks of the large one | parameters | loss before | loss after | after | seconds |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            _verdict(arms),
            "",
        ]
    )


def command(argv: list[str], console: Console) -> int:
    """Run `inflection-fast inherit` and return its exit code."""
    parser = argparse.ArgumentParser(prog="inflection-fast inherit", description=DESCRIPTION)
    parser.add_argument("model", help="folder of a saved model, or its name on the hub")
    parser.add_argument(
        "--data", required=True, help="a .csv, .tsv, .json, .jsonl, .parquet or .txt file, or a hub name"
    )
    parser.add_argument("--out", default="inherited", help="folder for the smaller model and the page (inherited)")
    tasks = ("sequence-classification", "causal-lm")
    parser.add_argument("--task", choices=tasks, default=tasks[0], help=f"what the models are trained for ({tasks[0]})")
    parser.add_argument("--text", default="text", help="column of the text (text)")
    parser.add_argument("--label", default="label", help="column of the label (label)")
    parser.add_argument("--test-limit", type=int, default=1000, help="largest number of test texts (1000)")
    parser.add_argument("--gguf-file", help="name of a GGUF file in the model's folder")
    parser.add_argument("--max-length", type=int, default=128, help="texts are cut to this number of tokens (128)")
    parser.add_argument("--blocks", type=int, help="number of blocks of the smaller model (half)")
    parser.add_argument(
        "--grow", type=int, nargs="+", default=[], help="steps at which the inherited model gains a block"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of every model (100)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts per step (16)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of AdamW (3e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and random blocks (0)")
    args = parser.parse_args(argv)
    quiet_libraries()
    with user_errors(about="settings"):
        config = InheritConfig(
            ModelConfig(args.model, gguf_file=args.gguf_file, max_length=args.max_length),
            DataConfig(args.data, text=args.text, label=args.label, test_limit=args.test_limit),
            args.out, args.task, args.blocks, tuple(args.grow), args.steps, args.batch_size,
            args.learning_rate, seed=args.seed,
        )  # fmt: skip
    page = run_inherit(config, lambda line: console.print(line, markup=False))
    console.print(f"page: {page}", markup=False)
    return 0
