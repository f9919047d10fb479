"""A timeline as a stream of Arrow record batches, one for each measured step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .columns import Column
from .older import columns_of
from .signals import shapes_of, sizes_of, stored

__all__ = ["END_OF_STREAM", "FORMAT", "columns_in", "encode", "parse", "read", "schema_of"]

FORMAT = 4
_OLDER = (2, 3)
_META_KEY = b"inflection_fast"
_CONTINUATION = b"\xff\xff\xff\xff"  # what every message of an Arrow stream begins with
END_OF_STREAM = _CONTINUATION + b"\x00\x00\x00\x00"


def columns_in(meta: dict) -> dict[str, Column]:
    """The columns that the metadata of a timeline describe."""
    if meta["format"] in _OLDER:
        return columns_of(meta["format"])
    return {name: Column.from_dict(saved) for name, saved in meta["columns"].items()}


def schema_of(meta: dict):
    """The columns of a timeline, with its metadata and each with its own."""
    import pyarrow as pa

    columns, nullable = columns_in(meta), meta["format"] not in _OLDER
    fields = [pa.field("step", pa.int64(), nullable=False), pa.field("layer", pa.int32(), nullable=False)]
    for name, column in columns.items():
        kind = pa.float32() if stored(column) is np.float32 else pa.float64()
        if stored(column) is np.float32:
            places = math.prod(shapes_of({name: column}, meta)[name]) // (
                len(meta["layers"]) if column.axes[0] == "layer" else 1
            )
            kind = pa.list_(pa.field("item", kind, nullable=nullable), places)
            field = pa.field(name, kind, nullable=False)
        else:
            field = pa.field(name, kind, nullable=nullable)
        said = {"unit": column.unit, "axes": " ".join(column.axes), "label": column.label, "quantity": column.quantity}
        fields.append(field.with_metadata(said | {"explanation": column.explanation}) if nullable else field)
    return pa.schema(fields, metadata={_META_KEY: json.dumps(meta)})


def encode(row: tuple[int, Mapping[str, np.ma.MaskedArray]], schema, layers: int) -> bytes:
    """One row of the timeline as one encapsulated record batch message."""
    import pyarrow as pa

    step, values = row
    arrays = [pa.array(np.full(layers, step, np.int64)), pa.array(np.arange(layers, dtype=np.int32))]
    for field in schema:
        if field.name in ("step", "layer"):
            continue
        value, mask = np.ma.getdata(values[field.name]), np.ma.getmaskarray(values[field.name])
        places = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1
        # Values without an axis of layers are repeated in the row of every layer.
        flat, gaps = (np.broadcast_to(x.reshape(-1, places), (layers, places)).ravel() for x in (value, mask))
        array = pa.array(flat, mask=gaps) if gaps.any() and _nullable(field) else pa.array(flat)
        if pa.types.is_fixed_size_list(field.type):
            array = pa.FixedSizeListArray.from_arrays(array, type=field.type)
        arrays.append(array)
    return pa.record_batch(arrays, schema=schema).serialize().to_pybytes()


def _nullable(field) -> bool:
    return field.nullable or (hasattr(field.type, "value_field") and field.type.value_field.nullable)


def read(path: Path) -> tuple[list, dict, int]:
    """Rows, metadata, and the number of bytes of an incomplete batch at the end."""
    with open(path, "rb") as file:
        if file.read(len(_CONTINUATION)) != _CONTINUATION:
            raise ValueError(f"{path} is not a timeline: it does not begin like an Arrow stream")
        file.seek(0)
        return parse(path, file.read())


def parse(path: Path, data: bytes) -> tuple[list, dict, int]:
    """As `read`, from the bytes of `path`."""
    import pyarrow as pa

    source = pa.BufferReader(data)
    broken = (pa.ArrowException, OSError, EOFError)
    try:
        schema = pa.ipc.read_schema(pa.ipc.read_message(source))
    except broken as error:
        raise ValueError(f"{path} is not a timeline: its Arrow schema cannot be read ({error})") from error
    meta, columns = _checked_meta(path, schema)
    rows: list[tuple[int, dict]] = []
    good = source.tell()
    while good < len(data):
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
            batch.validate(full=True)
        except broken:
            break
        rows.append(_decode(path, batch, meta, columns, rows))
        good = source.tell()
    rest = len(data) - good
    return rows, meta, 0 if data[good:] == END_OF_STREAM else rest


def _checked_meta(path: Path, schema) -> tuple[dict, dict[str, Column]]:
    try:
        meta = json.loads((schema.metadata or {})[_META_KEY])
        version, layers, heads = meta["format"], meta["layers"], meta["heads"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is an Arrow stream but not a timeline: it carries no timeline metadata") from error
    if not isinstance(version, int) or version not in (*_OLDER, FORMAT):
        raise ValueError(f"{path} is a timeline of format {version}; this version reads format {FORMAT}")
    names = isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
    try:
        fits = names and isinstance(heads, int) and heads >= 1 and min(sizes_of(meta).values()) >= 1
        fits = fits and schema.equals(schema_of(meta))
        columns = columns_in(meta) if fits else {}
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is an Arrow stream but not a timeline: its columns are not those of format {version}")
    return meta, columns


def _decode(path: Path, batch, meta: dict, columns: dict[str, Column], before: list) -> tuple[int, dict]:
    layers = len(meta["layers"])
    column = {name: batch.column(name) for name in batch.schema.names}
    steps = column["step"].to_numpy()
    whole = len(steps) == layers and np.array_equal(column["layer"].to_numpy(), np.arange(layers))
    if not whole or (steps != steps[0]).any() or (before and steps[0] <= before[-1][0]):
        raise ValueError(f"{path} is not a timeline: a batch is not one row per layer of one step, steps increasing")
    values = {}
    for name, shape in shapes_of(columns, meta).items():
        array = column[name].flatten() if hasattr(column[name], "flatten") else column[name]
        numbers = array.to_numpy(zero_copy_only=False)
        if meta["format"] in _OLDER:  # where NaN also means not measured
            mask = np.isnan(numbers)
        else:
            mask = (
                ~array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else np.zeros(len(numbers), bool)
            )
        places = math.prod(shape)
        values[name] = np.ma.array(numbers[:places].reshape(shape), mask=mask[:places].reshape(shape))
    return int(steps[0]), values
