"""JSON files of comparisons and scans, with their kind and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inflection_fast.atomic import read_json, write_json

__all__ = ["read_document", "write_document"]

FORMAT = 1


def write_document(path: str | Path, what: str, content: dict[str, Any]) -> None:
    """Write `content` as a "comparison" or a "scan", whole or not at all."""
    write_json(Path(path), {"kind": f"inflection_fast {what}", "format": FORMAT, **content})


def read_document(path: str | Path, what: str) -> dict[str, Any]:
    """The content that `write_document` wrote. `ValueError` for a file that is none."""
    try:
        document = read_json(Path(path))
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: it is not JSON ({error})") from error
    kind = f"inflection_fast {what}"
    if not isinstance(document, dict) or document.pop("kind", None) != kind or document.pop("format", None) != FORMAT:
        raise ValueError(f'{path} is no {what} of format {FORMAT}: expected "kind": "{kind}"')
    return document
