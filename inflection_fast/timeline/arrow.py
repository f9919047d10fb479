"""A timeline as a stream of Arrow record batches, one for each measured step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .signals import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS, signal_shapes

__all__ = ["END_OF_STREAM", "FORMAT", "encode", "parse", "read", "schema_of"]

FORMAT = 3
_ABSENT = {2: ("missing_ranks",), 3: ()}  # what files of each format that is read do not have
_META_KEY = b"inflection_fast"
_CONTINUATION = b"\xff\xff\xff\xff"  # what every message of an Arrow stream begins with
END_OF_STREAM = _CONTINUATION + b"\x00\x00\x00\x00"


def schema_of(meta: dict):
    """The columns of a timeline, with its metadata."""
    import pyarrow as pa

    per_head = pa.list_(pa.field("item", pa.float32(), nullable=False), meta["heads"])
    fields = [pa.field("step", pa.int64(), nullable=False), pa.field("layer", pa.int32(), nullable=False)]
    fields += [pa.field(name, per_head, nullable=False) for name in HEAD_SIGNALS]
    absent = _ABSENT[meta["format"]]
    scalars = (name for name in LAYER_SIGNALS + STEP_SIGNALS if name not in absent)
    fields += [pa.field(name, pa.float64(), nullable=False) for name in scalars]
    return pa.schema(fields, metadata={_META_KEY: json.dumps(meta)})


def encode(row: tuple[int, dict[str, np.ndarray]], schema) -> bytes:
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


def read(path: Path) -> tuple[list, dict, int]:
    """Rows, metadata, and how many bytes at the end belong to no whole batch."""
    with open(path, "rb") as file:
        if file.read(len(_CONTINUATION)) != _CONTINUATION:
            raise ValueError(f"{path} is not a timeline: it does not begin like an Arrow stream")
        file.seek(0)
        return parse(path, file.read())


def parse(path: Path, data: bytes) -> tuple[list, dict, int]:
    """As `read`, from the bytes that stand at `path`."""
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
    return rows, meta, 0 if data[good:] == END_OF_STREAM else rest


def _checked_meta(path: Path, schema) -> dict:
    try:
        meta = json.loads((schema.metadata or {})[_META_KEY])
        version, layers, heads = meta["format"], meta["layers"], meta["heads"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is an Arrow stream but not a timeline: it carries no timeline metadata") from error
    if not isinstance(version, int) or version not in _ABSENT:
        raise ValueError(f"{path} is a timeline of format {version}; this version reads format {FORMAT}")
    names = isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
    if not names or not isinstance(heads, int) or heads < 1 or not schema.equals(schema_of(meta)):
        raise ValueError(f"{path} is an Arrow stream but not a timeline: its columns are not those of format {version}")
    return meta


def _decode(path: Path, batch, meta: dict, before: list) -> tuple[int, dict[str, np.ndarray]]:
    layers = len(meta["layers"])
    column = {name: batch.column(name) for name in batch.schema.names}
    steps = column["step"].to_numpy()
    whole = len(steps) == layers and np.array_equal(column["layer"].to_numpy(), np.arange(layers))
    if not whole or (steps != steps[0]).any() or (before and steps[0] <= before[-1][0]):
        raise ValueError(f"{path} is not a timeline: a batch is not one row per layer of one step, steps increasing")
    values = {}
    for name, shape in signal_shapes(layers, meta["heads"]).items():
        if name not in column:
            values[name] = np.full(shape, np.nan)
            continue
        array = column[name].flatten() if name in HEAD_SIGNALS else column[name]
        numbers = array.to_numpy(zero_copy_only=False)
        values[name] = numbers[0] if shape == () else numbers.reshape(shape)
    return int(steps[0]), values
