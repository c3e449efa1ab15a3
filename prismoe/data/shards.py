"""Token shards of one domain: flat little-endian arrays of ids per split, and where its documents end.

A domain folder holds, for each split (`train`, `heldout`), shards numbered by the input files they came from and by
their place in them:

- `<split>-<lot>-<segment>.tokens`  uint16 or uint32, every document followed by the end token, nothing else in between;
- `<split>-<lot>-<segment>.ends`    int64 pairs [documents, 2]: tokens and bytes of text (UTF-8) of the shard up to and
  including document i;
- `<split>.ends`                    the same over all shards of the split, in order;

and `manifest.json`, written last. Ends are what packing without attention across documents, bits per byte of a part
and adding documents later need; a reader that does not need them never touches the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from prismoe.data.flat import FlatFiles
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest, check_once

__all__ = ["SPLITS", "Domain", "Shard", "Split", "SplitCounts", "Windows", "heldout_windows", "token_dtype"]

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


@dataclass(frozen=True)
class Shard:
    """One pair of files, `<name>.tokens` and `<name>.ends`, and what it holds."""

    name: str
    counts: SplitCounts


@dataclass(frozen=True, eq=False)
class Domain:
    """A prepared domain, read-only. `num_*` speak of the train split; `splits` has both, `shards` their files in order.

    Each document ends with `end_token`, and begins with `start_token` where that is not None.
    """

    name: str
    folder: Path
    vocab_size: int
    start_token: int | None
    end_token: int
    tokenizer_sha256: str
    splits: Mapping[Split, SplitCounts]
    shards: Mapping[Split, tuple[Shard, ...]]

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
        config = manifest.config
        if "shards" not in config:
            raise InputError(
                "tokens of an earlier version of prismoe",
                where=str(folder),
                hint="make them again with `prismoe prepare --force`",
            )
        try:
            domain = cls(
                name=str(config["name"]),
                folder=folder,
                vocab_size=_count(config["vocab_size"], most=1 << 32),
                start_token=None if config["start_token"] is None else _count(config["start_token"]),
                end_token=_count(config["end_token"]),
                tokenizer_sha256=str(config["tokenizer_sha256"]),
                splits={split: _counts(config["splits"][split]) for split in SPLITS},
                shards={
                    split: tuple(Shard(_plain(row["name"]), _counts(row["counts"])) for row in config["shards"][split])
                    for split in SPLITS
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = str(folder / "manifest.json")
            raise InputError(f"not a readable manifest ({error!r})"[:200], where=where) from error
        itemsize = token_dtype(domain.vocab_size).itemsize
        for split, counts in domain.splits.items():
            held = [shard.counts for shard in domain.shards[split]]
            for name in vars(counts):
                if sum(getattr(part, name) for part in held) != getattr(counts, name):
                    raise InputError(f"shards do not add up to {name} of {split}", where=str(folder / "manifest.json"))
            for shard in domain.shards[split]:
                check_size(folder / f"{shard.name}.tokens", shard.counts.num_tokens * itemsize)
            check_size(folder / f"{split}.ends", counts.num_documents * 16)
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
        """All ids of a split, [num_tokens] uint16 or uint32, memory-mapped; `FlatFiles` where shards are several.

        Raises:
            InputError: a file is not what was written; each is hashed once in a process (`prismoe.folder.unchecked`).
        """
        dtype = token_dtype(self.vocab_size)
        shards = [shard for shard in self.shards[split] if shard.counts.num_tokens]  # nothing cannot be mapped
        files = [self.folder / f"{shard.name}.tokens" for shard in shards]
        self._check(split)
        if len(files) == 1:
            return np.memmap(files[0], dtype, mode="r")
        flat: Any = FlatFiles(files, [shard.counts.num_tokens for shard in shards], dtype)
        return cast(npt.NDArray[np.unsignedinteger[Any]], flat)

    def ends(self, split: Split = "train") -> IdArray:
        """[num_documents, 2] int64, memory-mapped: tokens and bytes of text up to the end of each document.

        Raises:
            InputError: as `tokens`.
        """
        if not self.splits[split].num_documents:
            return np.empty((0, 2), np.int64)
        self._check(f"{split}.ends")
        return np.memmap(self.folder / f"{split}.ends", np.dtype("<i8"), mode="r").reshape(-1, 2)

    def _check(self, prefix: str) -> None:
        """Hash the files whose names begin so: with a shard its ends and what was counted, which adding to it reads."""
        manifest = Manifest.read(self.folder)
        if manifest is not None:
            check_once(self.folder, [name for name in manifest.files if name.startswith(prefix)], manifest=manifest)


def _count(value: Any, most: int = 1 << 62) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise TypeError(f"{value!r} is not a count")
    return value


def _counts(row: Any) -> SplitCounts:
    return SplitCounts(**{name: _count(value) for name, value in row.items()})


def _plain(name: Any) -> str:
    """A file name that stays in its folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,199}", name):
        raise TypeError(f"{name!r} is not a file name")
    return name


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is missing or not as long as it was written."""
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise InputError("missing", where=str(path), hint="make the domain again with `prismoe prepare --force`")
    if found != expected:
        raise InputError(
            f"{found} bytes",
            where=str(path),
            needed=f"{expected} (manifest.json)",
            hint="make the domain again with `prismoe prepare --force`",
        )


def _check_ends(domain: Domain, ends: IdArray, num_tokens: int) -> None:
    """Documents follow each other and end within the tokens."""
    steps = np.diff(ends, axis=0, prepend=0) if len(ends) else ends
    if len(ends) and (steps[:, 0].min() < 1 or steps[:, 1].min() < 0 or ends[-1, 0] > num_tokens):
        raise InputError("documents do not follow each other", where=str(domain.folder / "heldout.ends"))


@dataclass(frozen=True, eq=False)
class Windows:
    """Evaluation windows over the first `num_documents` of a held-out split; see `heldout_windows`.

    Iterating gives (input_ids_T, labels_T), both int64, longest first, T at most `seq_len`. `num_tokens` is how many
    ids are scored over all windows and `num_bytes` the bytes of text that exactly those ids stand for.
    """

    num_tokens: int
    num_bytes: int
    num_documents: int
    seq_len: int
    start_token: int
    spans: IdArray  # [windows, 2] first and last + 1 position in the split
    _tokens: npt.NDArray[np.unsignedinteger[Any]]

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[tuple[IdArray, IdArray]]:
        for begin, end in self.spans.tolist():
            ids = np.empty(end - begin + 1, np.int64)
            ids[0], ids[1:] = self.start_token, self._tokens[begin:end]
            labels = ids.copy()
            labels[0] = IGNORED
            yield ids, labels


def heldout_windows(
    domain: Domain, *, seq_len: int, start_token: int | None = None, max_tokens: int | None = None
) -> Windows:
    """Windows that score every token of held-out text exactly once, document by document.

    A document's text (without its start and end token) is cut every `seq_len` - 1 ids; each piece is opened with
    `start_token`, which is context and not scored. Nothing of one document is seen from another, end tokens are not
    scored (they stand for no text), and no window is padded: what the losses add up to does not depend on the batch.

    Args:
        domain: a prepared domain.
        seq_len: ids per window, at least 2.
        start_token: id that opens each window; by default what comes before a document's text in training: the start
            token where documents begin with one, else the end token of the document before.
        max_tokens: use only the first whole documents whose ids are at most this many (at least one document).

    Raises:
        UsageError: `seq_len` below 2.
    """
    if seq_len < 2:
        raise UsageError(f"seq_len {seq_len}", needed="at least 2")
    ends, tokens = domain.ends("heldout"), domain.tokens("heldout")
    if max_tokens is not None:
        ends = ends[: max(1, int(np.searchsorted(ends[:, 0], max_tokens, side="right")))]
    _check_ends(domain, ends, len(tokens))
    first = np.concatenate([[0], ends[:-1, 0]])
    first += tokens[first] == (-1 if domain.start_token is None else domain.start_token)
    last = ends[:, 0] - 1
    pieces = -(-(last - first) // (seq_len - 1))
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.repeat(first, pieces) + number * (seq_len - 1)
    spans = np.stack([begin, np.minimum(begin + seq_len - 1, np.repeat(last, pieces))], axis=1)
    if start_token is None:
        start_token = domain.end_token if domain.start_token is None else domain.start_token
    return Windows(
        num_tokens=int(np.sum(last - first)),
        num_bytes=int(ends[-1, 1]),
        num_documents=len(ends),
        seq_len=seq_len,
        start_token=start_token,
        spans=spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")],
        _tokens=tokens.view(np.ndarray),
    )
