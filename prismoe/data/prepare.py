"""`prepare`: text files of several domains → one folder of token shards per domain.

Each domain is made whole or not at all. The same command after an interruption keeps finished domains and makes the
others; a domain whose text, tokenizer and settings are unchanged is recognised by its key and left alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.data.reader import Document, read_documents
from prismoe.data.shards import KIND, SPLITS, Domain, Split, SplitCounts, token_dtype
from prismoe.data.sources import DomainSource, resolve
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.data.writer import SplitWriter
from prismoe.errors import InputError, UsageError
from prismoe.folder import FileEntry, Manifest, claim, sha256_file
from prismoe.progress import Progress, quiet
from prismoe.room import require_room

__all__ = ["DomainSource", "Prepared", "PreparedDomain", "prepare"]

_FORMAT = 1  # goes into the key: a change of what the same text gives must not be taken for finished work
_BATCH_BYTES = 1 << 20  # text that is tokenised at once: enough work for every core, little memory
# An estimate counts so much text of a file (cheap), and tokenises so much of it (dear).
_COUNTED_BYTES, _SAMPLE_BYTES = 1 << 22, 1 << 16


@dataclass(frozen=True)
class PreparedDomain:
    """One domain's part of the receipt. `status` is made, kept (finished before) or planned (a dry run's estimate).

    `num_empty` documents held no text and were left out.
    """

    name: str
    folder: str
    status: str
    splits: dict[Split, SplitCounts]
    num_empty: int


@dataclass(frozen=True)
class Prepared:
    """Receipt of `prepare`. `seconds` and `tokens_per_second` are of the domains made in this call."""

    domains: tuple[PreparedDomain, ...]
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    start_token: int | None
    end_token: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """One domain, checked. `settings` and `key` hold everything that decides its bytes."""

    name: str
    folder: Path
    files: dict[Split, tuple[Path, ...]]
    field: str
    heldout_fraction: float | None  # None where held-out files are given
    parents: dict[str, str]
    settings: dict[str, Any]
    key: str

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for paths in self.files.values() for path in paths)


def prepare(
    domains: Mapping[str, DomainSource],
    *,
    tokenizer: str | Path,
    out: str | Path,
    heldout_fraction: float = 0.01,
    add_special_tokens: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Prepared:
    """Tokenise every domain into `out/<name>`: a flat array of ids and the ends of documents, per split.

    Args:
        domains: text of each domain; a name is a folder name.
        tokenizer: the model's folder (or its tokenizer.json).
        out: holds one folder per domain.
        heldout_fraction: of documents, chosen by a hash of their text (so copies of a document are on one side), for
            domains without held-out files.
        add_special_tokens: begin documents as the tokenizer's own template does. They end with its end token anyway.
        force: make finished domains again, and replace those of other settings.
        dry_run: read a little of every file, estimate, write nothing.
        on_progress: called with bytes of the files read.

    Raises:
        UsageError: no domains, a name that is no folder name, a file named twice.
        InputError: text or a tokenizer that cannot be used; the message names file and line.
        ResourceError: the disk is too small, or a domain's folder is in use or holds something else.
    """
    out = Path(out)
    if not domains:
        raise UsageError("no domains to prepare")
    if not 0 < heldout_fraction < 1:
        raise UsageError(f"{heldout_fraction}", where="heldout_fraction", needed="a fraction between 0 and 1")
    encoder = DocumentTokenizer.open(tokenizer, add_special_tokens=add_special_tokens)
    jobs = [_job(name, source, out / name, encoder, heldout_fraction) for name, source in domains.items()]
    kept = {} if force else {job.name: row for job in jobs if (row := _finished(job)) is not None}
    todo = [job for job in jobs if job.name not in kept]
    planned = {job.name: _estimate(job, encoder) for job in todo}
    _check_disk(out, planned.values(), token_dtype(encoder.vocab_size).itemsize)
    started = time.monotonic()
    made: dict[str, PreparedDomain] = {}
    total, done = sum(job.size for job in todo), 0
    if dry_run:
        todo = []
    for job in todo:  # a folder that is not ours to fill must stop us before hours of work, not after
        with claim(job.folder, kind=KIND, key=job.key, force=force):
            pass
    for job in todo:

        def on_bytes(count: int, what: str = f"bytes tokenised: {job.name}", base: int = done) -> None:
            on_progress(what, base + count, total)

        made[job.name] = _make(job, encoder, on_bytes=on_bytes)
        done += job.size
    seconds = time.monotonic() - started
    tokens = sum(counts.num_tokens for row in made.values() for counts in row.splits.values())
    rows = {**planned, **kept, **made}
    return Prepared(
        domains=tuple(rows[job.name] for job in jobs),
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        dtype=token_dtype(encoder.vocab_size).name,
        start_token=encoder.start_token,
        end_token=encoder.end_token,
        seconds=seconds,
        tokens_per_second=tokens / seconds if tokens else 0.0,
    )


def _job(name: str, source: DomainSource, folder: Path, encoder: DocumentTokenizer, heldout_fraction: float) -> _Job:
    files = resolve(name, source)
    hashes = {split: [sha256_file(path) for path in paths] for split, paths in files.items()}
    fraction = None if files["heldout"] else heldout_fraction
    settings = {
        "name": name,
        "field": source.field,
        "heldout_fraction": fraction,
        "vocab_size": encoder.vocab_size,
        "start_token": encoder.start_token,
        "end_token": encoder.end_token,
        "tokenizer_sha256": encoder.sha256,
        "format": _FORMAT,
    }
    return _Job(
        name=name,
        folder=folder,
        files=files,
        field=source.field,
        heldout_fraction=fraction,
        parents={
            "tokenizer": encoder.sha256,
            # Numbered, because files of one name may come from different folders; their paths are nobody's business.
            **{
                f"{split} {number}: {path.name}": found
                for split in SPLITS
                for number, (path, found) in enumerate(zip(files[split], hashes[split], strict=True))
            },
        },
        settings=settings,
        key=hashlib.sha256(json.dumps([settings, hashes], sort_keys=True).encode()).hexdigest(),
    )


def _finished(job: _Job) -> PreparedDomain | None:
    manifest = Manifest.read(job.folder)
    if manifest is None or not manifest.same_work(KIND, job.key):
        return None
    splits = dict(Domain.open(job.folder).splits)
    return PreparedDomain(job.name, str(job.folder), "kept", splits, int(manifest.config["num_empty"]))


def _make(job: _Job, encoder: DocumentTokenizer, *, on_bytes: Callable[[int], None]) -> PreparedDomain:
    """Tokenise one domain, then write its manifest."""
    with claim(job.folder, kind=KIND, key=job.key):
        counts: dict[Split, SplitCounts] = {}
        files: dict[str, FileEntry] = {}
        num_empty = 0
        with (
            SplitWriter(job.folder, "train", encoder=encoder) as train,
            SplitWriter(job.folder, "heldout", encoder=encoder) as heldout,
        ):
            writers: dict[Split, SplitWriter] = {"train": train, "heldout": heldout}
            for batch, position in _batches(_documents(job)):
                on_bytes(position)
                for split in SPLITS:
                    documents = [document for where, document in batch if where == split]
                    num_empty += sum(not document.text for document in documents)
                    writers[split].add(_encode([document for document in documents if document.text], encoder))
            for split, writer in writers.items():
                if not writer.num_documents:
                    raise InputError(
                        f"no {'training' if split == 'train' else 'held-out'} document with text",
                        where=f"domain {job.name}",
                        hint="give it more text, held-out files or another heldout_fraction",
                    )
            for split, writer in writers.items():
                counts[split], entries = writer.finish()
                files.update(entries)
        config = {
            **job.settings,
            "num_empty": num_empty,
            "splits": {split: asdict(counts[split]) for split in SPLITS},
        }
        Manifest(kind=KIND, parents=job.parents, config=config, files=files, key=job.key).write(job.folder)
    return PreparedDomain(job.name, str(job.folder), "made", counts, num_empty)


def _documents(job: _Job) -> Iterator[tuple[Split, Document, int]]:
    """(split, document, bytes read of all files so far). Filters will sit between this and the tokenizer."""
    base = 0
    for split in SPLITS:
        for path in job.files[split]:
            for document in read_documents(path, field=job.field):
                yield _side(document, split, job.heldout_fraction), document, base + document.position
            base += path.stat().st_size


def _side(document: Document, split: Split, heldout_fraction: float | None) -> Split:
    if heldout_fraction is None:
        return split
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_fraction * 2**64 else "train"


def _batches(
    documents: Iterator[tuple[Split, Document, int]],
) -> Iterator[tuple[list[tuple[Split, Document]], int]]:
    batch: list[tuple[Split, Document]] = []
    size = position = 0
    for split, document, position in documents:
        batch.append((split, document))
        size += document.num_bytes + 64  # very short documents cost something too
        if size >= _BATCH_BYTES:
            yield batch, position
            batch, size = [], 0
    yield batch, position


def _encode(documents: list[Document], encoder: DocumentTokenizer) -> list[tuple[Any, int]]:
    encoded = encoder.encode([document.text for document in documents])
    for ids, document in zip(encoded, documents, strict=True):
        if (largest := int(ids.max())) >= encoder.vocab_size:
            raise InputError(
                f"token id {largest} for a vocabulary of {encoder.vocab_size}",
                where=document.where,
                hint="tokenizer.json and config.json are of different models",
            )
    return [(ids, document.num_bytes) for ids, document in zip(encoded, documents, strict=True)]


def _estimate(job: _Job, encoder: DocumentTokenizer) -> PreparedDomain:
    """Read the first document of every file, count and tokenise some of each split, and extrapolate."""
    splits: dict[Split, SplitCounts] = {}
    for split, paths in job.files.items():
        for path in paths[1:]:
            next(read_documents(path, field=job.field))
        documents, num_bytes, position, sample = _begin(paths[0], job.field) if paths else (0, 0, 1, [])
        encoded = _encode(sample, encoder)
        grow = sum(path.stat().st_size for path in paths) / position
        per_byte = sum(len(ids) for ids, _ in encoded) / max(sum(count for _, count in encoded), 1)
        splits[split] = SplitCounts(
            num_tokens=round(grow * num_bytes * per_byte),
            num_documents=round(grow * documents),
            num_bytes=round(grow * num_bytes),
            num_unknown=0,
        )
    return PreparedDomain(job.name, str(job.folder), "planned", splits, 0)


def _begin(path: Path, field: str) -> tuple[int, int, int, list[Document]]:
    """Of a file's beginning: documents, bytes of text, bytes of the file; and fewer documents, to be tokenised."""
    count = size = position = 0
    sample: list[Document] = []
    for document in read_documents(path, field=field):
        # Positions move in blocks: only where one begins do they say what the documents before it took.
        if size >= _COUNTED_BYTES and document.position != position:
            return count, size, position, sample
        if size < _SAMPLE_BYTES:
            sample.append(document)
        count, size, position = count + 1, size + document.num_bytes, document.position
    return count, size, path.stat().st_size, sample


def _check_disk(out: Path, planned: Any, itemsize: int) -> None:
    counts = [counts for row in planned for counts in row.splits.values()]
    needed = sum(itemsize * part.num_tokens + 16 * part.num_documents for part in counts)
    require_room(out, disk_bytes=needed)
