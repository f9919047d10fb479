"""The page as one file: words, numbers, drawing code and styles together, so that it opens without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from inflection_fast.decide import Plan
from inflection_fast.report.content import PAIRS, Content, Series
from inflection_fast.report.fragments import fragments, title
from inflection_fast.report.profile import by_name, components, log_gradient
from inflection_fast.report.words import capitalised

__all__ = [
    "DIGITS", "State", "html", "json_numbers", "matrix_entry", "pack", "pack_text", "plan_entry", "state",
    "write_html",
]  # fmt: skip


class State:
    """The contents of the page: `manifest`, JSON values, and the arrays that it refers to by number."""

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}
        self.arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Add an array; returns its entry for the manifest."""
        self.arrays.append(array)
        return {"id": len(self.arrays) - 1, "shape": list(array.shape)}


def state(content: Content) -> State:
    """The contents of the page of a run."""
    made, run, measured = State(), content.run, content.measured
    # Columns of the step itself come last, the loss first among them.
    ordered = sorted(content.series.items(), key=lambda one: (one[1].column.quantity == "step", one[0] != "loss"))
    columns = [entry for name, series in ordered if (entry := _column(made, name, series, content.series))]
    made.manifest = {
        "version": content.version,
        "title": title(run),
        "layers": [] if measured is None else list(measured.layers),
        "steps": 0 if measured is None else len(measured.steps),
        "columns": columns,
        "alerts": [
            {"step": a.step, "kind": a.kind, "signal": a.signal, "layer": a.layer, "head": a.head, "message": a.message}
            for a in content.alerts
        ],
        "plan": plan_entry(run.plan),
        "matrices": [
            entry for name, series in content.series.items() if (entry := _matrix(made, name, series)) is not None
        ],
        "fragments": fragments(content),
    }
    return made


def _column(made: State, name: str, series: Series, every: dict[str, Series]) -> dict[str, Any] | None:
    """The entry of a column; None without any value, and for pairs of layers, which are a matrix."""
    places, column = series.places, series.column
    if not len(places.steps) or column.axes == PAIRS:
        return None
    error = every.get(f"{name}_se")
    entry = {
        "name": name,
        "label": capitalised(column.label),
        "unit": "" if column.unit == "1" else column.unit,
        "axes": list(column.axes) if column.axes[:1] == ("layer",) else [],
        "log": column.scale == "log",
        "quantity": column.quantity,
        "explanation": column.explanation,
        "error": f"{name}_se" if error is not None and len(error.places.steps) else None,
        "of": name.removesuffix("_se") if name.endswith("_se") and name.removesuffix("_se") in every else None,
        "length": places.length,
        "steps": places.steps.tolist(),
        "overall": made.add(np.moveaxis(places.over_places(), -1, 0)),  # [3, B] mean, least, largest
    }
    if entry["axes"]:
        entry["map"] = made.add(_statistics(places))  # [1 | 3, L, B]
    if series.parts is not None:
        parts = series.parts
        by_part = _statistics(parts)
        entry["parts"] = {
            **made.add(by_part.reshape(*by_part.shape[:2], -1, by_part.shape[-1])),  # [1 | 3, L, H, B]
            "axis": " x ".join(column.axes[1:]),
            "steps": parts.steps.tolist(),
            "length": parts.length,
        }
    return entry


def _matrix(made: State, name: str, series: Series) -> dict[str, Any] | None:
    """The entry of the last matrix of a column of pairs of layers; None for others, and without any value."""
    column, parts = series.column, series.parts
    if column.axes != PAIRS or parts is None or not len(parts.steps):
        return None
    first, last = parts.steps[-1].tolist()
    when = f"At step {last}." if first == last else f"Mean over the measurements from step {first} to {last}."
    entry = matrix_entry(
        made, column.label, column.unit, parts.mean[-1], "layer", "other layer", f"{column.explanation} {when}",
        "delta" not in name,
    )  # fmt: skip
    return {"name": name, **entry}


def matrix_entry(
    made: State,
    label: str,
    unit: str,
    values: np.ndarray,
    rows: str,
    columns: str,
    explanation: str,
    unit_interval: bool,
) -> dict[str, Any]:
    """A map of layers by layers as the page draws it."""
    return {
        "label": capitalised(label),
        "unit": unit,
        "explanation": explanation,
        "rows": rows,
        "columns": columns,
        "unitInterval": unit_interval,
        **made.add(np.asarray(values, float)),
    }


def _statistics(buckets: Any) -> np.ndarray:
    """Mean, smallest and largest value, steps last; the mean alone if all three are equal."""
    three = np.stack([np.moveaxis(part, 0, -1) for part in (buckets.mean, buckets.low, buckets.high)])
    same = np.array_equal(three[1], three[2], equal_nan=True)
    return three[:1] if same else three


def plan_entry(plan: Plan | None) -> dict[str, Any] | None:
    """The entry of a plan; None without one."""
    if plan is None:
        return None
    return {
        "layers": list(plan.layers),
        "reasons": {str(layer): reason for layer, reason in plan.reasons.items()},
        "found": {name: list(layers) for name, layers in plan.found.items()},
        "scores": json_numbers(plan.scores),
        "components": {name: json_numbers(values) for name, values in components(plan).items()},
        "profile": [
            {"label": "Attention entropy", "unit": "nats", "values": json_numbers(by_name(plan, "entropy")),
             "error": json_numbers(by_name(plan, "entropy_se"))},
            {"label": "Gradient norm", "unit": "natural log", "values": json_numbers(log_gradient(plan)),
             "error": json_numbers(by_name(plan, "log_activation_grad_se"))},
        ],
    }  # fmt: skip


def json_numbers(values: Any) -> list[float | None]:
    """Numbers for JSON, None for what is not finite."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, float)]


# ---- the file --------------------------------------------------------------------------------------------------------


def write_html(content: Content, path: Path) -> None:
    """Write the page of a run in its present state."""
    path.write_text(html(state(content)), encoding="utf-8")


def html(made: State, *, live: bool = False) -> str:
    """The page. A live page contains no arrays: it fetches them from its server, and asks for newer ones."""
    scripts = [_file("uplot/uPlot.iife.min.js"), _file("page.js")]
    styles = [_file("uplot/uPlot.min.css"), _file("page.css")]
    reaches = "'self'" if live else "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
        f"connect-src {reaches}; script-src {_hashes(scripts)}; style-src {_hashes(styles)}"
    )
    manifest = made.manifest | {"live": live}
    data = [_data("manifest", "application/json", _json(manifest))]
    if not live:
        data += [_data(f"array-{i}", "text/plain", pack_text(array)) for i, array in enumerate(made.arrays)]
    page = _file("page.html")
    kind = "several" if "several" in made.manifest else made.manifest.get("look", "one")
    for name, text in (_WORDS["one"] | _WORDS[kind]).items():
        page = page.replace(f"<!--{name}-->", text)
    for name, part in {
        "policy": policy,
        "title": escape(made.manifest["title"]),
        "styles": "\n".join(f"<style>{style}</style>" for style in styles),
        **{f"fragment:{name}": text for name, text in made.manifest["fragments"].items()},
        "data": "\n".join(data),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }.items():
        page = page.replace(f"<!--{name}-->", part, 1)
    return page


def binary(made: State, number: int) -> bytes:
    """One array in the form that a live page fetches."""
    return pack(made.arrays[number])


_ZOOM = " Drag to zoom all charts to some steps, double-click to see all again."
_BY_LAYER = "Layers from the input to the right, bars one standard error to each side; orange: named in the findings."
_WORDS = {
    "one": {
        "note:overview": "Every measured quantity over the training: the line is the mean over layers and heads, the "
        f"band goes from the lowest to the highest value of any of them.{_ZOOM}",
        "note:maps": "Orange triangles: chosen layers. Red marks: alerts. Click a layer, or press Enter, for its heads "
        "or its course.",
        "note:matrices": "Every layer against every other, as last measured. Colours of CKA run from 0 to 1.",
        "stages": "Stages",
        "alerts": "",
        "maps": "",
        "choice": "",
    },
    "several": {
        "note:overview": "Every measured quantity, mean over layers and heads: a line for each group of runs that "
        "differ in the seed alone, with a 95 % interval of the mean over its runs where there are several." + _ZOOM,
        "note:maps": "Blue: lower than the first, orange: higher.",
        "stages": "Runs",
        "alerts": " hidden",
        "choice": " hidden",
    },
    "scan": {
        "note:overview": "What was measured on the texts, by layer: on the texts as they are, on the same words in "
        f"random order, and with the weights of the blocks replaced by random matrices of their sizes. {_BY_LAYER}",
        "note:matrices": "Every layer against every other. Colours of CKA run from 0 to 1.",
        "stages": "Numbers",
        "alerts": " hidden",
        "maps": " hidden",
    },
    "comparison": {
        "note:overview": f"What was measured on both models, by layer. {_BY_LAYER}",
        "note:matrices": "Layers of A upwards, of B to the right. Colours of CKA run from 0 to 1.",
        "stages": "Numbers",
        "alerts": " hidden",
        "maps": " hidden",
        "choice": " hidden",
    },
}


@cache
def _file(name: str) -> str:
    return (resources.files("inflection_fast.report") / "web" / name).read_text(encoding="utf-8")


def _hashes(texts: list[str]) -> str:
    """Hashes for the content security policy: the browser runs no other scripts, whatever is in the data."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _data(name: str, kind: str, text: str) -> str:
    return f'<script type="{kind}" id="{name}">{text}</script>'


def _json(value: Any) -> str:
    """JSON without characters that could end its script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


DIGITS = 4  # that a packed number keeps: the last one may be off by one
_KEPT_BITS = 13  # of the 23 of a float32's fraction: a relative error of at most 2**-14
_LEVEL = 6


def pack(values: np.ndarray) -> bytes:
    """zlib of `values` as float32 in C order, in byte planes: the lowest bytes of all numbers first, the highest last.

    Rounded numbers end in zero bits, and bytes of sign and exponent repeat, so the planes compress well. NaN and
    infinities are kept.
    """
    numbers = np.ascontiguousarray(values, np.float32)
    bits = numbers.view(np.uint32).reshape(-1)
    dropped = np.uint32(23 - _KEPT_BITS)
    half = np.uint32((1 << int(dropped)) >> 1)
    rounded = (bits + half) >> dropped << dropped
    bits = np.where(np.isfinite(numbers.reshape(-1)), rounded, bits)
    planes = bits.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes.tobytes(), _LEVEL)


def pack_text(values: np.ndarray) -> str:
    """`pack` in base64."""
    return base64.b64encode(pack(values)).decode("ascii")
