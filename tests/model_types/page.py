"""The page of results of a sweep."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

_STATUS = ("right", "no attention", "refused", "wrong", "not built")

_HEAD = """# Model types

Made by `make test-models`: tiny models of the types of Transformers {transformers} (torch {torch}), built from their
configurations, two sequences each, all query rows. The entropy of every block and head is compared with that of the
model's own eager attention in float64 (in float32 where its code does not run in float64). "Error" is the largest
difference in nats, with float32 activations in the model; "layers" counts the blocks that were compared.

{counts}

* **right**: every block's entropy agrees to {tolerance:g} nats ({single:g} where the truth is in float32).
* **no attention**: the blocks have no softmax attention; gradients are measured, entropy is NaN.
* **refused**: in the words given.
* **not built**: no tiny model or batch follows from the configuration by general rules; nothing is known about it.

| type | result | blocks by stack | layers | error | note |
|---|---|---|---|---|---|
"""


def write(path: str, results: list) -> None:
    """Write the table, right ones first."""
    from .sweep import TOLERANCE, TOLERANCE_SINGLE

    counts = Counter(result.status for result in results)
    built = [result for result in results if result.status != "not built"]
    summary = f"{len(built)} types were built: " + ", ".join(
        f"{counts[status]} {status}" for status in _STATUS[:-1] if counts[status]
    )
    head = _HEAD.format(
        transformers=version("transformers"),
        torch=version("torch"),
        counts=summary + ".",
        tolerance=TOLERANCE,
        single=TOLERANCE_SINGLE,
    )
    rows = sorted(built, key=lambda result: (_STATUS.index(result.status), result.model_type))
    left = ", ".join(result.model_type for result in results if result.status == "not built")
    lines = [result.line() for result in rows]
    Path(path).write_text(head + "\n".join(lines) + f"\n\nNot built ({counts['not built']}): {left}.\n")
