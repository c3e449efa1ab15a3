"""Which files a domain's text comes from: patterns resolved and checked before anything is tokenised."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from prismoe.data.reader import SUFFIXES
from prismoe.data.shards import SPLITS, Split
from prismoe.errors import InputError, UsageError

__all__ = ["DomainSource", "resolve"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class DomainSource:
    """Text of one domain: paths or glob patterns, read in sorted order per pattern.

    Without `heldout`, a part of `train` is held out. `field` is the key of the text in JSON lines; `auto` takes
    `content`, else `text`.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...] = ()
    field: str = "auto"


def resolve(name: str, source: DomainSource) -> dict[Split, tuple[Path, ...]]:
    """The files of both splits, in reading order.

    Raises:
        UsageError: the name is no folder name, a file is named twice or in both splits, no training text is named.
        InputError: a path or pattern without files, or a kind of file that is not read.
    """
    where = f"domain {name}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} as a domain's name", needed="letters, digits, _ . - (it names a folder)")
    if not source.train:
        raise UsageError("no training text named", where=where)
    files: dict[Split, tuple[Path, ...]] = {
        split: tuple(path for pattern in getattr(source, split) for path in _expand(pattern, where)) for split in SPLITS
    }
    seen: set[Path] = set()
    for path in (path for paths in files.values() for path in paths):
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice", where=where, hint="held-out text must not be trained on")
        seen.add(path.resolve())
    return files


def _expand(pattern: str, where: str) -> list[Path]:
    pattern = str(pattern)
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise InputError(f"{pattern} is a folder", where=where, hint=f"name its files, for instance {pattern}/*.jsonl")
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        raise InputError(f"no file {pattern}", where=where)
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise InputError("not a kind of file that is read", where=str(file), needed=" ".join(SUFFIXES))
    return found
