"""Files into numbered rows, and errors that name file, row and field."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record of a file; `number` counts records from 1, blank lines and the header left out."""

    path: Path
    number: int
    fields: Mapping[str, object]
    outer: str = ""

    def error(self, field: str, got: object, allowed: str) -> ValueError:
        """The one line that says what is wrong with this row."""
        shown = repr(got)
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        return ValueError(
            f"{self.path}: row {self.number}: field '{self.outer}{field}': got {shown}, allowed: {allowed}"
        )

    def text(self, field: str) -> str:
        """A required text, without outer spaces."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, value, "a non-empty text")
        return value.strip()

    def optional_text(self, field: str) -> str | None:
        """A text that may be absent or empty."""
        value = self.fields.get(field)
        return None if value is None or value == "" else self.text(field)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; absent is empty."""
        value = self.fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise self.error(field, value, "a list of non-empty texts")
        return tuple(item.strip() for item in value)

    def inner(self, field: str) -> "Row":
        """An object inside the row; its own errors name ``field.key``."""
        value = self.fields.get(field)
        if not isinstance(value, dict):
            raise self.error(field, value, "an object")
        return Row(path=self.path, number=self.number, fields=value, outer=f"{self.outer}{field}.")

    def template(self, field: str, text: str, subject: str) -> str:
        """Turn a whole prompt into a template: its last mention of the subject becomes ``{}``."""
        before, found, after = text.rpartition(subject)
        if not found or "{}" in text:
            raise self.error(field, text, f"a prompt that holds the subject {subject!r} and no '{{}}'")
        return before + "{}" + after

    def check_columns(self, required: Sequence[str]) -> None:
        """Raise if the row lacks columns, naming those missing and those there."""
        if missing := [name for name in required if name not in self.fields]:
            there = ", ".join(self.fields) or "none"
            raise ValueError(
                f"{self.path}: row {self.number}: missing columns: {', '.join(missing)}; columns there: {there}"
            )


def read_text(path: Path) -> str:
    r"""A text file in UTF-8 (with or without mark) or marked UTF-16, with ``\n`` line ends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding, or nothing in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got a byte that is not {encoding} at position {error.start}; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: got an empty file, allowed: at least one row")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> list[Row]:
    """The records of a csv, tsv, JSON (a list, or one object a line) or parquet file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, bad encoding or syntax, a row with too many or too few columns, no rows.
    """
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: got a file ending in {path.suffix!r}, allowed: {', '.join(SUFFIXES)}")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path}: got no rows, allowed: at least one")
    return rows


def read_json(path: Path) -> object:
    """One JSON document."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got broken JSON in line {error.lineno} ({error.msg}), allowed: JSON") from None


def _read_csv(path: Path) -> list[Row]:
    lines = csv.reader(
        io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    try:
        records = [record for record in lines if any(cell.strip() for cell in record)]
    except csv.Error as error:
        raise ValueError(f"{path}: got broken csv in line {lines.line_num} ({error}), allowed: csv") from None
    header = [name.strip() for name in records[0]]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: header: got column {twice[0]!r} twice, allowed: each column once")
    rows = []
    for number, record in enumerate(records[1:], start=1):
        if len(record) != len(header):
            raise ValueError(
                f"{path}: row {number}: got {len(record)} columns, allowed: {len(header)} as in the header; "
                "quote cells that hold commas"
            )
        rows.append(Row(path=path, number=number, fields=dict(zip(header, record, strict=True))))
    return rows


def _read_json(path: Path) -> list[Row]:
    text = read_text(path)
    try:
        whole = json.loads(text)
        records = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}: got broken JSON in line {error.lineno} ({error.msg}), allowed: JSON") from None
        records = _read_json_lines(path, text)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise Row(path=path, number=number, fields={}).error("(row)", record, "an object")
    return [Row(path=path, number=number, fields=record) for number, record in enumerate(records, start=1)]


def _read_json_lines(path: Path, text: str) -> list[Any]:
    records = []
    for line in text.split("\n"):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            row = Row(path=path, number=len(records) + 1, fields={})
            raise row.error("(row)", line, f"one JSON object a line ({error.msg})") from None
    return records


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        records = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: got {str(error).splitlines()[0]!r}, allowed: a parquet file") from None
    return [Row(path=path, number=number, fields=record) for number, record in enumerate(records, start=1)]
