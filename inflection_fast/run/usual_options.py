"""The options that most runs set, on one screen; `--help all` lists every one."""

from __future__ import annotations

import textwrap
import typing
from typing import Any

__all__ = ["usual_options"]

USUAL = (
    "config",
    "output",
    "task",
    "model.path",
    "model.max_length",
    "target.path",
    "target.text",
    "target.label",
    "target.labels",
    "target.test",
    "target.group",
    "measure.unfreeze",
    "measure.train.steps",
    "measure.monitor.every",
    "select.method",
    "select.k",
    "tune.lora.r",
    "tune.lora.target_modules",
    "tune.train.steps",
    "tune.train.learning_rate",
    "tune.when_empty",
    "baselines",
    "seed",
)
SENTENCES = {  # of options whose own class documents them beside the field
    "measure.monitor.every": "measure every so many optimizer steps",
    "select.method": "how layers are chosen from what was measured",
    "select.k": "so many layers are chosen, where the method needs a number",
}
WIDTH = 100
NAMES = 31


def usual_options(parser: Any, command: str, what: str) -> str:
    """Usage, the usual options with their choices, a sentence and the default, and where the others are."""
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
        f"inflection-fast {command} --help all lists every setting, inflection-fast init writes a first FILE.",
    ]
    return "\n".join(lines)


def _choices(kind: Any) -> str:
    """The values of a Literal, also of one that may be null."""
    for one in (kind, *typing.get_args(kind)):
        if typing.get_origin(one) is typing.Literal:
            return " | ".join(map(str, typing.get_args(one)))
    return ""


def _written(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
