"""The file between measuring and deciding: what was measured, step by step.

`timeline.arrows` is one Arrow IPC stream with a record batch per measured step. Of the formats that hold typed
columns it is the one that can be appended to: Parquet, Feather and NumPy archives write their index at the end, so a
killed process leaves nothing, whereas every prefix of a stream that ends between two batches is a stream. It carries
its own schema and metadata, pandas, polars, DuckDB, R and Arrow itself read it, and reading it executes nothing (a
pickle would).

Each batch goes to the operating system in one piece before `append` returns, so a killed process loses at most the
batch that it was writing; the disk itself is synchronised when the file is created, replaced and closed.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["HEAD_SIGNALS", "LAYER_SIGNALS", "STEP_SIGNALS", "Timeline", "TimelineWriter"]

# Of the training batch, and those that begin with "probe_" of the probe set: [S, L, H], float32; [S, L], float64
HEAD_SIGNALS = ("entropy", "entropy_se", "max_logit", "collision", "sink", "probe_entropy")
LAYER_SIGNALS = ("activation_grad", "parameter_grad", "delta_cka", "delta_cka_se", "probe_activation_grad")
STEP_SIGNALS = ("loss", "skipped", "measure_ms", "probe_ms")  # [S], as float64, the same in all rows of a step

logger = logging.getLogger(__name__)

FILE_NAME = "timeline.arrows"
FORMAT = 2
_META_KEY = b"inflection_fast"
_CONTINUATION = b"\xff\xff\xff\xff"  # what every message of an Arrow stream begins with
_END_OF_STREAM = _CONTINUATION + b"\x00\x00\x00\x00"


@dataclass(frozen=True, eq=False)
class Timeline:
    """What was measured, in `S` steps, `L` layers (transformer blocks in order) and `H` heads. NaN: no value."""

    steps: np.ndarray  # [S] int64, optimizer steps, strictly increasing
    entropy: np.ndarray  # [S, L, H] nats, mean over valid query rows
    entropy_se: np.ndarray  # [S, L, H] nats, standard error of that mean from sampling rows (0: all rows)
    max_logit: np.ndarray  # [S, L, H]
    collision: np.ndarray  # [S, L, H] mean sum of squared probabilities
    sink: np.ndarray  # [S, L, H] mean probability of key 0
    probe_entropy: np.ndarray  # [S, L, H] nats, mean over the valid query rows of the probe set
    activation_grad: np.ndarray  # [S, L] l2 norm of dL/d(output of the block)
    parameter_grad: np.ndarray  # [S, L] l2 norm over the block's parameters
    delta_cka: np.ndarray  # [S, L]
    delta_cka_se: np.ndarray  # [S, L] standard error of it, from leaving out sequences of the probe; NaN: not asked for
    probe_activation_grad: np.ndarray  # [S, L] as activation_grad, over the probe set
    loss: np.ndarray  # [S]
    skipped: np.ndarray  # [S] 1: a gradient scaler dropped the step, whose gradients were not finite; 0: it did not
    measure_ms: np.ndarray  # [S] host time, the probe included
    probe_ms: np.ndarray  # [S] host time of the snapshot of the probe
    layers: list[str]  # names of the blocks
    meta: dict  # format, layers, heads, model, config, versions
    truncated: bool = False  # a torn end was dropped while loading

    @property
    def heads(self) -> int:
        """The number of attention heads `H`."""
        return self.entropy.shape[2]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Timeline:
        """Read a timeline from its file, or from the folder that holds it.

        A torn end (the writer was killed, the disk was full) is dropped with a warning and `truncated` is set; every
        whole batch before it is kept. `FileNotFoundError` if there is none, `ValueError` if the file is not a
        timeline.
        """
        path = _file_of(path)
        rows, meta, torn = _read(path)
        if torn:
            last = f"after step {rows[-1][0]}" if rows else "before the first step"
            warnings.warn(f"{path} ends in {torn} unreadable bytes {last}; they were dropped", stacklevel=2)
        return _stack(rows, meta, truncated=torn > 0)


class TimelineWriter:
    """Appends measured steps to `folder/timeline.arrows`, or keeps them in memory only where `folder` is None.

    `layers` are the block names, `heads` the number of attention heads, `meta` what else describes the run (`model`,
    `config`, `versions`: anything JSON can hold). An existing timeline is a `ValueError` unless `resume_at` is given:
    then its rows with step >= `resume_at` and a torn end are dropped (the file is replaced atomically) and it is
    continued. Resuming where no file is yet starts one. A file of other layers, heads or another model is a
    `ValueError`.

    Rows that the file holds are not kept in memory: `timeline` reads them back, also when the file was deleted since.
    When the disk refuses a write, `append` cuts the file back to its last whole batch and lets the `OSError` through.
    The row stays in memory, and the next `append` or `close` tries again: the file is always a prefix of `timeline`.
    A file or folder that was deleted is written again as a whole; one that another process has replaced is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        *,
        layers: list[str],
        heads: int,
        meta: dict,
        resume_at: int | None = None,
    ):
        layers = list(layers)
        if not layers or not all(isinstance(name, str) for name in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"layers: expected distinct block names, at least one, got {layers}")
        if operator.index(heads) < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if resume_at is not None and operator.index(resume_at) < 0:
            raise ValueError(f"resume_at: expected a step >= 0, got {resume_at}")
        meta = {**meta, "format": FORMAT, "layers": layers, "heads": int(heads)}
        self._meta = json.loads(json.dumps(meta, allow_nan=False))  # as a reader of the file will see it
        self._pending: list[tuple[int, dict[str, np.ndarray]]] = []  # rows that no file holds
        self._last: int | None = None  # step of the last row
        self.path: Path | None = None  # None: in memory only
        self._file = None
        self._closed = False
        if folder is not None:
            self._open(Path(folder), resume_at)

    def _open(self, folder: Path, resume_at: int | None) -> None:
        path, rows = folder / FILE_NAME, []
        if path.exists():
            if resume_at is None:
                raise ValueError(f"{path} exists already: choose another folder, or resume_at a step to continue it")
            rows, old, _ = _read(path)
            self._accept(path, old)
            rows = [row for row in rows if row[0] < resume_at]
            self._meta |= _earlier(old, self._meta, rows)
        self._schema, self.path = _schema(self._meta), path
        self._last = rows[-1][0] if rows else None
        self._create([self._schema.serialize().to_pybytes(), *(_encode(row, self._schema) for row in rows)])

    def _create(self, messages: list[bytes]) -> None:
        """Write the file as a whole, atomically, and go on appending to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(fresh, "wb") as file:
                file.writelines(messages)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        if self._file is not None:
            self._file.close()
            self._release()
        self._file = open(self.path, "r+b", buffering=0)
        # A second handle, which stays open as long as somebody holds the writer, because `timeline` reads from it.
        self._reader = open(self.path, "rb", buffering=0)
        self._release = weakref.finalize(self, self._reader.close)
        self._offset = sum(map(len, messages))  # where the last whole batch ends

    def _accept(self, path: Path, old: dict) -> None:
        for key in ("layers", "heads", "model"):
            if old.get(key) != self._meta.get(key):
                raise ValueError(
                    f"{path} was measured with {key} = {old.get(key)} and cannot be continued with "
                    f"{key} = {self._meta.get(key)}: choose another folder"
                )

    def append(self, step: int, **signals: np.ndarray) -> None:
        """Add one measured step: arrays [L, H], [L] or scalars by the name of the signal; a missing signal is NaN.

        Steps increase. An unknown signal, a wrong shape, a step that does not increase or a closed writer:
        `ValueError`, and nothing is added. `OSError` if the disk refuses (see the class).
        """
        self.keep(step, **signals)
        if self.path is not None:
            self._flush()

    def keep(self, step: int, **signals: np.ndarray) -> None:
        """As `append`, but the row stays in memory until the next `append` or `close`."""
        if self._closed:
            raise ValueError("the timeline is closed")
        step = operator.index(step)
        if step < 0 or (self._last is not None and step <= self._last):
            raise ValueError(f"step: expected one above the last ({self._last}), got {step}")
        self._pending.append((step, _checked(signals, self._shapes())))
        self._last = step

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return _signal_shapes(len(self._meta["layers"]), self._meta["heads"])

    def _flush(self) -> None:
        if self._pending:
            self._stay_in_place()
        while self._pending:
            self._write(_encode(self._pending[0], self._schema))
            del self._pending[0]

    def _stay_in_place(self) -> None:
        """Make sure that the open file is still the one that a reader finds: writing to a deleted one succeeds."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            self._create([self._written()])
            logger.warning("%s was deleted; all that was measured so far was written to it again", self.path)
            return
        if not os.path.samestat(found, os.fstat(self._reader.fileno())):
            raise OSError(f"{self.path} was replaced by another process")

    def _written(self) -> bytes:
        """All whole batches that the file holds."""
        self._reader.seek(0)
        data = bytearray()
        while len(data) < self._offset:
            piece = self._reader.read(self._offset - len(data))
            if not piece:
                raise OSError(f"{self.path} was cut from outside to {len(data)} of {self._offset} bytes")
            data += piece
        return bytes(data)

    def _write(self, message: bytes) -> None:
        try:
            self._file.seek(self._offset)
            view = memoryview(message)
            while view:
                view = view[self._file.write(view) :]  # an unbuffered write may take only a part
        except OSError:
            try:
                self._file.truncate(self._offset)
            except OSError:
                pass  # the torn end stays until the next write overwrites it; readers drop it
            raise
        self._offset += len(message)

    def close(self) -> None:
        """Write the end-of-stream marker. Safe to call twice; `timeline` stays readable."""
        if self._closed:
            return
        self._closed = True
        if self.path is None:
            return
        try:
            self._flush()
            self._write(_END_OF_STREAM)
            self._offset -= len(_END_OF_STREAM)  # no batch
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def timeline(self) -> Timeline:
        """All that was appended (and resumed) so far, exactly as it would be loaded from the file."""
        rows = [] if self.path is None else _parse(self.path, self._written())[0]
        return _stack([*rows, *self._pending], self._meta, truncated=False)

    def __enter__(self) -> TimelineWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no timeline at {path}")
    return path


def _signal_shapes(layers: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
        **dict.fromkeys(HEAD_SIGNALS, (layers, heads)),
        **dict.fromkeys(LAYER_SIGNALS, (layers,)),
        **dict.fromkeys(STEP_SIGNALS, ()),
    }


def _checked(signals: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    unknown = sorted(set(signals) - set(shapes))
    if unknown:
        raise ValueError(f"unknown signals {unknown}: expected some of {list(shapes)}")
    values = {}
    for name, shape in shapes.items():
        dtype = np.float32 if name in HEAD_SIGNALS else np.float64
        try:
            values[name] = np.array(signals[name], dtype) if name in signals else np.full(shape, np.nan, dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected numbers, got {type(signals[name]).__name__}") from error
        if values[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {values[name].shape}")
    return values


def _earlier(old: dict, new: dict, rows: list) -> dict:
    """Metadata that says under which other configurations the first rows of a resumed timeline were measured."""
    earlier = old.get("earlier", [])
    if rows and old.get("config") != new.get("config"):
        earlier = [*earlier, {"last_step": rows[-1][0], "config": old.get("config")}]
    return {"earlier": earlier} if earlier else {}


def _stack(rows: list, meta: dict, *, truncated: bool) -> Timeline:
    signals = {}
    for name, shape in _signal_shapes(len(meta["layers"]), meta["heads"]).items():
        signals[name] = np.array([values[name] for _, values in rows], np.float64).reshape(len(rows), *shape)
    steps = np.array([step for step, _ in rows], np.int64)
    return Timeline(steps=steps, **signals, layers=list(meta["layers"]), meta=meta, truncated=truncated)


# ---- Arrow -----------------------------------------------------------------------------------------------------------


def _schema(meta: dict):
    import pyarrow as pa

    per_head = pa.list_(pa.field("item", pa.float32(), nullable=False), meta["heads"])
    fields = [pa.field("step", pa.int64(), nullable=False), pa.field("layer", pa.int32(), nullable=False)]
    fields += [pa.field(name, per_head, nullable=False) for name in HEAD_SIGNALS]
    fields += [pa.field(name, pa.float64(), nullable=False) for name in LAYER_SIGNALS + STEP_SIGNALS]
    return pa.schema(fields, metadata={_META_KEY: json.dumps(meta)})


def _encode(row: tuple[int, dict[str, np.ndarray]], schema) -> bytes:
    """One row of the timeline as one encapsulated record batch message."""
    import pyarrow as pa

    step, values = row
    layers = len(values["entropy"])
    arrays = [np.full(layers, step, np.int64), np.arange(layers, dtype=np.int32)]
    for name in HEAD_SIGNALS:
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values[name].ravel()), type=schema.field(name).type))
    arrays += [values[name] for name in LAYER_SIGNALS]
    arrays += [np.full(layers, values[name]) for name in STEP_SIGNALS]
    return pa.record_batch([pa.array(a) for a in arrays], schema=schema).serialize().to_pybytes()


def _read(path: Path) -> tuple[list, dict, int]:
    """Rows, metadata, and how many bytes at the end belong to no whole batch."""
    with open(path, "rb") as file:
        if file.read(len(_CONTINUATION)) != _CONTINUATION:
            raise ValueError(f"{path} is not a timeline: it does not begin like an Arrow stream")
        file.seek(0)
        return _parse(path, file.read())


def _parse(path: Path, data: bytes) -> tuple[list, dict, int]:
    import pyarrow as pa

    source = pa.BufferReader(data)
    broken = (pa.ArrowException, OSError, EOFError)
    try:
        schema = pa.ipc.read_schema(pa.ipc.read_message(source))
    except broken as error:
        raise ValueError(f"{path} is not a timeline: its Arrow schema cannot be read ({error})") from error
    meta = _checked_meta(path, schema)
    rows, good = [], source.tell()
    while good < len(data):
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
            batch.validate(full=True)
        except broken:
            break
        rows.append(_decode(path, batch, meta, rows))
        good = source.tell()
    rest = len(data) - good
    return rows, meta, 0 if data[good:] == _END_OF_STREAM else rest


def _checked_meta(path: Path, schema) -> dict:
    try:
        meta = json.loads((schema.metadata or {})[_META_KEY])
        version, layers, heads = meta["format"], meta["layers"], meta["heads"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is an Arrow stream but not a timeline: it carries no timeline metadata") from error
    if version != FORMAT:
        raise ValueError(f"{path} is a timeline of format {version}; this version reads format {FORMAT}")
    names = isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
    if not names or not isinstance(heads, int) or heads < 1 or not schema.equals(_schema(meta)):
        raise ValueError(f"{path} is an Arrow stream but not a timeline: its columns are not those of format {FORMAT}")
    return meta


def _decode(path: Path, batch, meta: dict, before: list) -> tuple[int, dict[str, np.ndarray]]:
    layers = len(meta["layers"])
    column = {name: batch.column(name) for name in batch.schema.names}
    steps = column["step"].to_numpy()
    whole = len(steps) == layers and np.array_equal(column["layer"].to_numpy(), np.arange(layers))
    if not whole or (steps != steps[0]).any() or (before and steps[0] <= before[-1][0]):
        raise ValueError(f"{path} is not a timeline: a batch is not one row per layer of one step, steps increasing")
    values = {}
    for name, shape in _signal_shapes(layers, meta["heads"]).items():
        array = column[name].flatten() if name in HEAD_SIGNALS else column[name]
        numbers = array.to_numpy(zero_copy_only=False)
        values[name] = numbers[0] if shape == () else numbers.reshape(shape)
    return int(steps[0]), values
