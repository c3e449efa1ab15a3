"""One pass over a file: scores, sizes and fingerprints of its documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.filters import Scorer
from prismoe.data.reader import Document, read_documents
from prismoe.data.sift.benchmarks import Benchmarks
from prismoe.data.sift.columns import ColumnWriter
from prismoe.data.sift.duplicates import minhash_bands, text_hashes
from prismoe.data.sift.work import Part, Work
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.data.words import Batch
from prismoe.errors import NumericalError

__all__ = ["bytes_per_token", "documents_of", "score_part", "texts_of"]

_BATCH_BYTES = 1 << 20  # text in hand at once
_SAMPLED, _SAMPLED_BYTES = 60, 8192  # documents of a domain, and how much of each, that say how long a token is
_LEARN_DOCUMENTS = 20_000  # that a filter may learn from, of all its domains together


def documents_of(work: Work, part: Part, *, start: int = 0) -> Iterator[Document]:
    """Readable documents of a file as `prepare` sees them; bad ones are its to count and to judge."""
    source = work.sources[part.domain]
    return read_documents(
        part.path, field=source.field, select=source.select, start=start, on_bad=lambda document: None
    )


def score_part(
    work: Work,
    part: Part,
    folder: Path,
    *,
    scorers: Mapping[str, Scorer],
    benchmarks: Benchmarks | None,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the columns of a file."""
    wanted = work.columns_of(part)
    with ColumnWriter(folder, part.stem, wanted) as writer:
        for documents in _batches(documents_of(work, part)):
            writer.add(_columns(documents, wanted, scorers, benchmarks))
            on_bytes(documents[-1].position)
        writer.finish()


def _columns(
    documents: list[Document], wanted: list[str], scorers: Mapping[str, Scorer], benchmarks: Benchmarks | None
) -> dict[str, npt.NDArray[Any]]:
    sizes = np.array([document.num_bytes for document in documents], np.int64)
    filled = np.flatnonzero([not document.text.isspace() and bool(document.text) for document in documents])
    batch = Batch([documents[place].text for place in filled])
    found: dict[str, npt.NDArray[Any]] = {
        "number": np.array([document.number for document in documents]),
        "size": np.where(np.isin(np.arange(len(documents)), filled), sizes, 0),
    }
    for column in wanted:
        if column in found:
            continue
        if column in scorers:
            values: npt.NDArray[Any] = scorers[column].score(batch) if len(batch) else np.zeros(0)
            if not np.isfinite(values).all():
                bad = documents[filled[np.flatnonzero(~np.isfinite(values))[0]]]
                name = type(scorers[column]).__module__.rpartition(".")[2]
                raise NumericalError(f"a score of filter {name} that is not finite", where=bad.where)
            found[column] = np.full(len(documents), np.nan)
        elif column == "benchmark":
            assert benchmarks is not None
            values = benchmarks.find(batch)
            found[column] = np.zeros(len(documents), np.uint16)
        elif column == "hash":
            values = text_hashes(batch)
            found[column] = np.zeros(len(documents), np.uint64)
        else:
            values = minhash_bands(batch)
            found[column] = np.zeros((len(documents), values.shape[1]), np.uint64)
        found[column][filled] = values
    return found


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes + 64  # very short documents cost something too
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def texts_of(work: Work, domains: tuple[str, ...]) -> Iterator[str]:
    """Text to learn from: the beginning of every training file of `domains`, the same number of documents of each."""
    parts = [part for part in work.parts if part.domain in domains and part.split == "train"]
    each = -(-_LEARN_DOCUMENTS // max(len(parts), 1))

    def beginning(part: Part) -> Iterator[str]:
        for _, document in zip(range(each), documents_of(work, part), strict=False):
            yield document.text

    return chain.from_iterable(map(beginning, parts))


def bytes_per_token(work: Work, domain: str, tokenizer: DocumentTokenizer) -> float | None:
    """Of the beginnings of some training documents; None where they have no text."""
    parts = [part for part in work.parts if part.domain == domain and part.split == "train"][:_SAMPLED]
    each = -(-_SAMPLED // len(parts))
    texts = [document.text[:_SAMPLED_BYTES] for part in parts for document in islice(documents_of(work, part), each)]
    ids, _ = tokenizer.encoder.encode(texts)
    return sum(len(text.encode()) for text in texts) / len(ids) if len(ids) else None
