"""What a preparation will give, from the beginnings of its files; and some of its text for the encoder's proof."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from prismoe.data.lots import Lot, Reading
from prismoe.data.reader import BadDocument, Document, read_documents
from prismoe.data.shard import deal, encode
from prismoe.data.shards import SPLITS, Split, SplitCounts
from prismoe.data.tokenizer import DocumentTokenizer

__all__ = ["estimate", "sample_texts"]

# An estimate counts so much text of a file (cheap), and tokenises so much of it (dear).
_COUNTED_BYTES, _SAMPLE_BYTES = 1 << 22, 1 << 16
# The encoder is compared on so much text of each reading, in pieces: every kind of text, little time.
_PROOF_BYTES, _PROOF_PIECE = 1 << 16, 1 << 12


def estimate(
    readings: Sequence[Reading], todo: Sequence[tuple[Reading, Lot]], encoder: DocumentTokenizer
) -> dict[str, dict[Split, SplitCounts]]:
    """What the lots in `todo` will give each domain.

    Reads the first document of every file, counts and tokenises some of each split, and extrapolates.
    """
    found: dict[str, dict[Split, SplitCounts]] = {}
    for reading in readings:
        lots = [lot for other, lot in todo if other is reading]
        for lot in lots:
            for path in lot.files:
                next(read_documents(path, field=reading.field, on_bad=_pass), None)
        found |= {route.name: {split: SplitCounts(0, 0, 0, 0) for split in SPLITS} for route in reading.routes}
        for split in SPLITS:
            of_split = [lot for lot in lots if lot.split == split]
            if of_split:
                position, documents = _begin(reading, of_split[0])
                grow = sum(lot.size for lot in of_split) / max(position, 1)
                for route in reading.routes:
                    own = [document for document in documents if deal(document, route, reading.labels)]
                    found[route.name][split] = _counts(own, grow, encoder)
    return found


def sample_texts(todo: Sequence[tuple[Reading, Lot]]) -> list[str]:
    """Pieces of text from the beginning of every reading."""
    texts: list[str] = []
    seen: list[Reading] = []
    for reading, lot in todo:
        if not any(reading is other for other in seen):
            seen.append(reading)
            size = 0
            for document in islice(read_documents(lot.files[0], field=reading.field, on_bad=_pass), 1000):
                texts.append(document.text[:_PROOF_PIECE])
                size += len(texts[-1])
                if size >= _PROOF_BYTES:
                    break
    return texts


def _pass(error: BadDocument) -> None:
    """Bad documents are counted when all are read."""


def _begin(reading: Reading, lot: Lot) -> tuple[int, list[Document]]:
    """Bytes of the file and documents of a file's beginning."""
    documents: list[Document] = []
    size = position = 0
    path = lot.files[0]
    for document in read_documents(path, field=reading.field, labels=reading.labels, on_bad=_pass):
        # Positions move in blocks: only where one begins do they say what the documents before it took.
        if size >= _COUNTED_BYTES and document.position != position:
            return position, documents
        documents.append(document)
        size, position = size + document.num_bytes, document.position
    return path.stat().st_size, documents


def _counts(documents: list[Document], grow: float, encoder: DocumentTokenizer) -> SplitCounts:
    sample, size = [], 0
    for document in documents:
        if size >= _SAMPLE_BYTES:
            break
        sample.append(document)
        size += document.num_bytes
    ids, _ = encode(sample, encoder)
    num_bytes = sum(document.num_bytes for document in documents)
    return SplitCounts(
        num_tokens=round(grow * num_bytes * len(ids) / max(size, 1)),
        num_documents=round(grow * len(documents)),
        num_bytes=round(grow * num_bytes),
        num_unknown=0,
    )
