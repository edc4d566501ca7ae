"""Rows of a file, one at a time, each with the place it came from: JSON, JSONL, CSV and Parquet.

A broken line is an error with file and line, never a skipped row. Files are read as streams (Parquet by row group), so their size does
not matter; only a JSON array is held in memory whole. Not here: what the fields mean (`messages.py`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.errors import DataError, did_you_mean

BUNDLED = {"tone": Path(__file__).parent / "sets" / "tone.jsonl"}
"""Data sets that come with phinetune, by name."""


@dataclass(frozen=True)
class Record:
    """One row: its fields, and `file:line` (`file[index]` where there are no lines) for messages."""

    fields: dict[str, Any]
    place: str


def data_file(path: str) -> Path:
    """The file that `path` names: itself, or a bundled set. Raises DataError if there is none, it is empty, or of an unknown type."""
    if path in BUNDLED:
        return BUNDLED[path]
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(
            f"{path}: no such file{did_you_mean(path, BUNDLED)}", f"give a file, or a bundled set: {', '.join(BUNDLED)}"
        )
    if file.is_dir():
        raise DataError(f"{path}: is a folder, not a file", f"give one file ({', '.join(READERS)})")
    if file.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: unknown type of file {file.suffix!r}", f"the ending must be one of {', '.join(READERS)}"
        )
    if file.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty", "each row must be one example")
    return file


def read_records(file: Path) -> Iterator[Record]:
    """Every row of `file` in order. Raises DataError at the first row that cannot be read, and if there is no row at all."""
    empty = True
    try:
        for record in READERS[file.suffix.lower()](file):
            empty = False
            yield record
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}", "save the file as UTF-8") from None
    except PermissionError:
        raise DataError(f"{file}: cannot be read", "check its permissions") from None
    if empty:
        raise DataError(f"{file}: holds no rows", "each row must be one example")


def _jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f"{file}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8 text: {error.reason}", "save the file as UTF-8") from None
                except json.JSONDecodeError as error:
                    message = f"{place}: not valid JSON: {error.msg} at column {error.colno}"
                    raise DataError(message, "each line must be one JSON object") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                    raise DataError(f"{place}: not usable JSON: {str(error).split(';')[0]}") from None
                yield _record(row, place)


def _json(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as stream:
        text = stream.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, one a line: JSONL under another name
            yield from _jsonl(file)
            return
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not usable JSON: {str(error).split(';')[0]}") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{file}: must be a JSON list of objects, found {type(rows).__name__}",
            "put the rows into a list, or use JSONL",
        )
    for index, row in enumerate(rows):
        yield _record(row, f"{file}[{index}]")


def _record(row: Any, place: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: must be a JSON object, found {type(row).__name__}", 'each row must look like {"field": "value"}'
        )
    return Record(row, place)


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        columns: list[str] = []
        line = 1  # where the row begins; a quoted value may go over several lines
        try:
            for row in reader:
                place, line = f"{file}:{line}", reader.line_num + 1
                if not row:
                    continue
                if not columns:
                    columns = row
                    if twice := next((c for c in columns if columns.count(c) > 1), None):
                        raise DataError(f'{place}: two columns are called "{twice}"', "rename one of them")
                    continue
                if len(row) > len(columns):
                    raise DataError(
                        f"{place}: more values than the {len(columns)} columns of the first line",
                        'put text with commas in "quotes"',
                    )
                yield Record(dict(zip(columns, row, strict=False)), place)
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            index = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Record({k: v for k, v in row.items() if v is not None}, f"{file}[{index}]")
                    index += 1
    except PermissionError:
        raise
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a valid Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
