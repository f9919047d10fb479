"""The rows of a data set, from a local file or the hub, without changes.

A file that can be read in two ways is an error that names the line and the setting that decides.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from inflection_fast.run.compressed import COMPRESSED, DAMAGED, binary
from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError

__all__ = ["FORMATS", "Rows", "column_names", "load_rows"]

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_NO_COLUMN = "\0"  # a name that no column has


class MissingColumn(UserError):
    """Columns are missing; `present` are the columns that the data set has."""

    def __init__(self, source: str, missing: list[str], present: list[str]):
        super().__init__(f"{source}: there is no column {', '.join(map(repr, missing))}; it has {', '.join(present)}")
        self.present = list(present)


@dataclass(frozen=True)
class Rows:
    """Columns of equal length, and where each row is in its source.

    Args:
        source: the file or data set, for messages
        columns: name of the column -> its values
        unit: what `places` counts, "line" or "row", from 1
        places: one number per row
        names: label names that the source declares (ClassLabel), by column
    """

    source: str
    columns: dict[str, list[Any]]
    unit: str
    places: Sequence[int]
    names: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.places)

    def where(self, rows: list[int]) -> str:
        """The places of these rows for a message, at most five of them by number."""
        numbers = ", ".join(str(self.places[row]) for row in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        return f"{self.unit}{'s' if len(rows) > 1 else ''} {numbers}{more}"

    def select(self, rows: list[int]) -> Rows:
        """These rows, in this order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Rows(self.source, columns, self.unit, [self.places[row] for row in rows], self.names)


def load_rows(config: DataConfig, wanted: list[str], test: str | None = None) -> Rows:
    """The wanted columns of the data set, or of the file or hub split `test`.

    UserError for a file that does not exist, cannot be read, or lacks a column.
    """
    source = config.path if test is None else test
    path = Path(source).expanduser()
    kind = _kind(source, path)
    if kind is None:
        return _from_hub(config, wanted, test)
    if not path.is_file():
        raise UserError(f"{source}: there is no such file")
    read = {".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet, ".txt": _plain_text}.get(kind, _json)
    try:
        try:
            if kind != ".parquet":
                _refuse_utf16(source, path, config)
            rows = read(source, path, kind, config, wanted)
        except UnicodeError as error:  # the advice reads the file again, and may find damage further on
            raise UserError(_encoding_advice(source, path, config.encoding)) from error
    except DAMAGED as error:
        raise UserError(f"{source}: the compressed file is damaged ({error})") from error
    except RecursionError as error:
        raise UserError(f"{source}: the JSON in it is nested too deep") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{source}: the file is damaged ({error})") from error
    if not rows.places:
        raise UserError(f"{source}: there is no row in it")
    return rows


def column_names(config: DataConfig) -> list[str]:
    """The columns of the data set, in order. UserError as in `load_rows`."""
    try:
        load_rows(config, [_NO_COLUMN])
    except MissingColumn as error:
        return error.present
    raise AssertionError("a column without a name was found")


def _kind(source: str, path: Path) -> str | None:
    """The suffix that decides how a local file is read; None for a data set of the hub, or its folder."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    if suffixes and suffixes[-1] in FORMATS:
        return suffixes[-1]
    if path.is_file():
        raise UserError(f"{source}: the name must end in one of {', '.join(FORMATS)}")
    if source.startswith((".", "/", "~")) and not path.is_dir():
        raise UserError(f"{source}: there is no such file or folder")
    return None


# ---- bytes and text --------------------------------------------------------------------------------------------------


@contextmanager
def _text(path: Path, encoding: str | None) -> Iterator[IO[str]]:
    """The characters of a file, with its line ends."""
    with binary(path) as file, io.TextIOWrapper(file, encoding=encoding or "utf-8-sig", newline="") as text:
        yield text


def _encoding_advice(source: str, path: Path, encoding: str | None) -> str:
    """A message with the line that cannot be decoded, and the encoding that fits."""
    with binary(path) as file:
        head = file.read(4096)
    if guess := _utf16(head):
        return f"{source}: the file is not {encoding or 'UTF-8'}; it looks like UTF-16: write `encoding: {guess}`"
    if encoding is not None:
        return f"{source}: the file is not {encoding}: name another `encoding:`, or none for UTF-8"
    number, line = _first_not_utf8(path)
    guess = "cp1252" if any(0x80 <= byte < 0xA0 for byte in line) else "latin-1"
    name = {"latin-1": "Latin-1", "cp1252": "Windows-1252"}[guess]
    return f"{source}, line {number}: the file is not UTF-8; it looks like {name}: write `encoding: {guess}`"


def _first_not_utf8(path: Path) -> tuple[int, bytes]:
    """The number and the bytes of the first line that is not UTF-8."""
    with binary(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number, line
    raise AssertionError(f"{path} is UTF-8")


def _utf16(head: bytes) -> str | None:
    """The name of the UTF-16 encoding that these bytes look like, with or without a byte order mark; else None."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _refuse_utf16(source: str, path: Path, config: DataConfig) -> None:
    """UserError for UTF-16 without a byte order mark, which decodes as UTF-8 into text with zero characters."""
    if config.encoding is None:
        with binary(path) as file:
            if b"\0" in (head := file.read(4096)) and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(
                    f"{source}: the file holds zero bytes; it looks like {'UTF-16' if _utf16(head) else 'no text'}: "
                    f"write `encoding: {_utf16(head) or '...'}`"
                )


# ---- comma- and tab-separated ----------------------------------------------------------------------------------------


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit of Python's csv module, which is 131072 characters in a field."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimited(source: str, path: Path, kind: str, config: DataConfig, wanted: list[str]) -> Rows:
    delimiter = config.delimiter or ("\t" if kind == ".tsv" else ",")
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    places: list[int] = []
    uneven: list[tuple[int, int]] = []  # line, number of fields
    begin = 1
    with _text(path, config.encoding) as file, _fields_of_any_length():
        quoting: Literal[0, 3] = csv.QUOTE_NONE if config.quoting == "none" else csv.QUOTE_MINIMAL
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            if not header:
                raise UserError(f"{source}: the first line must hold the names of the columns; it is empty")
            indices = _indices(source, header, wanted, delimiter)
            begin = reader.line_num + 1
            for row in reader:
                line, begin = begin, reader.line_num + 1
                if not row or (len(row) == 1 < len(header) and not row[0].strip()):  # an empty line
                    continue
                if len(row) != len(header):
                    uneven.append((line, len(row)))
                    continue
                if delimiter == "\t" and config.quoting is None and begin - line > 1:
                    raise UserError(
                        f"{source}, line {line}: a quotation mark joins this line with the next one: write"
                        " `quoting: none` if quotation marks are part of the text, or `quoting: standard`"
                    )
                places.append(line)
                for name, index in indices.items():
                    columns[name].append(row[index])
        except csv.Error as error:
            raise UserError(
                f"{source}, line {begin}: a quotation mark opens a field and none closes it ({error}): write"
                " `quoting: none` if quotation marks are part of the text"
            ) from error
    if uneven:
        _refuse_uneven(source, header, delimiter, uneven, len(places))
    if not places:
        raise UserError(f"{source}: there is no row in it, only the names of the columns")
    return Rows(source, columns, "line", places, {})


def _indices(source: str, header: list[str], wanted: list[str], delimiter: str) -> dict[str, int]:
    """The position of each wanted column."""
    missing = [name for name in wanted if name not in header]
    if missing:
        for other, words in DELIMITERS.items():
            if other != delimiter and set(wanted) <= {name.strip('"') for name in delimiter.join(header).split(other)}:
                written = "\\t" if other == "\t" else other
                raise UserError(f'{source}: its names are separated by {words}: write `delimiter: "{written}"`')
        raise MissingColumn(source, missing, header)
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise UserError(f"{source}: column {twice[0]!r} occurs {header.count(twice[0])} times: rename all but one")
    return {name: header.index(name) for name in wanted}


def _refuse_uneven(source: str, header: list[str], delimiter: str, uneven: list[tuple[int, int]], even: int) -> None:
    line, count = uneven[0]
    names = f"{len(header)} ({', '.join(header)})" if len(header) <= 8 else str(len(header))
    found = f"{source}, line {line}: {count} field{'s' * (count != 1)}, and the header has {names}"
    if not even and all(one == count for _, one in uneven) and count == len(header) + 1:
        raise UserError(f"{found}; so have all rows: name the column that is missing in the header")
    others = f" ({len(uneven) - 1} more rows differ from the header)" if len(uneven) > 1 else ""
    raise UserError(f"{found}{others}: put quotation marks around a text that holds {delimiter!r}")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json(source: str, path: Path, kind: str, config: DataConfig, wanted: list[str]) -> Rows:
    if kind == ".json":
        with _text(path, config.encoding) as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Extra data"):  # "Extra data": it may hold one object per line
                    raise UserError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from error
            else:
                rows = _list_in(source, content, config, wanted)
                return _from_objects(source, rows, "row", range(1, len(rows) + 1), wanted)
    if config.field is not None:
        raise UserError(f"{source}: `field` is for a file that is one JSON object; this one has an object per line")
    objects, places = [], []
    with _text(path, config.encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    objects.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}, line {number}: not JSON ({error.msg})") from error
                places.append(number)
    return _from_objects(source, objects, "line", places, wanted)


def _list_in(source: str, content: Any, config: DataConfig, wanted: list[str]) -> list[Any]:
    """The list of rows in a JSON file: the whole file, the list under `field`, or the only such list."""
    if config.field is None and isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{source}: it must hold a list of objects, or one object per line")
    lists = [key for key, value in content.items() if _are_objects(value)]
    if config.field is not None:
        if config.field not in lists:
            raise UserError(f"{source}: {config.field!r} is not a list of objects; lists of objects: {lists or 'none'}")
        return content[config.field]
    if len(lists) == 1:
        return content[lists[0]]
    if lists:
        raise UserError(f"{source}: it holds several lists of objects: name one of {lists} as `field:`")
    if set(wanted) <= content.keys():  # a single row
        return [content]
    raise UserError(f"{source}: it must hold a list of objects; it holds one object with {', '.join(content)}")


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _from_objects(source: str, objects: list[Any], unit: str, places: Sequence[int], wanted: list[str]) -> Rows:
    for place, row in zip(places, objects, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{source}, {unit} {place}: expected an object with the columns, got {type(row).__name__}")
    present = list(dict.fromkeys(key for row in objects for key in row))
    if objects and (missing := [name for name in wanted if name not in present]):
        raise MissingColumn(source, missing, present)
    return Rows(source, {name: [row.get(name) for row in objects] for name in wanted}, unit, places, {})


# ---- Parquet, plain text, the hub ------------------------------------------------------------------------------------


def _parquet(source: str, path: Path, kind: str, config: DataConfig, wanted: list[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # not read_table, which takes folder names for columns
            if missing := [name for name in wanted if name not in file.schema_arrow.names]:
                raise MissingColumn(source, missing, file.schema_arrow.names)
            table = file.read(columns=wanted)
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: the file is not Parquet, or is damaged") from error
    columns = {name: table.column(name).to_pylist() for name in wanted}
    names = _declared(Features.from_arrow_schema(table.schema))
    return Rows(source, columns, "row", range(1, table.num_rows + 1), names)


def _plain_text(source: str, path: Path, kind: str, config: DataConfig, wanted: list[str]) -> Rows:
    others = [name for name in wanted if name != config.text]
    if others == [_NO_COLUMN]:
        raise MissingColumn(source, others, [config.text])
    if others:
        raise UserError(f"{source}: a .txt file holds texts only, one per line; it has no column {others[0]!r}")
    with _text(path, config.encoding) as file:
        lines = [line.rstrip("\r\n") for line in file]
    return Rows(source, {config.text: lines}, "line", range(1, len(lines) + 1), {})


def _from_hub(config: DataConfig, wanted: list[str], test: str | None) -> Rows:
    import datasets

    name, split = str(Path(config.path).expanduser()), config.split if test is None else test
    try:
        rows = datasets.load_dataset(name, config.name, split=split)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{config.path}: the data set could not be read: {reason}") from error
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise MissingColumn(config.path, missing, rows.column_names)
    columns = {name: rows[name][:] for name in wanted}
    return Rows(test or config.path, columns, "row", range(1, len(rows) + 1), _declared(rows.features))


def _declared(features: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(one.names) for name, one in features.items() if getattr(one, "names", None)}
