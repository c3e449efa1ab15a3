"""A tokenizer can fail below Python: its Rust library panics, which is no `Exception`. Here it is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prismoe.errors import InputError, PrismoeError

__all__ = ["told"]


@contextmanager
def told(file: Path | str) -> Iterator[None]:
    """Everything that a tokenizer library raises over `file`, as one of our errors.

    Raises:
        InputError: naming the file.
    """
    try:
        yield
    except PrismoeError:
        raise
    except BaseException as error:
        # pyo3 makes the class anew in every library, so that only its name can be asked for.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"not a readable fast tokenizer ({told})", where=str(file)) from error
