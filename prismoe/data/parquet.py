"""Rows of Parquet files, a few at a time: memory holds some pages of each wanted column, not a row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prismoe.data.blocks import MAX_DOCUMENT
from prismoe.data.reader import AUTO_FIELDS, BadDocument, Row, as_label, as_text, decode, look_up, too_long
from prismoe.errors import InputError, UsageError

__all__ = ["read_rows"]

_ROWS = 64  # converted at once; documents may be long


def read_rows(path: Path, *, field: str, labels: Sequence[str], start: int) -> Iterator[Row]:
    """((text, labels) or what is wrong with it, file:row, bytes of the file read by then) of every row.

    Rows count from 1 in messages, as lines do. Row groups before row `start` are not read; their rows are empty.

    Raises:
        UsageError: pyarrow is not installed.
        InputError: not a readable Parquet file, or no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'prismoe[parquet]'"
        raise UsageError("pyarrow is not installed", where=str(path), hint=hint) from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = _columns(file.schema_arrow.names, path, field, labels)
            metadata, size, row = file.metadata, path.stat().st_size, 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if row + rows <= start:
                    for number in range(row + 1, row + rows + 1):
                        yield ("", ()), f"{path}:{number}", 0
                    row += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=names, use_threads=False):
                    for found in _plain(batch):
                        row += 1
                        where = f"{path}:{row}"
                        yield _row(found, field, labels, where), where, size * row // metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"not a readable Parquet file ({text})", where=str(path)) from error


def _columns(there: Sequence[str], path: Path, field: str, labels: Sequence[str]) -> list[str]:
    """The columns to read: a name as it stands, or the first name of a path into a column of records."""
    if field == "auto":
        field = next((name for name in AUTO_FIELDS if name in there), " or ".join(AUTO_FIELDS))
    names = []
    for name in (field, *labels):
        column = name if name in there else name.split(".")[0]
        if column not in there:
            raise InputError(f"no column {name} (columns: {', '.join(sorted(there)[:8])})", where=str(path))
        names.append(name)
    return names


def _plain(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a batch; text as bytes, because one that is not UTF-8 must not cost the others."""
    import pyarrow

    columns = []
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())
        columns.append(column.to_pylist())
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _row(
    row: dict[str, Any], field: str, labels: Sequence[str], where: str
) -> tuple[str, tuple[str, ...]] | BadDocument:
    try:
        if field == "auto":
            field = next(name for name in AUTO_FIELDS if name in row)
        text = look_up(row, field, where)
        if isinstance(text, bytes):
            if len(text) > MAX_DOCUMENT:
                return too_long(where)
            text = decode(text, where)
        values = [look_up(row, name, where) for name in labels]
        values = [decode(value, where) if isinstance(value, bytes) else value for value in values]
        return as_text(text, field, where), tuple(
            as_label(value, name, where) for name, value in zip(labels, values, strict=True)
        )
    except BadDocument as error:
        return error
