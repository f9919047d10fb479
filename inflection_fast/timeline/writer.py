"""Appending measured steps to a file that is always readable."""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path

import numpy as np

from ..atomic import replacing
from .arrow import END_OF_STREAM, FORMAT, columns_in, encode, parse, read, schema_of
from .columns import Column
from .older import STANDARD
from .signals import checked, shapes_of, sizes_of
from .timeline import FILE_NAME, Timeline, stack

__all__ = ["IF_EXISTS", "TimelineWriter", "folder_for"]

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**26  # limit of rows in memory while the disk refuses writes
_ARRAY_BYTES = 128  # overhead of an array


class TimelineWriter:
    """Appends measured steps to `folder/timeline.arrows`, or keeps them in memory (`folder` None).

    `layers` are the block names, `heads` the number of attention heads of the widest block, `meta` other JSON values
    about the run (`model`, `config`, `versions`), `columns` the columns (None: the standard ones), and `axes` the names
    of places, or their number, of axes other than "layer" and "head".

    An existing timeline is a `ValueError` unless `resume_at` is given: then its rows with step >= `resume_at` and an
    incomplete end are dropped (the file is replaced atomically) and it is continued, or a new file is started. A file
    of other layers, heads or another model is a `ValueError`. Columns of the file and of `columns` are all kept, and
    missing where they were not measured.

    Rows in the file are not kept in memory: `timeline` reads them, even if the file was deleted. When the disk refuses
    a write, `append` truncates the file to its last complete batch and raises the `OSError`; the row stays in memory,
    and the next `append` or `close` tries again. So the file is always a prefix of `timeline`. A deleted file or folder
    is written again; a file that another process has replaced is an `OSError`.

    At most `keep_bytes` (None: 64 MiB with a folder, else no limit) of rows stay in memory. Beyond that the oldest are
    dropped, because the last ones show what went wrong; `given_up` counts them, and a warning is logged.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        *,
        layers: list[str],
        heads: int,
        meta: dict,
        columns: Mapping[str, Column] | None = None,
        axes: Mapping[str, int | list[str]] | None = None,
        resume_at: int | None = None,
        keep_bytes: int | None = None,
    ):
        layers = list(layers)
        if not layers or not all(isinstance(name, str) for name in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"layers: expected distinct block names, at least one, got {layers}")
        if operator.index(heads) < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if resume_at is not None and operator.index(resume_at) < 0:
            raise ValueError(f"resume_at: expected a step >= 0, got {resume_at}")
        columns = STANDARD if columns is None else columns
        meta = {**meta, "format": FORMAT, "layers": layers, "heads": int(heads), "axes": dict(axes or {})}
        meta["columns"] = {name: column.as_dict() for name, column in columns.items()}
        self._meta = json.loads(json.dumps(meta, allow_nan=False))  # as a reader of the file will see it
        self._describe()
        self._pending: deque[tuple[int, dict[str, np.ndarray]]] = deque()  # rows that no file holds
        self._most = KEPT_BYTES if keep_bytes is None and folder is not None else keep_bytes
        self.given_up = 0  # dropped rows
        self._last: int | None = None  # step of the last row
        self.path: Path | None = None  # None: in memory only
        self._file: FileIO | None = None
        self._release: Callable[[], object] = lambda: None
        self._closed = False
        if folder is not None:
            self._open(Path(folder), resume_at)

    def _describe(self) -> None:
        self._columns = columns_in(self._meta)
        self._shapes = shapes_of(self._columns, self._meta)

    def _open(self, folder: Path, resume_at: int | None) -> None:
        path = folder / FILE_NAME
        rows: list[tuple[int, dict]] = []
        if path.exists():
            if resume_at is None:
                raise ValueError(
                    f"{path} exists already: choose another folder, or give the step at which to continue it "
                    "(start_step of a Monitor, resume_at of a writer)"
                )
            rows, old, _ = read(path)
            rows = [row for row in rows if row[0] < resume_at]
            self._accept(path, old, any_rows=bool(rows))
            self._meta |= _earlier(old, self._meta, rows)
            if rows:
                self._keep_columns(path, old)
                rows = [(step, checked(values, self._columns, self._shapes)) for step, values in rows]
        self._schema, self.path = schema_of(self._meta), path
        self._last = rows[-1][0] if rows else None
        self._create(path, [self._schema.serialize().to_pybytes(), *(self._encoded(row) for row in rows)])

    def _encoded(self, row: tuple[int, dict]) -> bytes:
        return encode(row, self._schema, len(self._meta["layers"]))

    def _keep_columns(self, path: Path, old: dict) -> None:
        """Add the columns of the file."""
        before, sizes = columns_in(old), sizes_of(old)
        for name, column in before.items():
            now = self._columns.get(name, column)
            here = {**sizes, **sizes_of(self._meta)}
            if now.axes != column.axes or any(here[axis] != sizes[axis] for axis in column.axes):
                raise ValueError(
                    f"{path} has a column {name!r} with axes {column.axes}, which are others now: choose another folder"
                )
        kept = {name: column for name, column in before.items() if name not in self._columns}
        self._meta["columns"] |= {name: column.as_dict() for name, column in kept.items()}
        self._meta["axes"] = {**old.get("axes", {}), **self._meta["axes"]}
        self._describe()

    def _create(self, path: Path, messages: list[bytes]) -> None:
        """Write the whole file atomically, and open it for appending."""
        with replacing(path) as fresh, open(fresh, "wb") as file:
            file.writelines(messages)
        if self._file is not None:
            self._file.close()
            self._release()
        self._file = open(path, "r+b", buffering=0)
        # A second handle, open for the lifetime of the writer, because `timeline` reads from it.
        self._reader = open(path, "rb", buffering=0)
        self._release = weakref.finalize(self, self._reader.close)
        self._offset = sum(map(len, messages))  # where the last whole batch ends

    def _accept(self, path: Path, old: dict, *, any_rows: bool) -> None:
        for key in ("layers", "heads", "model") if any_rows else ("layers", "model"):
            if old.get(key) != self._meta.get(key):
                raise ValueError(
                    f"{path} was measured with {key} = {old.get(key)} and cannot be continued with "
                    f"{key} = {self._meta.get(key)}: choose another folder"
                )

    def append(self, step: int, **signals: np.ndarray) -> None:
        """Add one measured step: arrays [L, H], [L] or scalars by the name of the column; a missing one is NaN.

        A masked array says where nothing was measured; in a plain array NaN means that.
        Steps increase. An unknown signal, a wrong shape, a step that does not increase or a closed writer:
        `ValueError`, and nothing is added. `OSError` if the disk refuses (see the class).
        """
        self.keep(step, **signals)
        if self.path is not None:
            self._flush(self.path)

    def keep(self, step: int, **signals: np.ndarray) -> None:
        """As `append`, but the row stays in memory until the next `append` or `close`."""
        if self._closed:
            raise ValueError("the timeline is closed")
        step = operator.index(step)
        if step < 0 or (self._last is not None and step <= self._last):
            raise ValueError(f"step: expected one above the last ({self._last}), got {step}")
        row = checked(signals, self._columns, self._shapes)
        self._pending.append((step, row))
        self._last = step
        if self._most is not None and len(self._pending) * sum(map(_bytes, row.values())) > self._most:
            self._give_up()

    def _give_up(self) -> None:
        step, _ = self._pending.popleft()
        if not self.given_up:
            where = "a timeline in memory" if self.path is None else self.path
            logger.warning("%s: too many rows cannot be written; those from step %d on are dropped", where, step)
        self.given_up += 1

    def _flush(self, path: Path) -> None:
        if self._pending:
            self._stay_in_place(path)
        while self._pending:
            self._write(self._encoded(self._pending[0]))
            self._pending.popleft()

    def _stay_in_place(self, path: Path) -> None:
        """Check that the open file is still at its path, because writing to a deleted file succeeds."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            self._create(path, [self._written()])
            logger.warning("%s was deleted; all rows so far were written to it again", path)
            return
        if not os.path.samestat(found, os.fstat(self._reader.fileno())):
            raise OSError(f"{path} was replaced by another process")

    def _written(self) -> bytes:
        """All whole batches that the file holds."""
        self._reader.seek(0)
        data = bytearray()
        while len(data) < self._offset:
            piece = self._reader.read(self._offset - len(data))
            if not piece:
                raise OSError(f"{self.path} was truncated by another process to {len(data)} of {self._offset} bytes")
            data += piece
        return bytes(data)

    def _write(self, message: bytes) -> None:
        if self._file is None:
            raise ValueError("the timeline has no file")
        try:
            self._file.seek(self._offset)
            view = memoryview(message)
            while view:
                view = view[self._file.write(view) :]  # an unbuffered write may take only a part
        except OSError:
            try:
                self._file.truncate(self._offset)
            except OSError:
                pass  # the next write overwrites the incomplete end; readers drop it
            raise
        self._offset += len(message)

    def close(self) -> None:
        """Write the end-of-stream marker. Safe to call twice; `timeline` stays readable."""
        if self._closed:
            return
        self._closed = True
        if self.path is None or self._file is None:
            return
        try:
            self._flush(self.path)
            self._write(END_OF_STREAM)
            self._offset -= len(END_OF_STREAM)  # no batch
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def timeline(self) -> Timeline:
        """All rows so far, as they would be loaded from the file."""
        rows = [] if self.path is None else parse(self.path, self._written())[0]
        return stack([*rows, *self._pending], self._meta, truncated=False)

    def __enter__(self) -> TimelineWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _earlier(old: dict, new: dict, rows: list) -> dict:
    """Metadata about other configurations of the first rows of a resumed timeline."""
    earlier = old.get("earlier", [])
    if rows and old.get("config") != new.get("config"):
        earlier = [*earlier, {"last_step": rows[-1][0], "config": old.get("config")}]
    return {"earlier": earlier} if earlier else {}


def _bytes(array: np.ndarray) -> int:
    return array.nbytes + array.size + 2 * _ARRAY_BYTES  # with its mask


IF_EXISTS = ("error", "overwrite", "new")


def folder_for(out: str | os.PathLike, if_exists: str, also: tuple[str, ...] = ()) -> Path:
    """The folder of a new timeline that was requested for `out`.

    Args:
        out: folder
        if_exists: with a timeline in `out`: "error" refuses it; "overwrite" deletes it and the files `also` beside it;
            "new" gives the first of `out`-2, `out`-3, ... that holds none

    Raises:
        ValueError: `if_exists` is something else, or is "error" and there is a timeline.
    """
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists: expected one of {', '.join(IF_EXISTS)}, got {if_exists!r}")
    folder = Path(out)
    if not (folder / FILE_NAME).exists():
        return folder
    if if_exists == "error":
        raise ValueError(
            f"{folder / FILE_NAME} exists already: choose another folder, or if_exists='overwrite' to delete it, or"
            " if_exists='new' for a folder beside it, or give the step to continue at (start_step of a Monitor)"
        )
    if if_exists == "overwrite":
        for name in (FILE_NAME, *also):
            (folder / name).unlink(missing_ok=True)
        return folder
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in numbered if not (path / FILE_NAME).exists())
