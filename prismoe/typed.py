"""Settings that are what their annotations say, however they were made: from a file, an override or in Python."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prismoe.errors import UsageError

__all__ = ["check_types"]


def check_types(settings: Any, *, section: str) -> None:
    """Hold every field of a dataclass to its annotation; numbers are finite. `section` is the config's, for the error.

    Raises:
        UsageError: the first field that is not; names it.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for item in fields(settings):
        value = getattr(settings, item.name)
        try:
            TypeAdapter(hints[item.name], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise UsageError(f"{value!r}: {problem}", where=f"{section}.{item.name}") from error
