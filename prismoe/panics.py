"""A tokenizer can fail below Python: its Rust library panics, which is no `Exception`. Here it is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prismoe.errors import InputError, PrismoeError

__all__ = ["read_tokenizer", "told"]

MAX_BYTES = 128_000_000  # the largest of a published model has 34 MB
MAX_ID = 1 << 22  # and 262,144 tokens


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


def read_tokenizer(file: Path) -> Any:
    """The fast tokenizer (`tokenizers.Tokenizer`) of a tokenizer.json. Use it within `told` as well.

    Raises:
        InputError: it cannot be read; naming the file.
    """
    from tokenizers import Tokenizer

    with told(file):
        if (size := file.stat().st_size) > MAX_BYTES:
            raise InputError(f"{size} bytes", where=str(file), needed=f"a tokenizer of at most {MAX_BYTES}")
        found = Tokenizer.from_file(str(file))
        # The library writes down every id below the largest that no token has, as soon as it writes the tokenizer.
        if (largest := max(found.get_vocab(with_added_tokens=True).values(), default=0)) > MAX_ID:
            raise InputError(f"a token of id {largest}", where=str(file), needed=f"ids up to {MAX_ID}")
        return found
