"""Documents out of text files: `.jsonl`, `.jsonl.zst`, `.jsonl.gz` (one JSON object a line), `.parquet` (one row each)
and `.txt` (one document).

Files stream through in small blocks: memory holds one line, whatever the size of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prismoe.data.blocks import MAX_DOCUMENT, read_blocks, read_lines
from prismoe.errors import InputError

_quick_loads: Callable[[bytes], Any] = json.loads
with suppress(ImportError):  # an extra: several times faster; what it refuses is read again by json
    from orjson import loads as _quick_loads

__all__ = ["SUFFIXES", "BadDocument", "Document", "read_documents"]

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")
AUTO_FIELDS = ("content", "text")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    `num_bytes` of UTF-8; `where` is file:line (file:row of a table); `position` bytes of the file read by then;
    `number` counts the file's records from 0 (blank lines are none; bad and unselected documents are) and is, with the
    file, the document's identity; `labels` are the values of the fields that were asked for.
    """

    text: str
    num_bytes: int
    where: str
    position: int
    number: int
    labels: tuple[str, ...] = ()


class BadDocument(InputError):
    """One document that cannot be read, in a file that can. `reason` is one of a few words, to count by."""

    def __init__(self, found: str, *, reason: str, where: str, needed: str = "", hint: str = "") -> None:
        super().__init__(found, where=where, needed=needed, hint=hint)
        self.reason = reason
        self.number = -1  # set by the reader, which counts


def read_documents(
    path: Path,
    *,
    field: str = "auto",
    select: Mapping[str, Sequence[str]] | None = None,
    labels: Sequence[str] = (),
    start: int = 0,
    on_bad: Callable[[BadDocument], None] | None = None,
) -> Iterator[Document]:
    """Every document of `path`, in order; empty ones too. Blank lines are skipped, a byte order mark is dropped.

    Args:
        path: a file with one of `SUFFIXES`.
        field: the key of the text in each JSON object or row, `a.b` for `b` within `a`; `auto` takes `content`, else
            `text`. A `.txt` file has no fields.
        select: only documents whose field (the key) has one of these values.
        labels: fields whose values the documents carry.
        start: the first document's `number`; those before are passed over without being looked into.
        on_bad: called with each document that cannot be read, instead of raising it.

    Raises:
        InputError: not readable, damaged, a file that expands more than 200-fold, or a file without documents.
        BadDocument: not UTF-8, invalid JSON, a field that is missing or no text, half of a surrogate pair, or a
            document over 64 MiB; the message names file and line.
    """
    wanted = [(name, frozenset(values)) for name, values in (select or {}).items()]
    fields = (*labels, *(name for name, _ in wanted))
    found = False
    for record in _records(Path(path), field, fields, start):
        found = True
        if isinstance(record, BadDocument):
            if on_bad is None:
                raise record
            on_bad(record)
        elif isinstance(record, Document) and all(
            value in values for value, (_, values) in zip(record.labels[len(labels) :], wanted, strict=True)
        ):
            yield replace(record, labels=record.labels[: len(labels)]) if wanted else record
    if not found:
        raise InputError("no documents in it", where=str(path))


def _records(path: Path, field: str, fields: tuple[str, ...], start: int) -> Iterator[Document | BadDocument | None]:
    """Documents and bad ones; None for one that was passed over."""
    if path.suffix == ".parquet":
        from prismoe.data.parquet import read_rows

        rows = read_rows(path, field=field, labels=fields, start=start)
    else:
        rows = _text_file(path) if path.suffix == ".txt" else _json_lines(path)
    for number, (value, where, position) in enumerate(rows):
        if number < start:
            yield None
            continue
        try:
            if isinstance(value, BadDocument):
                raise value
            text, labels = value if isinstance(value, tuple) else _content(value, field, fields, where, number == 0)
            yield Document(text, _num_bytes(text, where), where, position, number, labels)
        except BadDocument as error:
            error.number = number
            yield error


Row = tuple[bytes | tuple[str, tuple[str, ...]] | BadDocument, str, int]
"""What a file gives for one record: bytes of JSON, or (text, labels), or what is wrong; file:line; position."""


def _text_file(path: Path) -> Iterator[Row]:
    data, position = bytearray(), 0
    for block, position in read_blocks(path):
        data += block
        if len(data) > MAX_DOCUMENT:
            yield too_long(str(path)), str(path), position
            return
    try:
        text = decode(bytes(data.removeprefix(_BOM)), str(path))
    except BadDocument as error:
        yield error, str(path), position
        return
    if text:
        yield (text, ()), str(path), position


def _json_lines(path: Path) -> Iterator[Row]:
    for line_number, (line, position) in enumerate(read_lines(path), start=1):
        where = f"{path}:{line_number}"
        if line is None:
            yield too_long(where), where, position
        elif line and not line.isspace():
            yield line, where, position


def _content(line: bytes, field: str, fields: tuple[str, ...], where: str, first: bool) -> tuple[str, tuple[str, ...]]:
    row = read_object(line, where, first=first)
    text = row.get(field) if field != "auto" else row.get("content", row.get("text"))
    if not isinstance(text, str):
        name = next((name for name in AUTO_FIELDS if name in row), field) if field == "auto" else field
        text = as_text(look_up(row, name, where, hint="name the field that holds the text"), name, where)
    return text, tuple(as_label(look_up(row, name, where), name, where) for name in fields)


def read_object(line: bytes, where: str, *, first: bool = False) -> dict[str, Any]:
    """The JSON object of one line; the `first` of a file may begin with a byte order mark."""
    line = line.removeprefix(_BOM) if first else line
    try:
        row = _quick_loads(line)
    except (ValueError, RecursionError):
        row = _careful_loads(line, where)
    if not isinstance(row, dict):
        raise BadDocument(
            f"a JSON {type(row).__name__}", reason="not an object", where=where, needed="one JSON object a line"
        )
    return row


def as_text(value: Any, field: str, where: str) -> str:
    """A field's value where text must be."""
    if not isinstance(value, str):
        name = "of the text" if field == "auto" else field
        raise BadDocument(
            f"field {name} is a {type(value).__name__}", reason="not text", where=where, needed="a string"
        )
    return value


def as_label(value: Any, name: str, where: str) -> str:
    """A field's value as text to select by."""
    if not isinstance(value, str | int):
        raise BadDocument(f"field {name} is a {type(value).__name__}", reason="not a label", where=where)
    return str(value)


def _careful_loads(line: bytes, where: str) -> Any:
    try:
        return json.loads(decode(line, where))
    except json.JSONDecodeError as error:
        raise BadDocument(
            f"invalid JSON ({error.msg} at column {error.colno})", reason="invalid JSON", where=where
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadDocument):
            raise
        raise BadDocument(
            f"JSON that cannot be read ({type(error).__name__})", reason="invalid JSON", where=where
        ) from error


def look_up(row: dict[str, Any], field: str, where: str, *, hint: str = "") -> Any:
    """The value of a field: of the very name, or of a path `a.b` into objects."""
    if field in row:
        return row[field]
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(sorted(row)[:8]) or "none"
            named = " or ".join(AUTO_FIELDS) if field == "auto" else field
            raise BadDocument(
                f"no field {named} (fields: {keys})",
                reason="missing field",
                where=where,
                hint=hint,
            )
        value = value[name]
    return value


def _num_bytes(text: str, where: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadDocument(
            "half of a surrogate pair, which is no character", reason="not a character", where=where
        ) from error


def too_long(where: str) -> BadDocument:
    """The complaint about a document that no tokenizer could hold."""
    return BadDocument(
        f"a document over {MAX_DOCUMENT >> 20} MiB",
        reason="too long",
        where=where,
        hint="cut it into parts, for instance chapters",
    )


def decode(data: bytes, where: str) -> str:
    """Text of UTF-8, or a `BadDocument` with the offset of the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(
            f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            reason="not UTF-8",
            where=where,
            hint="convert with iconv",
        ) from error
