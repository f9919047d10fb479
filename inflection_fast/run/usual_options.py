"""The options that most runs set, for a short `--help`; `--help all` lists every option."""

from __future__ import annotations

import textwrap
import typing
from typing import Any

__all__ = ["usual_options"]

USUAL = (
    "config", "output", "task", "model.path", "model.max_length", "target.path", "target.text", "target.label",
    "target.labels", "target.test", "target.group", "measure.unfreeze", "measure.train.steps", "measure.monitor.every",
    "select.method", "select.k", "tune.lora.r", "tune.lora.target_modules", "tune.train.steps",
    "tune.train.learning_rate", "tune.when_empty", "baselines", "seed",
)  # fmt: skip
SENTENCES = {  # of options that their class documents in comments
    "measure.monitor.every": "optimizer steps between measured steps",
    "select.method": "how layers are chosen from what was measured",
    "select.k": "number of layers, for methods that need it",
}
WIDTH = 100
NAMES = 31


def usual_options(parser: Any, command: str, what: str) -> str:
    """The help text: usage, the usual options with choices and defaults, and how to list all options."""
    actions = {action.dest: action for action in parser._actions}
    lines = [f"usage: inflection-fast {command} --config FILE [--SETTING VALUE ...]", "", f"{what.capitalize()}.", ""]
    for name in USUAL:
        action = actions[name]
        text = " ".join((SENTENCES.get(name) or action.help or "").split())
        facts = [_choices(getattr(action, "_typehint", None))]
        if isinstance(action.default, (str, int, float, tuple)):
            facts.append(f"default {_written(action.default)}")
        facts = [fact for fact in facts if fact]
        text += f" ({'; '.join(facts)})" if facts else ""
        wrapped = textwrap.wrap(text, WIDTH - NAMES)
        lines += [f"  --{name:{NAMES - 4}}{wrapped[0]}", *(f"{'':{NAMES}}{line}" for line in wrapped[1:])]
    lines += [
        "",
        f"inflection-fast {command} --help all lists every setting; inflection-fast init writes a first FILE.",
    ]
    return "\n".join(lines)


def _choices(kind: Any) -> str:
    """The values of a Literal, or of a Literal that may be null."""
    for one in (kind, *typing.get_args(kind)):
        if typing.get_origin(one) is typing.Literal:
            return " | ".join(map(str, typing.get_args(one)))
    return ""


def _written(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
