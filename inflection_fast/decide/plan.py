"""The file between deciding and acting: the chosen layers, the reasons, and the model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin

import numpy as np

from ..atomic import read_json, write_text

if TYPE_CHECKING:
    import peft
    from torch import nn

__all__ = ["Plan"]

FORMAT = 2
_KIND = "inflection_fast plan"


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The chosen layers, 0-based transformer blocks in forward order, with the reasons and the profile.

    `layers` may be empty: `summary` then says why. `ValueError` if the fields contradict each other, and from `load` if
    a file is not a plan.
    """

    layers: tuple[int, ...]  # sorted
    summary: str  # one paragraph
    reasons: dict[int, str]  # for every layer of `layers` a sentence
    scores: np.ndarray  # [L] SKI, or the method's own measure; NaN where a layer has none
    profile: dict[str, list[float]]  # name -> [L], the numbers the decision was made from
    config: dict  # the SelectConfig
    # model_type, class, named (blocks given by name?), layers: the names of the L blocks; and of a model with several
    # stacks the selected one, as {"name": ..., "layers": indices of its blocks}
    model: dict
    found: dict[str, list[int]] = field(default_factory=dict)  # "entropy minimum", ... -> its blocks, if any
    ranks: dict[int, int] = field(default_factory=dict)  # layer -> rank of its adapters, if it has its own
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)  # layer -> selected heads, if not all
    actions: tuple[dict, ...] = ()  # interventions by this plan: "intervention", "words", and settings

    FILE: ClassVar[str] = "inflection_plan.json"  # its name beside an adapter or a model

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "scores", np.array(self.scores, np.float64))
        object.__setattr__(self, "actions", tuple(self.actions))
        names = self.model.get("layers")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"model: expected the names of the blocks under 'layers', got {names!r}")
        count = len(names)
        if not all(isinstance(layer, int) and 0 <= layer < count for layer in self.layers):
            raise ValueError(f"layers: expected integers from 0 to {count - 1}, got {list(self.layers)}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected sorted and distinct, got {list(self.layers)}")
        if not set(self.candidates) <= set(range(count)) or not set(self.layers) <= set(self.candidates):
            raise ValueError(f"model: layers {list(self.layers)} are not those of its stack {self.model['stack']}")
        if set(self.reasons) != set(self.layers):
            raise ValueError(f"reasons: expected one for each of {list(self.layers)}, got {sorted(self.reasons)}")
        if self.scores.shape != (count,):
            raise ValueError(f"scores: expected shape {(count,)}, got {self.scores.shape}")
        for name, blocks in self.found.items():
            if not set(blocks) <= set(self.layers):
                raise ValueError(f"found: expected blocks of {list(self.layers)} as {name}, got {list(blocks)}")
        if not set(self.ranks) <= set(self.layers) or not all(_is_integer(r) and r >= 1 for r in self.ranks.values()):
            raise ValueError(f"ranks: expected integers >= 1 for layers of {list(self.layers)}, got {self.ranks}")
        object.__setattr__(self, "heads", {layer: tuple(heads) for layer, heads in self.heads.items()})
        if not set(self.heads) <= set(self.layers) or not all(map(_are_heads, self.heads.values())):
            raise ValueError(f"heads: expected sorted indices for layers of {list(self.layers)}, got {self.heads}")
        for name, values in self.profile.items():
            if len(values) != count:
                raise ValueError(f"profile: expected {count} values of {name}, got {len(values)}")

    def __repr__(self) -> str:
        return f"<Plan: {len(self.layers)} of {len(self.scores)} layers, {list(self.layers)}>"

    def _repr_html_(self) -> str:
        rows = [f"<tr><td>{layer}</td><td>{escape(self.reasons[layer])}</td></tr>" for layer in self.layers]
        table = f"<table><tr><th>layer</th><th>reason</th></tr>{''.join(rows)}</table>" if rows else ""
        return f"<p>{escape(self.summary)}</p>{table}"

    @property
    def candidates(self) -> list[int]:
        """Indices of the blocks that could be chosen: those of one stack of the model."""
        stack = self.model.get("stack")
        return list(range(len(self.model["layers"]))) if stack is None else list(stack["layers"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, atomically. NaN becomes null. `OSError` if the disk refuses."""
        path = Path(path)
        document = {
            "kind": _KIND,
            "format": FORMAT,
            "layers": list(self.layers),
            "summary": self.summary,
            "reasons": {str(layer): self.reasons[layer] for layer in self.layers},
            "scores": _finite(self.scores),
            "profile": {name: _finite(values) for name, values in self.profile.items()},
            "config": self.config,
            "model": self.model,
            "found": {name: list(blocks) for name, blocks in self.found.items()},
            "ranks": {str(layer): self.ranks[layer] for layer in sorted(self.ranks)},
            "heads": {str(layer): list(self.heads[layer]) for layer in sorted(self.heads)},
            "actions": list(self.actions),
        }
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan. `FileNotFoundError` if there is none, `ValueError` saying why if the file is not a plan."""
        path = Path(path)
        try:
            document = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is not a plan: it is not JSON ({error})") from error
        if not isinstance(document, dict) or document.get("kind") != _KIND:
            raise ValueError(f'{path} is not a plan: it lacks "kind": "{_KIND}"')
        if document.get("format") != FORMAT:
            raise ValueError(f"{path} is a plan of format {document.get('format')}; this version reads format {FORMAT}")
        document = _LATER | document
        for key, (kind, words) in _FIELDS.items():
            if not _is_of(kind, document.get(key)):
                raise ValueError(f"{path} is not a plan: {key} is not {words}")
        fields: dict[str, Any] = {key: document[key] for key in _FIELDS}
        for key in ("reasons", "heads", "ranks"):
            fields[key] = {int(layer): value for layer, value in fields[key].items()}
        fields["scores"] = _numbers(fields["scores"])
        fields["profile"] = {name: _numbers(values) for name, values in fields["profile"].items()}
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path} is not a plan: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Plan:
        """The plan that was saved beside an adapter or a model in `folder` (`inflection_plan.json`).

        `FileNotFoundError` where there is none, `ValueError` where the file is not a plan.
        """
        path = Path(folder) / cls.FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {cls.FILE}: it is written by save_pretrained of a model that inject returned"
            )
        return cls.load(path)

    # ---- for a model: these methods need torch, transformers and peft ----

    def target_modules(self, model: nn.Module, wanted: str | Sequence[str] | None = None) -> list[str]:
        """Full names of the modules that `inject` would adapt in the planned blocks, for tools that take names.

        `wanted` as `target_modules` of `inject`. `ValueError` where the plan does not fit the model.
        """
        from ..act import configs

        return configs.target_modules(model, self, wanted)

    def lora_config(self, model: nn.Module, r: int = 4, **options) -> peft.LoraConfig:
        """A `peft.LoraConfig` of rank `r` on the planned blocks; `options` are those of LoraConfig (`use_dora=True`).

        `lora_alpha` is `2 * r` unless given. Where other modules of the model end like a planned one, `target_modules`
        is one regular expression over full names. `ValueError` where the plan does not fit the model.
        """
        from ..act import configs

        return configs.lora_config(model, self, r, **options)

    def peft_config(self, model: nn.Module, config: peft.PeftConfig | str, **options) -> peft.PeftConfig:
        """A copy of `config` with the modules of the planned blocks, for any peft method that adapts modules.

        `config` is a configuration of peft, or the name of a method ("dora", "ia3", "adalora", "vera", "loha", "oft",
        ...) whose settings are `options`. `ValueError` for a method that is not of layers (prefix and prompt tuning),
        or where the plan does not fit the model.
        """
        from ..act import configs

        return configs.peft_config(model, self, config, **options)

    def to_yaml(self, tool: str, model: nn.Module | None = None, *, r: int = 4, **options) -> str:
        """The plan as settings of "axolotl", "llama-factory", "ms-swift" or "trl", for their configuration file.

        Without `model` the names are those of the adapter that was injected by this plan, as
        `Plan.from_pretrained` reads them. `options`: `lora_alpha` (2 * r unless given), `lora_dropout`,
        `target_modules`, `modules_to_save`. `ValueError` for an unknown tool, or where the names are not known.
        """
        from ..act import export

        return export.to_yaml(self, tool, model, r=r, **options)


def _finite(values) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _numbers(values: list) -> list[float]:
    return [np.nan if value is None else float(value) for value in values]


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_heads(heads) -> bool:
    return len(heads) > 0 and all(_is_integer(h) and h >= 0 for h in heads) and list(heads) == sorted(set(heads))


def _is_of(kind: Any, value: object) -> bool:
    """Whether a JSON value is of a type: null is a number without a value, and keys that are integers are texts."""
    inner = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(inner[0], one) for one in value)
    if get_origin(kind) is dict:
        keys_fit = isinstance(value, dict) and (inner[0] is str or all(key.isdecimal() for key in value))
        return keys_fit and isinstance(value, dict) and all(_is_of(inner[1], one) for one in value.values())
    if kind is float and (value is None or _is_integer(value)):
        return True
    return _is_integer(value) if kind is int else isinstance(value, kind)


_FIELDS: dict[str, tuple[Any, str]] = {
    "layers": (list[int], "a list of integers"),
    "summary": (str, "a text"),
    "reasons": (dict[int, str], "a text for each layer"),
    "scores": (list[float], "a list of numbers"),
    "profile": (dict[str, list[float]], "a list of numbers for each signal"),
    "config": (dict, "a table of options"),
    "model": (dict, "a table"),
    "found": (dict[str, list[int]], "a list of integers for each thing that was looked for"),
    "ranks": (dict[int, int], "an integer >= 1 for each layer"),
    "heads": (dict[int, list[int]], "a list of integers for each layer"),
    "actions": (list[dict], "a list of tables"),
}
_LATER: dict[str, Any] = {"ranks": {}, "heads": {}, "actions": []}  # fields that older plans lack
