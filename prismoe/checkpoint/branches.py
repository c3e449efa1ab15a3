"""Several fine-tuned checkpoints of one base, side by side: what a plan of the method `branch` takes its neurons from.

Everything that could make them strangers to each other is compared before any weight is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, check_tensors
from prismoe.errors import InputError
from prismoe.strictjson import read_json

__all__ = ["Branched", "branch_key"]

OWN = (
    *("attention_dropout", "initializer_range", "use_cache", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that fine-tunes of one base may differ in: none changes what a layer computes. The dtypes that are stored are
compared tensor by tensor."""
SPELLING = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""What of tokenizer.json decides the ids of a text; fine-tuning tools rewrite the rest (padding, templates) freely."""


def branch_key(number: int, name: str) -> str:
    """How `Branched` calls tensor `name` of checkpoint `number`: 0 is the base, whose names stay."""
    return f"branch {number}: {name}" if number else name


class Branched(Checkpoint):
    """A base with branches beside it: the base in everything, but its `tensors` are those of all, see `branch_key`."""

    def __init__(self, base: Checkpoint, branches: Sequence[Checkpoint]) -> None:
        self._donors = (base, *branches)
        self.folder, self.config = base.folder, base.config
        self.tensors = MappingProxyType(
            {branch_key(n, name): info for n, donor in enumerate(self._donors) for name, info in donor.tensors.items()}
        )
        self._maps = {}
        self._manifest = None

    @classmethod
    def beside(
        cls,
        base: Checkpoint,
        branches: Sequence[str | Path | Checkpoint],
        *,
        fingerprints: Sequence[str] | None = None,
        offline: bool = False,
    ) -> Branched:
        """`base` with `branches` (folders or hub names) that were fine-tuned from it.

        Args:
            fingerprints: what the branches must be, where a plan was made of them before.

        Raises:
            InputError: a branch is no checkpoint, is built in another way than the base (every field that differs is
                named), has another tokenizer (its experts would read other words: nothing later would show it), or is
                not the one of its fingerprint. A folder without tokenizer is taken as the base's.
        """
        opened = [Checkpoint.open(branch, offline=offline) for branch in branches]
        found = cls(base, opened)
        where = f"branches of {base.folder}"
        if differing := "; ".join(_differences(found.donors)):
            raise InputError(differing, where=where, needed="checkpoints that differ in their weights alone")
        if differing := "; ".join(_tokenizers(found.donors)):
            hint = "copy the base's over the branch's if you know that they give the same ids"
            raise InputError(f"tokenizers: {differing}", where=where, needed="one tokenizer", hint=hint)
        if fingerprints is not None:
            _check_fingerprints(opened, fingerprints, where=where)
        return found

    @property
    def donors(self) -> tuple[Checkpoint, ...]:
        return self._donors

    def check(self, file: Path) -> None:
        """By the donor whose shard it is."""
        for donor in self._donors:
            if file.parent == donor.folder:
                donor.check(file)

    @property
    def has_weights(self) -> bool:
        return all(donor.has_weights for donor in self._donors)

    @cached_property
    def family(self) -> DenseConfig:
        """The base's, as of each branch."""
        return self._donors[0].family

    @cached_property
    def fingerprint(self) -> str:
        """The base's."""
        return self._donors[0].fingerprint


def _differences(donors: Sequence[Checkpoint]) -> Iterator[str]:
    """One entry for each field or tensor that is not the same everywhere: "hidden_size: base 64, branch 2 128"."""
    families = [donor.family for donor in donors]
    names = [item.name for item in fields(DenseConfig) if item.name not in OWN]
    structure = [_told(name, [getattr(family, name) for family in families]) for name in names]
    yield from filter(None, structure)
    if any(structure):  # the tensors would only say the same again
        return
    weighty = [donor for donor in donors if donor.has_weights]
    for donor in weighty:
        shapes = {name: info.shape for name, info in donor.tensors.items()}
        check_tensors(donor.family, shapes, where=str(donor.folder))
    if len(weighty) == len(donors):
        stored = {at.source for at in donors[0].places.values()}
        yield from _first(_told(f"dtype of {name}", [donor.tensors[name].dtype for donor in donors]) for name in stored)


def _check_fingerprints(branches: Sequence[Checkpoint], fingerprints: Sequence[str], *, where: str) -> None:
    if len(branches) != len(fingerprints):
        raise InputError(f"{len(branches)} branches", where=where, needed=f"the plan's {len(fingerprints)}")
    for number, (branch, needed) in enumerate(zip(branches, fingerprints, strict=True), start=1):
        if branch.fingerprint != needed:
            raise InputError(
                f"is not branch {number} of the plan",
                where=str(branch.folder),
                needed=f"fingerprint {needed[:12]}…, found {branch.fingerprint[:12]}…",
                hint="give the plan's branches, unchanged and in its order, or make a new plan",
            )


def _told(name: str, values: Sequence[Any]) -> str:
    """What stands where it differs from the base, or nothing."""
    others = [f"branch {number} {value}" for number, value in enumerate(values) if number and value != values[0]]
    return f"{name}: base {values[0]}, {', '.join(others)}" if others else ""


def _first(told: Iterable[str], most: int = 3) -> Iterator[str]:
    found = sorted(filter(None, told))
    yield from found[:most]
    if len(found) > most:
        yield f"and {len(found) - most} more tensors"


def _tokenizers(donors: Sequence[Checkpoint]) -> Iterator[str]:
    """Files that differ, with a short hash of what matters in each."""
    readers: dict[str, Callable[[Path], str]] = {"tokenizer.json": _spelling, "tokenizer.model": _digest}
    for file, read in readers.items():
        paths = [donor.folder / file for donor in donors]
        base = paths[0].read_bytes() if paths[0].is_file() else b""
        others = [path if base and path.is_file() and path.read_bytes() != base else None for path in paths]
        if any(others):
            first = read(paths[0])
            yield _told(file, [first, *(read(path) if path else first for path in others[1:])])


def _spelling(path: Path) -> str:
    """Over what decides the ids of a text."""
    parts = read_json(path)
    return hashlib.sha256(repr([_plain(parts.get(name)) for name in SPELLING]).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """One form for what the versions of a library write apart: order, defaults left out, merges as text or as pairs."""
    if isinstance(value, dict):
        if merges := value.get("merges"):
            value = {**value, "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]}
        return [(key, _plain(value[key])) for key in sorted(value) if value[key] not in (None, False)]
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
