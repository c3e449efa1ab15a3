"""One lot to shards: read, dealt out to domains, tokenised in batches, written; in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prismoe.data.lots import (
    Hashes,
    Lot,
    Place,
    Reading,
    Record,
    Route,
    Tally,
    find_records,
    keep_file,
    over_limit,
    record_key,
)
from prismoe.data.reader import BadDocument, Document, read_documents
from prismoe.data.shards import SPLITS, Shard, Split, token_dtype
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.data.writer import ShardWriter
from prismoe.errors import InputError
from prismoe.folder import FileEntry

__all__ = ["deal", "encode", "make_lot"]

_BATCH_BYTES = 1 << 20  # text that is tokenised at once: enough work for every core, little memory
_SEGMENT_BYTES = 4 << 30  # text of a lot that makes one set of shards: what an interruption can cost
_EARLY = 10_000  # documents after which bad ones are a share and no accident

Kept = list[npt.NDArray[np.uint8] | None]


def make_lot(
    reading: Reading,
    lot: Lot,
    encoder: DocumentTokenizer,
    *,
    hashes: Hashes,
    tally: Tally,
    max_bad: float,
    last: bool,
    written: set[Path],
    on_bytes: Callable[[int], None],
) -> None:
    """Bring the shards of a lot up to date in the folders of all its domains.

    Args:
        tally: of the reading so far; grows.
        max_bad: the share of documents that may be bad.
        last: whether no lot of the reading comes after, so that the share is final.
        written: grows by the files that are written.

    Raises:
        InputError: text that cannot be used, or too many documents that cannot be read.
        ResourceError: a folder cannot be written.
    """
    done = [list(find_records(route, lot, hashes)) for route in reading.routes]
    place: Place | None = (0, 0)
    for segment in count():
        if place is None:
            return
        records = [records[segment] if segment < len(records) else None for records in done]
        if None not in records and records[0] is not None:
            tally.add(records[0].tally)
            place = records[0].next
        else:
            place = _Segment(reading, lot, segment, place, encoder, hashes, written).make(
                tally, max_bad, last, on_bytes
            )


@dataclass
class _Target:
    """Where documents of one domain go in this segment."""

    route: Route
    writers: dict[Split, ShardWriter]
    num_empty: int = 0
    num_filtered: int = 0


@dataclass
class _Batch:
    """Documents waiting for the tokenizer, each with the number of its writer."""

    documents: list[Document] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    size: int = 0


@dataclass
class _Segment:
    reading: Reading
    lot: Lot
    segment: int
    start: Place
    encoder: DocumentTokenizer
    hashes: Hashes
    written: set[Path]

    def make(self, total: Tally, max_bad: float, last: bool, on_bytes: Callable[[int], None]) -> Place | None:
        """Write the shards of this segment and then its records; returns where the next one begins."""
        lot, dtype, unknown = self.lot, token_dtype(self.encoder.vocab_size), self.encoder.unknown_token
        tally = Tally()
        with ExitStack() as stack:
            targets = [
                _Target(
                    route,
                    {
                        split: stack.enter_context(
                            ShardWriter(route.folder, lot.name(self.segment, split), dtype=dtype, unknown_token=unknown)
                        )
                        for split in SPLITS
                    },
                )
                for route in self.reading.routes
            ]
            place = self._fill(targets, tally, on_bytes)
            total.add(tally)
            if total.num_records >= _EARLY or (last and place is None):
                over_limit(total, max_bad)
            for target in targets:
                self._finish(target, tally, place)
        return place

    def _fill(self, targets: list[_Target], tally: Tally, on_bytes: Callable[[int], None]) -> Place | None:
        writers = [target.writers[split] for target in targets for split in SPLITS]
        batch, size, base = _Batch(), 0, 0
        place: Place | None = None
        for file, path, documents in self._files(tally):
            kept = [_kept(target.route, self.lot, file) for target in targets]
            for document in documents:
                if size >= _SEGMENT_BYTES:
                    place = (file, document.number)
                    break
                tally.num_records += 1
                for number, split in self._deal(document, targets, kept):
                    batch.documents.append(document)
                    batch.targets.append(2 * number + SPLITS.index(split))
                size += document.num_bytes
                batch.size += document.num_bytes + 64  # very short documents cost something too
                if batch.size >= _BATCH_BYTES:
                    _write(batch, writers, self.encoder)
                    batch = _Batch()
                    on_bytes(base + document.position)
            if place is not None:
                break
            base += path.stat().st_size
        _write(batch, writers, self.encoder)
        on_bytes(base)
        return place

    def _files(self, tally: Tally) -> Iterator[tuple[int, Path, Iterator[Document]]]:
        first, start = self.start

        def on_bad(error: BadDocument) -> None:
            tally.add(Tally(1, {error.reason: 1}, str(error)))

        for number, path in enumerate(self.lot.files):
            if number >= first:
                begin = start if number == first else 0
                labels, text = self.reading.labels, self.reading.field
                yield number, path, read_documents(path, field=text, labels=labels, start=begin, on_bad=on_bad)

    def _deal(self, document: Document, targets: list[_Target], kept: Kept) -> Iterator[tuple[int, Split]]:
        for number, (target, keep) in enumerate(zip(targets, kept, strict=True)):
            if not deal(document, target.route, self.reading.labels):
                continue
            if not document.text:
                target.num_empty += 1
            elif keep is not None and (document.number >= len(keep) or not keep[document.number]):
                target.num_filtered += 1
            else:
                yield number, _side(document, self.lot.split, target.route.heldout_fraction)

    def _finish(self, target: _Target, tally: Tally, place: Place | None) -> None:
        shards: dict[Split, Shard] = {}
        files: dict[str, FileEntry] = {}
        for split, writer in target.writers.items():
            if (made := writer.finish()) is not None:
                shards[split], entries = made
                files.update(entries)
                self.written.update(target.route.folder / name for name in entries)
        Record(
            key=record_key(target.route, self.lot, self.segment, self.start, self.hashes),
            next=place,
            shards=shards,
            files=files,
            texts=[self.hashes(path) for path in self.lot.files],
            num_empty=target.num_empty,
            num_filtered=target.num_filtered,
            tally=tally,
        ).write(target.route.folder / f"{self.lot.name(self.segment)}.json")


def deal(document: Document, route: Route, labels: tuple[str, ...]) -> bool:
    """Whether a document is of the domain."""
    return all(document.labels[labels.index(name)] in values for name, values in route.select.items())


def _side(document: Document, split: Split, heldout_fraction: float | None) -> Split:
    if heldout_fraction is None or split == "heldout":
        return split
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_fraction * 2**64 else "train"


def _kept(route: Route, lot: Lot, number: int) -> npt.NDArray[np.uint8] | None:
    path = keep_file(route, lot, number)
    if path is None:
        return None
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray) if path.stat().st_size else np.empty(0, np.uint8)


def _write(batch: _Batch, writers: list[ShardWriter], encoder: DocumentTokenizer) -> None:
    if not batch.documents:
        return
    ids, ends = encode(batch.documents, encoder)
    lengths = np.diff(ends, prepend=0)
    num_bytes = np.array([document.num_bytes for document in batch.documents], np.int64)
    targets = np.array(batch.targets)
    for number in np.unique(targets):
        chosen = targets == number
        whose = slice(None) if chosen.all() else np.repeat(chosen, lengths)
        writers[number].add(ids[whose], lengths[chosen], num_bytes[chosen])


def encode(
    documents: list[Document], encoder: DocumentTokenizer
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Ids of all documents and where each ends, see `DocumentTokenizer.encode_flat`.

    Raises:
        InputError: an id beyond the vocabulary.
    """
    ids, ends = encoder.encode_flat([document.text for document in documents])
    if len(ids) and ids.max() >= encoder.vocab_size:
        first = int(np.argmax(ids >= encoder.vocab_size))
        raise InputError(
            f"token id {ids[first]} for a vocabulary of {encoder.vocab_size}",
            where=documents[int(np.searchsorted(ends, first, side="right"))].where,
            hint="tokenizer.json and config.json are of different models",
        )
    return ids, ends
