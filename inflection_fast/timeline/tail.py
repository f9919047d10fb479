"""Reading a timeline row by row, also while another process writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .arrow import parse

__all__ = ["TimelineTail"]

_PIECE = 2**25  # bytes per read
_HEAD = 2**10  # bytes that identify a file


class TimelineTail:
    """The rows of a timeline in order, each once, as they are appended to the file.

    An incomplete row is returned later, when it is complete. A file that was replaced or cut (by a resumed run) is read
    again from its beginning, and `restarts` counts that. `meta` is None while there is no file.
    """

    def __init__(self, path: str | os.PathLike):  # of the file, which need not exist yet
        self.path = Path(path)
        self.restarts = 0
        self._forget()

    def _forget(self) -> None:
        self.meta: dict | None = None
        self.torn = False  # whether the file ends in an incomplete row
        self._schema = self._start = b""
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def rows(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """New rows (step, values by name), up to the present end of the file.

        No file is no rows. `ValueError` if the file is not a timeline.
        """
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return
        with file:
            self._begin(file)
            piece = _PIECE
            while True:
                file.seek(self._offset)
                data = file.read(piece)
                if not data:
                    self.torn = False
                    return
                if not self._schema and not self._read_schema(data):
                    if len(data) == piece:  # the schema alone may be longer than a piece
                        piece *= 2
                        continue
                    self.torn = True
                    return
                body = data[len(self._schema) :] if self._offset == 0 else data
                rows, self.meta, rest = parse(self.path, self._schema + body)
                used = len(data) - rest
                self._offset += used
                yield from rows
                if len(data) < piece:
                    self.torn = rest > 0
                    return
                piece = piece if rows else 2 * piece  # one row alone may be longer than a piece

    def _begin(self, file) -> None:
        """Start over if the file was replaced, or is shorter than what was read."""
        found = os.fstat(file.fileno())
        start = file.read(min(_HEAD, max(len(self._start), self._offset)))
        same = self._identity in (None, (found.st_dev, found.st_ino)) and start[: len(self._start)] == self._start
        if not same or found.st_size < self._offset:
            self._forget()
            self.restarts += 1
            file.seek(0)
        if not self._start and self._offset:
            self._start = start
        self._identity = (found.st_dev, found.st_ino)

    def _read_schema(self, data: bytes) -> bool:
        """Keep the bytes of the schema, which every piece needs to be parsed; False if incomplete."""
        import pyarrow as pa

        if not data.startswith(b"\xff\xff\xff\xff"[: len(data)]):
            raise ValueError(f"{self.path} is not a timeline: it does not begin like an Arrow stream")
        source = pa.BufferReader(data)
        try:
            message = pa.ipc.read_message(source)
        except (pa.ArrowException, OSError, EOFError):
            return False
        if message is None:
            return False
        self._schema = data[: source.tell()]
        return True
