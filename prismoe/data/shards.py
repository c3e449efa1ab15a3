"""Token shards of one domain: a flat little-endian array of ids per split, and where its documents end.

A domain folder holds, for each split (`train`, `heldout`):

- `<split>.tokens`  uint16 or uint32, every document followed by the end token, nothing else in between;
- `<split>.ends`    int64 pairs [documents, 2]: tokens and bytes of text (UTF-8) up to and including document i;

and `manifest.json`, written last. Ends are what packing without attention across documents, bits per byte of a part
and adding documents later need; a reader that does not need them never touches the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.folder import Manifest

__all__ = ["SPLITS", "Domain", "Split", "SplitCounts", "Windows", "heldout_windows", "token_dtype"]

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
KIND = "domain"
IGNORED = -100  # the label that PyTorch's and transformers' cross entropy skip
IdArray = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds. `num_bytes` is UTF-8 text, without the end tokens; `num_unknown` counts `<unk>` ids."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    num_unknown: int


@dataclass(frozen=True, eq=False)
class Domain:
    """A prepared domain, read-only. `num_*` speak of the train split; `splits` has both."""

    name: str
    folder: Path
    vocab_size: int
    start_token: int | None
    end_token: int
    tokenizer_sha256: str
    splits: Mapping[Split, SplitCounts]

    @classmethod
    def open(cls, folder: str | Path) -> Domain:
        """Read the manifest of a prepared folder and compare the lengths of its files with it.

        Raises:
            InputError: not a finished domain folder, or a file is not as long as the manifest says.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest is None or manifest.kind != KIND:
            raise InputError("not a prepared domain", where=str(folder), hint="make it with `prismoe prepare`")
        try:
            config = manifest.config
            domain = cls(
                name=str(config["name"]),
                folder=folder,
                vocab_size=int(config["vocab_size"]),
                start_token=None if config["start_token"] is None else int(config["start_token"]),
                end_token=int(config["end_token"]),
                tokenizer_sha256=str(config["tokenizer_sha256"]),
                splits={split: SplitCounts(**config["splits"][split]) for split in SPLITS},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a readable manifest ({error!r})", where=str(folder / "manifest.json")) from error
        for split, counts in domain.splits.items():
            itemsize = token_dtype(domain.vocab_size).itemsize
            _check_size(folder / f"{split}.tokens", counts.num_tokens * itemsize)
            _check_size(folder / f"{split}.ends", counts.num_documents * 16)
        return domain

    @property
    def num_tokens(self) -> int:
        return self.splits["train"].num_tokens

    @property
    def num_documents(self) -> int:
        return self.splits["train"].num_documents

    @property
    def num_bytes(self) -> int:
        return self.splits["train"].num_bytes

    def tokens(self, split: Split = "train") -> npt.NDArray[np.unsignedinteger[Any]]:
        """All ids of a split, [num_tokens] uint16 or uint32, memory-mapped."""
        return np.memmap(self.folder / f"{split}.tokens", token_dtype(self.vocab_size), mode="r")

    def ends(self, split: Split = "train") -> IdArray:
        """[num_documents, 2] int64, memory-mapped: tokens and bytes of text up to the end of each document."""
        return np.memmap(self.folder / f"{split}.ends", np.dtype("<i8"), mode="r").reshape(-1, 2)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "splits": {k: asdict(v) for k, v in self.splits.items()},
        }


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise InputError("missing", where=str(path), hint="prepare the domain again")
    if found != expected:
        raise InputError(
            f"{found} bytes", where=str(path), needed=f"{expected} (manifest.json)", hint="prepare the domain again"
        )


@dataclass(frozen=True, eq=False)
class Windows:
    """Evaluation windows over the first `num_tokens` ids of a held-out split; see `heldout_windows`.

    Iterating gives (input_ids_T, labels_T), both int64, -100 where nothing is scored. `num_bytes` of text and
    `num_documents` are what exactly those tokens hold; `num_scored` is how many of them have a label.
    """

    num_tokens: int
    num_bytes: int
    num_documents: int
    seq_len: int
    start_token: int | None
    _tokens: npt.NDArray[np.unsignedinteger[Any]]

    @property
    def _stride(self) -> int:
        return self.seq_len - (self.start_token is not None)

    @property
    def num_scored(self) -> int:
        if self.start_token is not None:
            return self.num_tokens
        # The last window overlaps the one before it, so its first new token has context and is scored.
        full, rest = divmod(self.num_tokens, self.seq_len)
        return self.num_tokens - full - (1 if rest and not full else 0)

    def __len__(self) -> int:
        return -(-self.num_tokens // self._stride)

    def __iter__(self) -> Iterator[tuple[IdArray, IdArray]]:
        for start in range(0, self.num_tokens, self._stride):
            stop = min(start + self._stride, self.num_tokens)
            begin = max(0, stop - self._stride)
            ids = np.asarray(self._tokens[begin:stop], np.int64)
            labels = ids.copy()
            labels[: start - begin] = IGNORED
            if self.start_token is not None:
                ids, labels = np.insert(ids, 0, self.start_token), np.insert(labels, 0, IGNORED)
            elif start == begin:
                labels[0] = IGNORED  # nothing before it in the window; models skip it anyway
            yield ids, labels


def heldout_windows(
    domain: Domain, *, seq_len: int, start_token: int | None = None, max_tokens: int | None = None
) -> Windows:
    """Cut the held-out split of `domain` into windows of exactly `seq_len` ids that score every token once.

    The split is one stream, cut every `seq_len` ids; the last window reaches back so that it is full too, and what the
    window before has scored is labelled -100 in it. Without `start_token` the first id of a window has no context and
    is not scored. With it each window begins with that id, holds `seq_len` - 1 ids of the stream and scores all.
    A split shorter than one window gives one short window.

    Args:
        domain: a prepared domain.
        seq_len: ids per window, at least 2.
        start_token: id that opens each window (`domain.start_token` for models that were trained with one).
        max_tokens: use only the first whole documents that fit in this many tokens (at least one document).
    """
    if seq_len < 2:
        raise InputError(f"seq_len {seq_len}", needed="at least 2")
    ends = domain.ends("heldout")
    documents = len(ends)
    if max_tokens is not None:
        documents = max(1, int(np.searchsorted(ends[:, 0], max_tokens, side="right")))
    num_tokens, num_bytes = (int(n) for n in ends[documents - 1])
    return Windows(
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_documents=documents,
        seq_len=seq_len,
        start_token=start_token,
        _tokens=domain.tokens("heldout"),
    )
