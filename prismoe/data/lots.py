"""What prepare works through: input files in lots, each of which becomes whole shards that depend on nothing else.

That is what makes the rest simple: a stopped run goes on behind the last finished shard, further files add shards and
leave the old ones alone, and any process can take any lot. Domains that name the same files form one *reading*: a
mixed file is read once and its documents are dealt out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prismoe.data.shards import SPLITS, Shard, Split, SplitCounts
from prismoe.errors import InputError
from prismoe.folder import FileEntry, sha256_file, write_json_atomic

__all__ = ["Hashes", "Lot", "Reading", "Record", "Route", "Tally", "find_records", "over_limit"]

Place = tuple[int, int]
"""A file's place in its lot, and a document's number in that file."""


@dataclass(frozen=True)
class Route:
    """One domain, as a reading deals documents out to it. `key` is a hash of `settings`, which decide its bytes."""

    name: str
    folder: Path
    settings: dict[str, Any]
    key: str
    select: Mapping[str, frozenset[str]]
    heldout_fraction: float | None  # None where held-out files are given
    keep: Path | None  # this domain's folder of keep files


@dataclass(frozen=True)
class Lot:
    """Neighbouring input files of one split; `first` is the place of the first one among the split's files."""

    split: Split
    number: int
    files: tuple[Path, ...]
    first: int

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def name(self, segment: int, split: Split | None = None) -> str:
        """Of a shard (and of a record, for the lot's own split)."""
        return f"{split or self.split}-{self.number:05d}-{segment:03d}"


@dataclass(frozen=True)
class Reading:
    """Domains that read the same files in the same way."""

    routes: tuple[Route, ...]
    files: dict[Split, tuple[Path, ...]]
    field: str
    lots: tuple[Lot, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({name for route in self.routes for name in route.select}))


def cut_lots(files: Mapping[Split, Sequence[Path]], files_per_shard: int) -> tuple[Lot, ...]:
    """Every `files_per_shard` files of a split are a lot. Only the last can change when files are added."""
    return tuple(
        Lot(split, begin // files_per_shard, tuple(files[split][begin : begin + files_per_shard]), begin)
        for split in SPLITS
        for begin in range(0, len(files[split]), files_per_shard)
    )


class Hashes:
    """sha256 of input files, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def __call__(self, path: Path) -> str:
        if path not in self._known:
            try:
                self._known[path] = sha256_file(path)
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
        return self._known[path]


@dataclass
class Tally:
    """What was met in the files: all documents, those that cannot be read by reason, and the first such complaint."""

    num_records: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""

    def add(self, other: Tally) -> None:
        self.num_records += other.num_records
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
        self.first_bad = self.first_bad or other.first_bad


def over_limit(tally: Tally, limit: float) -> None:
    """Refuse text of which more than `limit` cannot be read.

    Raises:
        InputError: with the first complaint.
    """
    count = sum(tally.bad.values())
    if count == 1 and tally.num_records * limit < 1:
        raise InputError(tally.first_bad)
    if count > tally.num_records * limit:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(tally.bad.items()))
        raise InputError(
            f"{count} of {tally.num_records} documents cannot be read ({reasons}), the first: {tally.first_bad}",
            needed=f"at most {100 * limit:g} %",
            hint="repair them, or raise data.max_bad",
        )


@dataclass(frozen=True)
class Record:
    """A finished segment of a lot, for one domain: written after its shards, so its presence means they are whole."""

    key: str
    next: Place | None  # where the next segment begins; None: the lot is finished
    shards: dict[Split, Shard]
    files: dict[str, FileEntry]
    texts: list[str]  # sha256 of the lot's files
    num_empty: int
    num_filtered: int
    tally: Tally

    def write(self, path: Path) -> None:
        write_json_atomic(path, asdict(self))

    @classmethod
    def read(cls, path: Path, key: str) -> Record | None:
        """The record of this very work, None where there is none or its shards are not there."""
        try:
            found = json.loads(path.read_bytes())
            if found["key"] != key:
                return None
            shards = {split: Shard(row["name"], SplitCounts(**row["counts"])) for split, row in found["shards"].items()}
            record = cls(
                **{
                    **found,
                    "next": tuple(found["next"]) if found["next"] else None,
                    "shards": shards,
                    "tally": Tally(**found["tally"]),
                }
            )
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a readable record ({error!r})", where=str(path)) from error
        sizes = {name: path.with_name(name) for name in record.files}
        whole = all(file.is_file() and file.stat().st_size == record.files[n]["bytes"] for n, file in sizes.items())
        return record if whole else None


def record_key(route: Route, lot: Lot, segment: int, start: Place, hashes: Hashes) -> str:
    """Of everything that decides a segment's bytes."""
    texts = [hashes(path) for path in lot.files]
    keeps = [hashes(path) for number in range(len(lot.files)) if (path := keep_file(route, lot, number)) is not None]
    return hashlib.sha256(json.dumps([route.key, texts, keeps, lot.name(segment), start]).encode()).hexdigest()


def keep_file(route: Route, lot: Lot, number: int) -> Path | None:
    """Which documents of the lot's `number`-th file stay, one byte for each record; None: all. See `sift`."""
    if route.keep is None or lot.split == "heldout":  # what measures is not filtered
        return None
    return route.keep / f"train-{lot.first + number:05d}.keep"


def find_records(route: Route, lot: Lot, hashes: Hashes) -> Iterator[Record]:
    """The finished segments of a lot, from the first on; complete when the last one's `next` is None."""
    place: Place | None = (0, 0)
    segment = 0
    while place is not None:
        key = record_key(route, lot, segment, place, hashes)
        record = Record.read(route.folder / f"{lot.name(segment)}.json", key)
        if record is None:
            return
        yield record
        place, segment = record.next, segment + 1
