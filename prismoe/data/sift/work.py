"""What there is to sift: filters checked and bound to domains, files with their identities, the key of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from prismoe import registry
from prismoe.data.filters import WEB_DOMAINS, FilterSpec
from prismoe.data.shards import SPLITS, Split
from prismoe.data.sources import DomainSource, resolve
from prismoe.errors import InputError, UsageError
from prismoe.folder import sha256_file

__all__ = ["Deduplicate", "Filter", "Part", "Work", "plan_work"]

Deduplicate = Literal["none", "exact", "near"]
_FORMAT = 2
_PACKAGE = "prismoe.data.filters"


@dataclass(frozen=True)
class Filter:
    """A filter of this run: its file, all its arguments, the names of its domains, the share it drops (None: rules)."""

    place: int
    name: str
    module: ModuleType
    arguments: dict[str, Any]
    domains: tuple[str, ...]
    drop: float | None
    fingerprint: str

    @property
    def column(self) -> str:
        return f"score-{self.place}"

    @property
    def title(self) -> str:
        """For people: the name, and what else tells two filters of one name apart."""
        return self.name if self.drop is None else f"{self.name} (worst {100 * self.drop:g} %)"


@dataclass(frozen=True)
class Part:
    """One file of a domain. `stem` is its identity: content and how it is read; `index` its place among the split's."""

    domain: str
    split: Split
    index: int
    path: Path
    stem: str


@dataclass(frozen=True)
class Work:
    """Everything that decides the result. `parts` are in the order in which the first of several copies stays."""

    filters: tuple[Filter, ...]
    deduplicate: Deduplicate
    benchmarks: tuple[Path, ...]
    sources: Mapping[str, DomainSource]
    parts: tuple[Part, ...]
    parents: dict[str, str]
    key: str

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that take part."""
        return tuple(dict.fromkeys(part.domain for part in self.parts if part.split == "train"))

    def filters_of(self, domain: str) -> tuple[Filter, ...]:
        return tuple(item for item in self.filters if domain in item.domains)

    def columns_of(self, part: Part) -> list[str]:
        """What has to be known of a file's documents."""
        hashes = {"none": [], "exact": ["hash"], "near": ["hash", "bands"]}[self.deduplicate]
        if part.split == "heldout":
            return ["number", "size", *hashes]
        return [
            "number",
            "size",
            *hashes,
            *(["benchmark"] if self.benchmarks else []),
            *(item.column for item in self.filters_of(part.domain)),
        ]


def plan_work(
    domains: Mapping[str, DomainSource],
    *,
    filters: Sequence[FilterSpec],
    deduplicate: Deduplicate,
    decontaminate: Iterable[str | Path],
    offline: bool,
) -> Work:
    """Check everything that can be checked before the first document is read.

    Raises:
        UsageError: nothing to do, an unknown filter, domain or argument, a share for a rule set.
        InputError: text, benchmark file or model that is not there, one file twice.
    """
    if not domains:
        raise UsageError("no domains to sift")
    bound = tuple(_bind(place, spec, tuple(domains)) for place, spec in enumerate(filters))
    benchmarks = tuple(Path(path) for path in decontaminate)
    for path in benchmarks:
        if not path.is_file():
            raise InputError("no such file", where=f"decontaminate: {path}")
    if not bound and deduplicate == "none" and not benchmarks:
        raise UsageError("nothing to sift by", needed="data.filters, data.deduplicate or data.decontaminate")
    everywhere = deduplicate != "none" or bool(benchmarks)
    parts: list[Part] = []
    for name, source in domains.items():
        if everywhere or any(name in item.domains for item in bound):
            files = resolve(name, source, offline=offline)
            wanted = SPLITS if deduplicate != "none" else SPLITS[:1]
            parts += _parts(name, source, {split: files[split] for split in wanted})
    parts.sort(key=lambda part: part.split == "train")  # held-out text is first: what copies it is not trained on
    decides = {
        "format": _FORMAT,
        "filters": [[item.name, item.fingerprint, item.drop, item.domains, _plain(item)] for item in bound],
        "deduplicate": deduplicate,
        "benchmarks": [sha256_file(path) for path in benchmarks],
    }
    return Work(
        filters=bound,
        deduplicate=deduplicate,
        benchmarks=benchmarks,
        sources=domains,
        parts=tuple(parts),
        parents={f"benchmark {path.name}": sha256_file(path) for path in benchmarks},
        key=hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest(),
    )


def _plain(item: Filter) -> dict[str, Any]:
    """Arguments but the model's place: its fingerprint says what it is."""
    return {name: value for name, value in item.arguments.items() if name != "model"}


def _bind(place: int, spec: FilterSpec, names: tuple[str, ...]) -> Filter:
    where = f"filter {spec.name}"
    module = registry.load(_PACKAGE, spec.name, where="data.filters")
    arguments = registry.arguments(module.open_scorer, spec.arguments, where=where)
    default = getattr(module, "DROP", None)
    if default is None and spec.drop is not None:
        raise UsageError(f"drop {spec.drop}", where=where, hint="a rule set has thresholds of its own: leave drop out")
    if spec.domains == "all":
        chosen = names
    elif spec.domains is None:
        chosen = tuple(name for name in names if name in WEB_DOMAINS)
        if not chosen:
            needed = f"domains: (some of {', '.join(names)}, or all)"
            raise UsageError(f"no domain named {' or '.join(WEB_DOMAINS)}", where=where, needed=needed)
    else:
        asked = [spec.domains] if isinstance(spec.domains, str) else spec.domains
        for name in asked:
            if name not in names:
                hint = registry.suggestion(name, names)
                raise UsageError(f"no domain {name}", where=f"{where}: domains", hint=hint)
        chosen = tuple(name for name in names if name in asked)
    drop = None if default is None else spec.drop or default
    return Filter(place, spec.name, module, arguments, chosen, drop, module.fingerprint(arguments))


def _parts(name: str, source: DomainSource, files: Mapping[Split, Sequence[Path]]) -> list[Part]:
    read = [source.field, sorted((key, list(values)) for key, values in source.select.items())]
    parts: list[Part] = []
    seen: dict[str, Path] = {}
    for split, paths in files.items():
        for index, path in enumerate(paths):
            stem = hashlib.sha256(json.dumps([sha256_file(path), *read, split]).encode()).hexdigest()[:16]
            if stem in seen:
                raise InputError(f"the same as {seen[stem]}", where=str(path), hint="name one of them")
            seen[stem] = path
            parts.append(Part(name, split, index, path, stem))
    return parts
