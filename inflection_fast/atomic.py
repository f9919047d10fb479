"""Files that are either whole or not there, also when the machine goes down while they are written; JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = ["read_json", "replacing", "write_json", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; the file takes the place of `path` if the block ends without an error.

    The folder is made where it is missing. Several processes may write the same file at once: the last one wins.
    `OSError` if the disk refuses; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # not by mkstemp, whose files only their owner can read
    try:
        yield fresh
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON. ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file that `write_json` could write again.

    ValueError that says why, without the path, for anything else: no UTF-8, NaN or infinity, nested too deep, halves of
    surrogate pairs. `OSError` if the file cannot be read.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return content


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
