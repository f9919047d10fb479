"""The bytes of a file, decompressed according to its suffix."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from inflection_fast.run.errors import UserError

__all__ = ["COMPRESSED", "DAMAGED", "binary"]

_OPEN: dict[str, Callable[[Path, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: io.BufferedReader(import_module("pyarrow").input_stream(path, compression="zstd")),
}
COMPRESSED = (*_OPEN, ".zip")
# Errors of reading a damaged file.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)


@contextmanager
def binary(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file."""
    suffix = path.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if not item.is_dir()]
            if len(members) != 1:
                raise UserError(f"{path}: the archive must hold one file; it holds {len(members)}")
            with archive.open(members[0]) as file:
                yield file
    else:
        with _OPEN.get(suffix, open)(path, "rb") as file:
            yield file
