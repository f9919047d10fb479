"""The page of results of a sweep."""

from __future__ import annotations

from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

_STATUS = ("right", "no attention", "refused", "wrong", "not built")

_HEAD = """# Model types

Made by `make test-models`: tiny models of the types of Transformers {transformers} (torch {torch}), built from their
configurations, two sequences each, all query rows. The entropy of every block and head is compared with that of the
model's own eager attention in float64 (in float32 where its code does not run in float64). "Error" is the largest
difference in nats, with float32 activations in the model; "layers" is the number of compared blocks.

For attention within windows or blocks of a sequence, each row is compared over the keys that it attends.

{counts}

* **right**: the entropy of each block agrees to {tolerance:g} nats ({single:g} where the truth is in float32).
* **no attention**: the blocks have no softmax attention; gradients are measured, entropy is NaN.
* **refused**: the model is refused, with the message in the last column.
* **not built**: not tested; listed below the table with the reasons.

"Adapters": result of `inject` without `target_modules` on every second block: the rule that found the modules, and
their number. The modules were checked to be inside these blocks, and trained for one step; "dead" lists those of a
block that ran whose adapter had no gradient.
{adapted}

| type | result | blocks by stack | layers | error | adapters | note |
|---|---|---|---|---|---|---|
"""


def write(path: str, results: list) -> None:
    """Write the table, right ones first."""
    from .sweep import TOLERANCE, TOLERANCE_SINGLE

    counts = Counter(result.status for result in results)
    built = [result for result in results if result.status != "not built"]
    summary = f"{len(built)} types were built: " + ", ".join(
        f"{counts[status]} {status}" for status in _STATUS[:-1] if counts[status]
    )
    words = Counter(_adapted(result.adapted) for result in built)
    adapted = "; ".join(f"{count} {word}" for word, count in words.most_common())
    head = _HEAD.format(
        transformers=version("transformers"),
        torch=version("torch"),
        counts=summary + ".",
        adapted=f"Of {len(built)} types: {adapted}.",
        tolerance=TOLERANCE,
        single=TOLERANCE_SINGLE,
    )
    rows = sorted(built, key=lambda result: (_STATUS.index(result.status), result.model_type))
    lines = [result.line() for result in rows]
    Path(path).write_text(head + "\n".join(lines) + "\n\n" + _left(results))


def _adapted(words: str) -> str:
    status = words.partition(":")[0]
    return status if status in ("dead", "outside", "refused", "crash") else "trained"


def _left(results: list) -> str:
    reasons = defaultdict(list)
    for result in results:
        if result.status == "not built":
            reasons[result.note].append(result.model_type)
    lines = [f"* {', '.join(types)}: {note}" for note, types in sorted(reasons.items())]
    return f"Not built ({sum(map(len, reasons.values()))}):\n\n" + "\n".join(lines) + "\n"
