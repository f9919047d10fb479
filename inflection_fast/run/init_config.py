"""A first settings file: fifteen lines with comments that fit the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from inflection_fast.atomic import write_text
from inflection_fast.run.config import DataConfig
from inflection_fast.run.data import TextData, read
from inflection_fast.run.errors import UserError
from inflection_fast.run.files import column_names, load_rows

__all__ = ["write_init_config"]

LENGTH = 128  # tokens
SAMPLE = 1000  # rows read to find the columns of text and label


def write_init_config(
    path: Path, *, model: str, data: str, task: str, text: str | None = None, label: str | None = None
) -> TextData:
    """Write the settings of a first run to `path`, and return the data set as the run will read it.

    Without names, the column "text" or the one with the longest values is the text, and the column "label" or the one
    with the fewest different values is the label. UserError if `path` exists, or the data cannot be read.
    """
    if path.exists():
        raise UserError(f"{path} exists already: name another file with --out")
    config = DataConfig(data)
    names = column_names(config)
    if task == "causal-lm" and text is None and "messages" in names and _conversations(config):
        config = replace(config, messages="messages")
    else:
        text, label = _columns(config, names, task, text, label)
        config = replace(config, text=text, label=label or config.label)
    found = read(config, task)
    write_text(path, _written(model, config, task, names, found))
    return found


def _conversations(config: DataConfig) -> bool:
    return any(isinstance(value, list) for value in load_rows(config, ["messages"]).columns["messages"][:SAMPLE])


def _columns(
    config: DataConfig, names: list[str], task: str, text: str | None, label: str | None
) -> tuple[str, str | None]:
    columns = {name: [str(value) for value in load_rows(config, [name]).columns[name][:SAMPLE]] for name in names}
    length = {name: sum(map(len, values)) / max(len(values), 1) for name, values in columns.items()}
    if text is None:
        text = "text" if "text" in names else max(length, key=length.__getitem__)
    if task == "causal-lm":
        return text, None
    if label is None:
        others = [name for name in names if name != text]
        if not others:
            raise UserError(f"{config.path}: it has one column, {text!r}, and no labels: use --task causal-lm")
        distinct = {name: len(set(columns[name])) for name in others if len(set(columns[name])) > 1}
        label = "label" if "label" in others else min(distinct or others, key=lambda name: distinct.get(name, 0))
    return text, label


def _length(model: str) -> int:
    """The length of texts: 128 tokens, or the limit of a model in a local folder if that is less."""
    try:
        longest = json.loads((Path(model) / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):  # a model of the hub, or no limit known: the run checks it
        return LENGTH
    return min(LENGTH, longest) if isinstance(longest, int) and longest > 0 else LENGTH


def _written(model: str, config: DataConfig, task: str, names: list[str], found: TextData) -> str:
    import yaml

    def value(text: str) -> str:
        return yaml.safe_dump(text, allow_unicode=True, width=10**6).splitlines()[0]

    columns = f"column of the text; the data has: {', '.join(names)}"
    lines = [
        ("output: runs/first", "all files of the run; the same command continues an interrupted run"),
        (f"task: {task}", "sequence-classification or causal-lm"),
        ("model:", ""),
        (f"  path: {value(model)}", "folder of a saved model, or its name on the hub"),
        (f"  max_length: {_length(model)}", "texts are cut to this number of tokens"),
        (
            "target:",
            f"{len(found.train)} texts to train on, {len(found.test)} to test on, {len(found.probe)} to compare",
        ),
        (f"  path: {value(config.path)}", ""),
        (f"  text: {value(config.text)}", columns)
        if config.messages is None
        else (f"  messages: {value(config.messages)}", "column of conversations, lists of {role, content}"),
    ]
    if found.labels:
        shown = ", ".join(found.labels[:8]) + (", ..." if len(found.labels) > 8 else "")
        lines.append((f"  label: {value(config.label)}", f"column of the label: {shown}"))
    lines += [
        ("measure:", "a short training that is measured: the top blocks and the head learn, the rest is frozen"),
        ("  unfreeze: 2", "number of blocks at the top"),
        ("  train: {steps: 100}", "optimizer steps"),
        ("tune:", "LoRA in the layers chosen from the measurement"),
        ("  lora: {r: 4}", "rank"),
        ("  train: {steps: 100, learning_rate: 5.0e-4}", "the baselines train in the same way"),
        ("baselines: [last, random]", "equally many other layers to compare with; also first, all"),
    ]
    width = max(len(setting) for setting, comment in lines if comment and len(setting) < 50)
    return "".join(f"{setting:{width}}  # {comment}\n" if comment else f"{setting}\n" for setting, comment in lines)
