"""From finished lots to a finished domain: everything is there, is what was written, and the manifest says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.data.lots import Hashes, Lot, Reading, Record, Route, Tally, find_records, keep_file, over_limit
from prismoe.data.shards import KIND, SPLITS, Domain, Shard, Split, SplitCounts
from prismoe.data.writer import HashedFile
from prismoe.errors import InputError, ResourceError
from prismoe.folder import (
    MANIFEST,
    MARKER,
    FileEntry,
    Manifest,
    hash_files,
    make_folder,
    read_mark,
    sha256_file,
    write_mark,
)
from prismoe.room import unwritten

__all__ = ["check_same_texts", "collect", "finish", "finished", "join"]

_ENDS = 1 << 16  # documents whose ends are joined at once


def join(route: Route, kind: str) -> None:
    """Work in a folder together with other processes: only with those that make the same.

    Raises:
        ResourceError: the folder holds something else, or cannot be made.
    """
    try:
        make_folder(route.folder)
        found = read_mark(route.folder)
        entries = [path.name for path in route.folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise unwritten(route.folder, error, what="cannot make the output folder") from error
    if found is None and [name for name in entries if name != MARKER]:
        raise ResourceError(
            f"output folder holds something else ({min(entries)})",
            where=str(route.folder),
            hint="choose an empty or new folder with --out",
        )
    if found is None:
        write_mark(route.folder, kind, route.key)
    elif found != (kind, route.key):
        raise ResourceError("output folder holds a different job", where=str(route.folder), hint="choose another --out")


def finished(route: Route, reading: Reading, hashes: Hashes) -> dict[str, Any] | None:
    """What a finished domain holds, None where it is not finished, or not of these files.

    Raises:
        InputError: a file is not what was written.
    """
    manifest = Manifest.read(route.folder)
    if manifest is None or not manifest.same_work(KIND, _key(route, *_texts(route, reading, hashes))):
        return None
    manifest.check(route.folder)
    domain, config = Domain.open(route.folder), manifest.config
    return {
        "splits": dict(domain.splits),
        "num_shards": sum(map(len, domain.shards.values())),
        **{name: config[name] for name in ("num_empty", "num_filtered", "bad")},
    }


def check_same_texts(route: Route, reading: Reading, hashes: Hashes) -> None:
    """Before a finished domain is added to: what it holds must be of the first of these files. It is unfinished then.

    Raises:
        ResourceError: it is of other files.
    """
    manifest = Manifest.read(route.folder)
    if manifest is None:
        return
    texts, keeps = _texts(route, reading, hashes)
    if manifest.same_work(KIND, _key(route, texts, keeps)):
        return
    now: dict[Any, list[str]] = {**texts, "keep": keeps}
    before = {**manifest.config["texts"], "keep": manifest.config["keep"]}
    if any(now[name][: len(old)] != old for name, old in before.items()):
        raise ResourceError(
            "output folder holds a different job (a text that it was made of has changed)",
            where=str(route.folder),
            hint="--force replaces it, or choose another --out",
        )
    Manifest.remove(route.folder)


def collect(route: Route, lots: Sequence[Lot], hashes: Hashes) -> tuple[list[Record], dict[str, Any]]:
    """The records of some lots, and what they hold together."""
    records = [record for lot in lots for record in find_records(route, lot, hashes)]
    tally = Tally()
    for record in records:
        tally.add(record.tally)
    return records, {
        "splits": {split: _sum([shard.counts for shard in _shards(records, split)]) for split in SPLITS},
        "num_shards": sum(len(record.shards) for record in records),
        "num_empty": sum(record.num_empty for record in records),
        "num_filtered": sum(record.num_filtered for record in records),
        "bad": dict(sorted(tally.bad.items())),
    }


def finish(
    route: Route, reading: Reading, hashes: Hashes, *, max_bad: float, written: Container[Path], tokenizer: str
) -> dict[str, Any]:
    """Check every shard, join the ends and write the manifest; returns what the domain holds.

    `written` are files of this very process, which need no second look.

    Raises:
        InputError: a shard is not what was written, too many documents are bad, or a split is empty.
        ResourceError: the folder cannot be written.
    """
    folder = route.folder
    records, held = collect(route, reading.lots, hashes)
    tally = Tally()
    for record in records:
        tally.add(record.tally)
    over_limit(tally, max_bad)
    for split in SPLITS:
        if not held["splits"][split].num_documents:
            raise InputError(
                f"no {'training' if split == 'train' else 'held-out'} document with text",
                where=f"domain {route.name}",
                hint="give it more text, held-out files or another heldout_fraction",
            )
    files = {name: entry for record in records for name, entry in record.files.items()}
    for name, entry in files.items():
        if folder / name not in written and sha256_file(folder / name) != entry["sha256"]:
            raise InputError(
                "changed after it was written", where=str(folder / name), hint="--force makes the domain again"
            )
    names = [path.name for lot in reading.lots for path in sorted(folder.glob(f"{lot.split}-{lot.number:05d}-*.json"))]
    for split in SPLITS:
        files |= _join_ends(folder, split, _shards(records, split))
    texts, keeps = _texts(route, reading, hashes)
    _remove_others(folder, {*files, *names})
    config = {
        **route.settings,
        **{name: held[name] for name in ("num_empty", "num_filtered", "bad")},
        "splits": {split: asdict(counts) for split, counts in held["splits"].items()},
        "shards": {split: [asdict(shard) for shard in _shards(records, split)] for split in SPLITS},
        "texts": texts,
        "keep": keeps,
    }
    # Numbered, because files of one name may come from different folders; their paths are nobody's business.
    parents = {
        f"{split} {number}: {path.name}": hashes(path)
        for split in SPLITS
        for number, path in enumerate(reading.files[split])
    }
    Manifest(
        kind=KIND,
        parents={"tokenizer": tokenizer, **parents},
        config=config,
        files=files | hash_files(folder, names),
        key=_key(route, texts, keeps),
    ).write(folder)
    return held


def _texts(route: Route, reading: Reading, hashes: Hashes) -> tuple[dict[Split, list[str]], list[str]]:
    """Hashes of all input files, and of their keep files."""
    keeps = [
        path for lot in reading.lots for number in range(len(lot.files)) if (path := keep_file(route, lot, number))
    ]
    return {split: [hashes(path) for path in reading.files[split]] for split in SPLITS}, [hashes(p) for p in keeps]


def _key(route: Route, texts: dict[Split, list[str]], keeps: list[str]) -> str:
    return hashlib.sha256(json.dumps([route.key, texts, keeps], sort_keys=True).encode()).hexdigest()


def _shards(records: Sequence[Record], split: Split) -> list[Shard]:
    return [record.shards[split] for record in records if split in record.shards]


def _sum(counts: Sequence[SplitCounts]) -> SplitCounts:
    return SplitCounts(*(sum(column) for column in zip((0, 0, 0, 0), *(astuple(c) for c in counts), strict=True)))


def _join_ends(folder: Path, split: Split, shards: Sequence[Shard]) -> dict[str, FileEntry]:
    """The ends of all shards of a split as one file, counted from the first."""
    with HashedFile(folder, f"{split}.ends") as file:
        base = np.zeros(2, np.int64)
        for shard in shards:
            ends = np.memmap(folder / f"{shard.name}.ends", "<i8", mode="r").reshape(-1, 2)
            for begin in range(0, len(ends), _ENDS):
                file.write(ends[begin : begin + _ENDS] + base)
            base += ends[-1]
        return {file.name: file.finish()}


def _remove_others(folder: Path, names: set[str]) -> None:
    """Shards of an earlier state of files that were changed before the domain was ever finished."""
    for path in folder.iterdir():
        if path.suffix in (".tokens", ".ends", ".json") and path.name not in {*names, MARKER, MANIFEST}:
            path.unlink()
