"""Reading files of records, with the place of every record kept for error messages.

:func:`read_records` turns a JSON list, a JSONL file or a Parquet table into :class:`Record` objects; their
typed getters raise one :class:`~nemo_ampo.errors.DataError` that names file, row and field. Nothing here
knows what a record means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from nemo_ampo.errors import DataError
from nemo_ampo.files import disk_errors, place_of, strict_json
from nemo_ampo.text import one_line, utf8_safe

SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Record:
    """One record of a file, or a nested object of one. An absent field and a null are the same thing.

    Attributes:
        where: file and place in it, e.g. ``rows.jsonl, line 3``.
        values: the decoded object.
        prefix: path of a nested object inside its record, e.g. ``state.``; empty at the top.
    """

    where: str
    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, key: str, problem: str) -> DataError:
        """The error to raise about one field."""
        return DataError(f"{self.where}, field '{one_line(self.prefix + key)}': {problem}")

    def only(self, known: Iterable[str]) -> None:
        """Refuse fields nobody will read: a misspelt optional one would be lost without a word."""
        known = sorted(known)
        for key in self.values:
            if key not in known:
                raise self.error(key, f"unknown field; expected some of {', '.join(known)}")

    def has(self, key: str) -> bool:
        """Whether the field is present and not null."""
        return self.values.get(key) is not None

    def _required(self, key: str) -> Any:
        if not self.has(key):
            raise self.error(key, "is missing")
        return self.values[key]

    def text(self, key: str, *, blank: bool = False) -> str:
        """A string; of white space only (or empty) only where ``blank`` allows it."""
        value = self._required(key)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {_show(value)}")
        if not blank and not value.strip():
            raise self.error(key, "is blank")
        self._check_unicode(key, value)
        return value

    def name(self, key: str) -> str:
        """Of a speaker: a string on one line, since it begins the lines of a dialogue."""
        value = self.text(key)
        if not value.isprintable():
            raise self.error(key, f"{value!r} holds a line break or control character; write it as one line")
        return value

    def _check_unicode(self, key: str, value: str) -> None:
        """JSON can spell half a character; no tokenizer, request or file could carry it later."""
        if value != utf8_safe(value):
            raise self.error(key, "holds a lone surrogate (half of a character written as \\ud800 to \\udfff)")

    def optional_text(self, key: str) -> str | None:
        """A string, or None when absent, null or empty."""
        return (self.text(key, blank=True) or None) if self.has(key) else None

    def integer(self, key: str, low: int | None = None, high: int | None = None) -> int:
        """A whole number within ``[low, high]``."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected a whole number, got {_show(value)}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.error(key, f"expected {_span(low, high)}, got {value}")
        return value

    def number(self, key: str, low: float | None = None, high: float | None = None) -> float:
        """A finite number within ``[low, high]``."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            raise self.error(key, f"expected a number, got {_show(value)}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.error(key, f"expected {_span(low, high)}, got {value}")
        return float(value)

    def texts(self, key: str, count: int | None = None) -> tuple[str, ...]:
        """A list of strings, none of them blank, of length ``count`` if given."""
        value = self._required(key)
        if not isinstance(value, list):
            raise self.error(key, f"expected a list of strings, got {_show(value)}")
        for i, item in enumerate(value):
            if not isinstance(item, str) or not item.strip():
                raise self.error(f"{key}[{i}]", f"expected a string that is not blank, got {_show(item)}")
            self._check_unicode(f"{key}[{i}]", item)
        if count is not None and len(value) != count:
            raise self.error(key, f"expected {count} strings, got {len(value)}")
        return tuple(value)

    def child(self, key: str) -> Record:
        """A nested object."""
        value = self._required(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected an object, got {_show(value)}")
        return Record(self.where, value, f"{self.prefix}{key}.")

    def children(self, key: str) -> tuple[Record, ...]:
        """A list of nested objects."""
        value = self._required(key)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise self.error(key, f"expected a list of objects, got {_show(value)}")
        return tuple(Record(self.where, item, f"{self.prefix}{key}[{i}].") for i, item in enumerate(value))


def _span(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"a value from {low} to {high}"


def _show(value: Any) -> str:
    """A value short enough for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_record(value: Any, where: str) -> Record:
    """Wrap a decoded JSON value that has to be an object."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object, got {_show(value)}")
    return Record(where, value)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; a byte order mark is dropped."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error


def parse_json(text: str, where: str) -> Any:
    """Decode JSON; a key given twice is an error, because the first value would be lost."""
    try:
        return strict_json(text, finite=False)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def read_json(path: Path) -> Any:
    """The decoded content of a JSON file."""
    return parse_json(read_text(path), str(path))


def read_records(path: str | Path) -> list[Record]:
    """All records of a file.

    Args:
        path: ``.json`` (a list of objects), ``.jsonl`` (one object a line, blank lines allowed) or
            ``.parquet``.

    Returns:
        One record per row, in file order, never an empty list. Rows of lists and tables count from 1.

    Raises:
        DataError: the file is missing, unreadable, of another kind, or holds no rows.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows, got {_show(rows)}")
        records = [as_record(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
    elif path.suffix == ".jsonl":
        # Not splitlines: JSON strings may hold U+2028 and its kin unescaped, which are no line ends in JSONL.
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(read_text(path).split("\n"), start=1)]
        records = [as_record(parse_json(line, where), where) for where, line in lines if line.strip()]
    else:
        records = [as_record(row, f"{path}, row {i}") for i, row in enumerate(_read_parquet(path), start=1)]
    if not records:
        raise DataError(f"{path}: holds no rows")
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8 ({error})") from None


def write_json(value: Any, path: str | Path) -> None:
    """Write one JSON document; the file appears complete or not at all."""
    _publish_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", Path(path))


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a JSON list or as JSONL, whichever the suffix says.

    Raises:
        DataError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".json":
        write_json([dict(row) for row in rows], path)
    elif path.suffix == ".jsonl":
        _publish_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
    else:
        raise DataError(f"{path}: expected a file ending in .json or .jsonl")


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its own name when the block ends well, and is removed otherwise.

    Several ranks may publish the same file at once: each writes a file of its own, the last one stays.
    """
    with disk_errors(f"cannot write {path}"):
        place = place_of(path)
        part = place.with_name(f".{place.name}.{uuid4().hex}.part")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


def _publish_text(text: str, path: Path) -> None:
    with published(path) as part:
        part.write_text(text, encoding="utf-8")
