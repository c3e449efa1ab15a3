"""`prepare`: text files of several domains → one folder of token shards per domain.

The same command after an interruption goes on behind the last finished shard; given more files it adds their shards.
With `part` any number of processes share the work, on one machine or many; the plain call afterwards finds their
shards, makes what is missing, checks them all and writes the manifests.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prismoe.data.estimate import estimate, sample_texts
from prismoe.data.finish import check_same_texts, collect, finish, finished, join
from prismoe.data.lots import Hashes, Lot, Reading, Route, Tally, cut_lots, find_records
from prismoe.data.shard import make_lot
from prismoe.data.shards import KIND, Split, SplitCounts, token_dtype
from prismoe.data.sources import DomainSource, resolve
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest, claim
from prismoe.progress import Progress, quiet
from prismoe.room import require_room

__all__ = ["DomainSource", "Prepared", "PreparedDomain", "prepare"]

_FORMAT = 2  # goes into the key: a change of what the same text gives must not be taken for finished work
_MAX_SHARDS = 10_000  # of one split: more files than that are a burden to every file system


@dataclass(frozen=True)
class PreparedDomain:
    """One domain's part of the receipt.

    `status` is made, kept (finished before), planned (a dry run's estimate) or part (its manifest is still to come).
    `num_empty` documents held no text and `num_filtered` were not kept by the filters; `bad` documents of the
    domain's files could not be read, by reason.
    """

    name: str
    folder: str
    status: str
    splits: dict[Split, SplitCounts]
    num_shards: int = 0
    num_empty: int = 0
    num_filtered: int = 0
    bad: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Receipt of `prepare`. `seconds` and `tokens_per_second` are of the domains made in this call.

    `encoder` says what tokenised (empty: nothing had to be), `proof` what its ids were compared with (empty: nothing
    stood in for the tokenizer itself).
    """

    domains: tuple[PreparedDomain, ...]
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    start_token: int | None
    end_token: int
    encoder: str
    proof: str
    seconds: float
    tokens_per_second: float
    part: tuple[int, int] | None = None

    @property
    def warnings(self) -> list[str]:
        """What a person should know before training on it."""
        found = []
        for row in self.domains:
            unknown = sum(counts.num_unknown for counts in row.splits.values())
            share = 100 * unknown / max(sum(counts.num_tokens for counts in row.splits.values()), 1)
            if share > 1:
                found.append(f"{row.name}: {share:.1f} % of the tokens are unknown to the tokenizer")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "warnings": self.warnings}


def prepare(
    domains: Mapping[str, DomainSource],
    *,
    tokenizer: str | Path,
    out: str | Path,
    heldout_fraction: float = 0.01,
    add_special_tokens: bool = True,
    keep: str | Path | None = None,
    files_per_shard: int = 1,
    max_bad: float = 0.001,
    part: tuple[int, int] | None = None,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Prepared:
    """Tokenise every domain into `out/<name>`: flat arrays of ids and the ends of documents, per split.

    Args:
        domains: text of each domain; a name is a folder name. Domains that name the same files are read together.
        tokenizer: the model's folder (or its tokenizer.json).
        out: holds one folder per domain.
        heldout_fraction: of documents, chosen by a hash of their text (so copies of a document are on one side), for
            domains without held-out files.
        add_special_tokens: begin documents as the tokenizer's own template does. They end with its end token anyway.
        keep: the folder of `sift`: only documents that it keeps.
        files_per_shard: input files that make one shard. More for corpora of very many files.
        max_bad: the share of documents that may be unreadable; they are left out and counted by reason.
        part: (i, n), i from 1: make only the i-th of n shares of the shards. Run all n, in any order and anywhere
            where `out` is the same folder, then the same without `part`.
        offline: open no socket.
        force: make finished domains again, and replace those of other settings.
        dry_run: read a little of every file, estimate, write nothing.
        on_progress: called with bytes of the files read.

    Raises:
        UsageError: no domains, a name that is no folder name, a file named twice, a part that is none.
        InputError: text or a tokenizer that cannot be used; the message names file and line.
        ResourceError: the disk is too small, or a domain's folder is in use or holds something else.
    """
    _check(domains, heldout_fraction, files_per_shard, max_bad, part, force)
    opened = DocumentTokenizer.open(tokenizer, add_special_tokens=add_special_tokens)
    settings = {
        "heldout_fraction": heldout_fraction,
        "files_per_shard": files_per_shard,
        "vocab_size": opened.vocab_size,
        "start_token": opened.start_token,
        "end_token": opened.end_token,
        "tokenizer_sha256": opened.sha256,
        "format": _FORMAT,
    }
    readings = _readings(domains, Path(out), settings, files_per_shard, keep, offline)
    hashes = Hashes()
    rows: dict[str, PreparedDomain] = {}
    if not force and part is None:
        for route, reading in _routes(readings):
            if (found := finished(route, reading, hashes)) is not None:
                rows[route.name] = PreparedDomain(route.name, str(route.folder), "kept", **found)
    readings = [left for reading in readings if (left := _without(reading, rows)) is not None]
    todo = _todo(readings, hashes, part, force)
    encoder = opened.quicker(sample_texts(todo)) if todo else opened
    expected = estimate(readings, todo, encoder)
    folders = {route.name: str(route.folder) for route, _ in _routes(readings)}
    rows |= {name: PreparedDomain(name, folders[name], "planned", splits) for name, splits in expected.items()}
    itemsize = token_dtype(opened.vocab_size).itemsize
    counts = [counts for splits in expected.values() for counts in splits.values()]
    require_room(Path(out), disk_bytes=sum(itemsize * c.num_tokens + 32 * c.num_documents for c in counts))
    started, made = time.monotonic(), {}
    if not dry_run:
        made = _make(readings, todo, encoder, hashes, part=part, max_bad=max_bad, force=force, on_progress=on_progress)
    seconds = time.monotonic() - started
    tokens = sum(counts.num_tokens for row in made.values() for counts in row.splits.values())
    rows |= made
    return Prepared(
        domains=tuple(rows[name] for name in domains),
        tokenizer_sha256=opened.sha256,
        vocab_size=opened.vocab_size,
        dtype=token_dtype(opened.vocab_size).name,
        start_token=opened.start_token,
        end_token=opened.end_token,
        encoder=encoder.encoder.name if made and todo else "",
        proof=encoder.encoder.proof,
        seconds=seconds,
        tokens_per_second=tokens / seconds if tokens else 0.0,
        part=part,
    )


Work = list[tuple[Reading, Lot]]


def _check(
    domains: Mapping[str, DomainSource],
    heldout_fraction: float,
    files_per_shard: int,
    max_bad: float,
    part: tuple[int, int] | None,
    force: bool,
) -> None:
    if not domains:
        raise UsageError("no domains to prepare")
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"{heldout_fraction}", where="heldout_fraction", needed="a fraction between 0 and 1")
    if not 0 <= max_bad < 1:
        raise UsageError(f"{max_bad}", where="max_bad", needed="a fraction from 0 and below 1")
    if files_per_shard < 1:
        raise UsageError(f"{files_per_shard}", where="files_per_shard", needed="at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UsageError(f"part {part[0]}/{part[1]}", needed="1/N to N/N")
    if part is not None and force:
        raise UsageError(
            "force with a part", needed="one of them", hint="parts would delete what others made; remove --out first"
        )


def _readings(
    domains: Mapping[str, DomainSource],
    out: Path,
    shared: dict[str, Any],
    files_per_shard: int,
    keep: str | Path | None,
    offline: bool,
) -> list[Reading]:
    """Domains grouped by the files that they read, in the order of `domains`."""
    if keep is not None and Manifest.read(Path(keep)) is None:
        raise InputError("not a finished sift", where=str(keep), hint="`prismoe sift` first")
    groups: dict[Any, list[Route]] = {}
    files: dict[Any, dict[Split, tuple[Path, ...]]] = {}
    for name, source in domains.items():
        found = resolve(name, source, offline=offline)
        for split, paths in found.items():
            if -(-len(paths) // files_per_shard) > _MAX_SHARDS:
                raise UsageError(
                    f"{len(paths)} {split} files", where=f"domain {name}", hint="raise data.files_per_shard"
                )
        fraction = None if found["heldout"] else shared["heldout_fraction"]
        settings = {**shared, "name": name, "field": source.field, "heldout_fraction": fraction}
        settings["select"] = {key: sorted(values) for key, values in sorted(source.select.items())}
        sifted = Path(keep) / name if keep is not None and (Path(keep) / name).is_dir() else None
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        select = {name: frozenset(values) for name, values in source.select.items()}
        group = (found["train"], found["heldout"], source.field)
        groups.setdefault(group, []).append(Route(name, out / name, settings, key, select, fraction, sifted))
        files[group] = found
    return [
        Reading(tuple(routes), files[group], group[2], cut_lots(files[group], files_per_shard))
        for group, routes in groups.items()
    ]


def _routes(readings: Sequence[Reading]) -> list[tuple[Route, Reading]]:
    return [(route, reading) for reading in readings for route in reading.routes]


def _without(reading: Reading, done: Mapping[str, Any]) -> Reading | None:
    """The reading for those of its domains that are not done yet."""
    routes = tuple(route for route in reading.routes if route.name not in done)
    return Reading(routes, reading.files, reading.field, reading.lots) if routes else None


def _todo(readings: Sequence[Reading], hashes: Hashes, part: tuple[int, int] | None, force: bool) -> Work:
    """Lots that are not finished, of this part's share."""
    work = [(reading, lot) for reading in readings for lot in reading.lots]
    if part is not None:
        work = work[part[0] - 1 :: part[1]]
    return [(reading, lot) for reading, lot in work if force or not _done(reading, lot, hashes)]


def _done(reading: Reading, lot: Lot, hashes: Hashes) -> bool:
    for route in reading.routes:
        records = list(find_records(route, lot, hashes)) if route.folder.is_dir() else []
        if not records or records[-1].next is not None:
            return False
    return True


def _make(
    readings: Sequence[Reading],
    todo: Work,
    encoder: DocumentTokenizer,
    hashes: Hashes,
    *,
    part: tuple[int, int] | None,
    max_bad: float,
    force: bool,
    on_progress: Progress,
) -> dict[str, PreparedDomain]:
    total, done = sum(lot.size for _, lot in todo), 0
    with ExitStack() as stack:
        for route, reading in _routes(readings):  # a folder that is not ours to fill must stop us before hours of work
            if part is not None:
                join(route, KIND)
            else:
                stack.enter_context(claim(route.folder, kind=KIND, key=route.key, force=force))
            check_same_texts(route, reading, hashes)
        tallies = {id(reading): Tally() for reading in readings}
        written: set[Path] = set()
        for number, (reading, lot) in enumerate(todo):
            names = ", ".join(route.name for route in reading.routes)

            def on_bytes(count: int, what: str = f"bytes tokenised: {names}", base: int = done) -> None:
                on_progress(what, base + count, total)

            make_lot(
                reading,
                lot,
                encoder,
                hashes=hashes,
                tally=tallies[id(reading)],
                max_bad=max_bad,
                last=all(other is not reading for other, _ in todo[number + 1 :]),
                written=written,
                on_bytes=on_bytes,
            )
            done += lot.size
        rows = {}
        for route, reading in _routes(readings):
            if part is None:
                held = finish(route, reading, hashes, max_bad=max_bad, written=written, tokenizer=encoder.sha256)
            else:
                _, held = collect(route, [lot for other, lot in todo if other is reading], hashes)
            rows[route.name] = PreparedDomain(route.name, str(route.folder), "part" if part else "made", **held)
    return rows
