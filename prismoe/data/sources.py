"""Which files a domain's text comes from: patterns resolved and checked before anything is tokenised."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from prismoe.data.reader import SUFFIXES
from prismoe.data.shards import SPLITS, Split
from prismoe.errors import InputError, UsageError

__all__ = ["DomainSource", "expand", "resolve"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


@dataclass(frozen=True)
class DomainSource:
    """Text of one domain: paths or glob patterns, read in sorted order per pattern.

    A name `hf://datasets/OWNER/NAME/PATTERN` (or `NAME@REVISION`) is of files on the hub. Without `heldout`, a part of
    `train` is held out. `field` is the key of the text, `a.b` for `b` within `a`; `auto` takes `content`, else `text`.
    `select` keeps the documents whose field has one of the values, so that one mixed file can serve several domains:
    {"meta.redpajama_set_name": ("RedPajamaC4",)}.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...] = ()
    field: str = "auto"
    select: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def resolve(name: str, source: DomainSource, *, offline: bool = False) -> dict[Split, tuple[Path, ...]]:
    """The files of both splits, in reading order; those of the hub are in its cache by then.

    Raises:
        UsageError: the name is no folder name, a file is named twice or in both splits, no training text is named.
        InputError: a path or pattern without files, or a kind of file that is not read.
    """
    where = f"domain {name}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} as a domain's name", needed="letters, digits, _ . - (it names a folder)")
    if not source.train:
        raise UsageError("no training text named", where=where)
    for key, values in source.select.items():
        if not key or not values or isinstance(values, str):
            raise UsageError(f"select {key!r}: {values!r}", where=where, needed="a field and the values to keep")
    files: dict[Split, tuple[Path, ...]] = {
        split: tuple(path for pattern in getattr(source, split) for path in expand(pattern, where, offline=offline))
        for split in SPLITS
    }
    seen: set[Path] = set()
    for path in (path for paths in files.values() for path in paths):
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice", where=where, hint="held-out text must not be trained on")
        seen.add(path.resolve())
        if path.suffix == ".txt" and source.select:
            raise UsageError(f"{path} has no fields to select by", where=where, needed=".jsonl or .parquet")
    return files


def expand(pattern: str, where: str, *, offline: bool = False, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of a path, a glob pattern or a name `hf://datasets/OWNER/NAME/PATTERN`, in sorted order.

    Raises:
        UsageError: a name of the hub that is none.
        InputError: no such file, a folder, or a kind of file that is not among `suffixes`.
    """
    pattern = str(pattern)
    if pattern.startswith("hf://"):
        found = _from_hub(pattern, where, offline)
    else:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise InputError(
                f"{pattern} is a folder", where=where, hint=f"name its files, for instance {pattern}/*.jsonl"
            )
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        here = "" if pattern.startswith(("hf://", "/", "~")) else f"looked for from {Path.cwd()}"
        raise InputError(f"no file {pattern}", where=where, hint=here)
    for file in found:
        if not file.name.endswith(tuple(suffixes)):
            raise InputError("not a kind of file that is read", where=str(file), needed=" ".join(suffixes))
    return found


def _from_hub(pattern: str, where: str, offline: bool) -> list[Path]:
    from huggingface_hub import constants, snapshot_download

    match = _HUB.fullmatch(pattern)
    if match is None:
        raise UsageError(pattern, where=where, needed="hf://datasets/OWNER/NAME/FILE or PATTERN")
    repository, revision, inside = match.groups()
    try:
        folder = Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[inside],
                local_files_only=offline or constants.HF_HUB_OFFLINE,
            )
        )
    except Exception as error:  # network, login, a repository that is not there: the library has many kinds
        hint = "download it once without --offline" if offline else "is the name right, and are you logged in?"
        text = " ".join(str(error).split())[:200]
        raise InputError(f"cannot be had from the hub ({text})", where=pattern, hint=hint) from error
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return [path for name, path in sorted(files.items()) if fnmatchcase(name, inside)]
