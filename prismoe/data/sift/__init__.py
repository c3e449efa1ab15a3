"""`sift`: which documents of each domain are worth training on, before any is tokenised.

A sifted folder holds, for each domain that takes part,

- `<domain>/train-<i>.keep`  a byte for each record of the i-th training file, 1 where it is kept: for `prepare`;
- `<domain>/<file>.<column>` scores and fingerprints of its documents (`columns.py`);

`audit.html` and `audit.json` to look at, `fixed.json` (thresholds, and the files that were decided by them), `learned/`
with filters that learned from the text, and `manifest.json`, written last. A stopped sift continues file by file. Given
more files it adds: thresholds stay those of the first sift, and so does every decision, until `force`.

Memory does not grow with the text but for two bytes a document, and what `duplicates.py` says.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.data.filters import FilterSpec, Scorer
from prismoe.data.sift import audit, columns
from prismoe.data.sift.benchmarks import Benchmarks
from prismoe.data.sift.decide import KEPT, Copies, decide, reason_names, threshold
from prismoe.data.sift.scoring import bytes_per_token, score_part, texts_of
from prismoe.data.sift.work import Deduplicate, Part, Work, plan_work
from prismoe.data.sources import DomainSource
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError
from prismoe.folder import Manifest, claim, hash_files, write_atomic, write_json_atomic
from prismoe.progress import Progress, quiet
from prismoe.room import require_room

__all__ = ["Deduplicate", "FilterSpec", "Sifted", "SiftedDomain", "sift"]

KIND, FIXED, LEARNED = "sift", "fixed.json", "learned"


@dataclass(frozen=True)
class SiftedDomain:
    """One domain's training text. `dropped` says for each reason how many documents and bytes of text went.

    `bytes_per_token` is measured on a sample of its documents: tokens are estimates until they are made. None where no
    tokenizer was given.
    """

    name: str
    documents: int
    bytes: int
    kept_documents: int
    kept_bytes: int
    bytes_per_token: float | None
    dropped: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Sifted:
    """Receipt of `sift`. `filters` has, for each filter and domain, its threshold and what lies below it, whether or
    not another reason came first. `state` is made, kept (finished before) or planned (a dry run).
    """

    out: str
    state: str
    domains: tuple[SiftedDomain, ...]
    filters: tuple[dict[str, Any], ...]
    audit: str | None
    files_scored: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, folder: str | Path) -> Sifted:
        """That of a finished folder.

        Raises:
            InputError: it is not one.
        """
        manifest = Manifest.read(Path(folder))
        if manifest is None or manifest.kind != KIND:
            raise InputError("not a finished sift", where=str(folder), hint="`prismoe sift` first")
        return _receipt(manifest.config, Path(folder), "kept", 0, 0.0)


def sift(
    domains: Mapping[str, DomainSource],
    *,
    out: str | Path,
    filters: Sequence[FilterSpec] = (),
    deduplicate: Deduplicate = "none",
    decontaminate: Iterable[str | Path] = (),
    tokenizer: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Sifted:
    """Score every document, fix thresholds, and write what is kept, with an audit of what is not.

    Args:
        domains: text of each domain, as for `prepare`; its order decides which domain keeps a text that several have.
        out: the folder for all of them.
        filters: see `prismoe/data/filters`.
        deduplicate: drop later copies within and across domains, and what copies held-out text: `exact` (the same but
            for white space) or `near` (MinHash) too.
        decontaminate: benchmark files (.jsonl, .json, .txt); training documents with 13 words in a row of one go.
        tokenizer: of the model that is to read the text (a folder or tokenizer.json): the audit then says about how
            many tokens went. It decides nothing.
        force: forget thresholds and decisions of before.
        dry_run: check everything, write nothing.
        on_progress: called with bytes of the files read.

    Raises:
        UsageError: nothing to do, an unknown filter, domain or argument.
        InputError: text, model or benchmark that cannot be used; too few documents, or one score for all of them.
        NumericalError: a score that is not finite.
        ResourceError: the disk is full, or the folder holds something else.
    """
    out = Path(out)
    work = plan_work(domains, filters=filters, deduplicate=deduplicate, decontaminate=decontaminate, offline=offline)
    encoder = None if tokenizer is None else DocumentTokenizer.open(tokenizer)
    started = time.monotonic()
    files = _listed(work)
    manifest = None if force else Manifest.read(out)
    if manifest is not None and manifest.same_work(KIND, work.key) and manifest.config["files"] == files:
        return _receipt(manifest.config, out, "kept", 0, 0.0)
    size = sum(part.path.stat().st_size for part in work.parts)
    require_room(out, disk_bytes=size // 4)
    if dry_run:
        return Sifted(str(out), "planned", (), (), None, len(work.parts), 0.0)
    with claim(out, kind=KIND, key=work.key, force=force):
        Manifest.remove(out)
        folders = {part.domain: out / part.domain for part in work.parts}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
        fixed = _read_fixed(out)
        _check_fixed(fixed, work, out)
        work = _learned(work, out)
        scored = _score(work, folders, on_progress)
        thresholds = {
            domain: {
                item.column: fixed["thresholds"].get(domain, {}).get(item.column)
                or threshold(work, item, domain, folders[domain])
                for item in work.filters_of(domain)
            }
            for domain in work.domains
        }
        settled = frozenset(stem for stems in fixed["files"].values() for stem in stems)
        copies = decide(work, folders, thresholds, settled=settled)
        names = _write_keep(work, folders)
        config = _summary(work, folders, thresholds, files, encoder)
        _write_audit(work, folders, thresholds, copies, config, out)
        stems = {domain: [p.stem for p in work.parts if p.domain == domain] for domain in folders}
        write_json_atomic(out / FIXED, {"thresholds": thresholds, "files": stems})
        names += [name for name in (FIXED, audit.JSON, audit.HTML) if (out / name).is_file()]
        Manifest(KIND, work.parents, config, hash_files(out, names), work.key).write(out)
    return _receipt(config, out, "made", scored, time.monotonic() - started)


def _listed(work: Work) -> dict[str, list[str]]:
    """Files of every domain by their identities, in reading order."""
    names = dict.fromkeys(part.domain for part in work.parts)
    return {name: [f"{p.split} {p.stem}" for p in work.parts if p.domain == name] for name in names}


def _read_fixed(out: Path) -> dict[str, Any]:
    path = out / FIXED
    if not path.is_file():
        return {"thresholds": {}, "files": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        assert {"thresholds", "files"} <= found.keys()
    except (ValueError, AssertionError, AttributeError) as error:
        raise InputError("not what sift wrote", where=str(path), hint="--force makes all anew") from error
    return found


def _check_fixed(fixed: Mapping[str, Any], work: Work, out: Path) -> None:
    here = {(part.domain, part.stem) for part in work.parts}
    gone = [domain for domain, stems in fixed["files"].items() for stem in stems if (domain, stem) not in here]
    if gone:
        raise InputError(
            f"{len(gone)} files of domain {gone[0]} that decided before are changed or named no more",
            where=str(out),
            hint="--force sifts anew what there is now",
        )


def _learned(work: Work, out: Path) -> Work:
    """Filters that learn from the text do so, once."""
    bound = []
    for item in work.filters:
        if hasattr(item.module, "learn"):
            folder = out / LEARNED / f"{item.place}-{item.name}"
            domains = item.domains
            arguments = item.module.learn(item.arguments, lambda domains=domains: texts_of(work, domains), folder)
            item = dataclasses.replace(item, arguments=arguments)
        bound.append(item)
    return dataclasses.replace(work, filters=tuple(bound))


def _score(work: Work, folders: Mapping[str, Path], on_progress: Progress) -> int:
    """Score every file that has not been; returns how many."""
    todo = [part for part in work.parts if not columns.complete(folders[part.domain], part.stem)]
    wanted = {item.place for part in todo if part.split == "train" for item in work.filters_of(part.domain)}
    scorers: dict[str, Scorer] = {
        item.column: item.module.open_scorer(**item.arguments) for item in work.filters if item.place in wanted
    }
    benchmarks = Benchmarks(work.benchmarks) if work.benchmarks and todo else None
    total, done = sum(part.path.stat().st_size for part in todo), 0
    for part in todo:

        def on_bytes(count: int, what: str = f"bytes sifted: {part.domain}", base: int = done) -> None:
            on_progress(what, base + count, total)

        score_part(work, part, folders[part.domain], scorers=scorers, benchmarks=benchmarks, on_bytes=on_bytes)
        done += part.path.stat().st_size
    return len(todo)


def _write_keep(work: Work, folders: Mapping[str, Path]) -> list[str]:
    """The `.keep` files under the places that files have by now; returns their names."""
    names = []
    for folder in folders.values():
        for stale in folder.glob("train-*.keep"):
            stale.unlink()
    for part in work.parts:
        if part.split == "train":
            folder = folders[part.domain]
            numbers, why = (columns.read(folder, part.stem, column) for column in ("number", "why"))
            keep = np.zeros(int(numbers[-1]) + 1 if len(numbers) else 0, np.uint8)
            keep[numbers] = why == KEPT
            name = f"train-{part.index:05d}.keep"
            write_atomic(folder / name, keep.tobytes())
            names.append(f"{part.domain}/{name}")
    return names


def _summary(
    work: Work,
    folders: Mapping[str, Path],
    thresholds: Mapping[str, Mapping[str, float]],
    files: Any,
    encoder: DocumentTokenizer | None,
) -> dict[str, Any]:
    """What the manifest and the receipt say."""
    rows = [asdict(_domain(work, name, folders[name], encoder)) for name in work.domains]
    found = []
    for item in work.filters:
        for name in item.domains:
            limit = thresholds[name][item.column]
            found.append({"filter": item.name, "title": item.title, "domain": name, "drop": item.drop})
            found[-1] |= {"threshold": limit, **_below(work, item.column, name, folders[name], limit)}
    return {"domains": rows, "filters": found, "files": files, "thresholds": thresholds}


def _domain(work: Work, name: str, folder: Path, encoder: DocumentTokenizer | None) -> SiftedDomain:
    documents, sizes = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for part in _training(work, name):
        why, size = (columns.read(folder, part.stem, column) for column in ("why", "size"))
        documents += np.bincount(why, minlength=256)
        sizes += np.bincount(why, size, minlength=256).astype(np.int64)
    dropped = {
        words: {"documents": int(documents[reason]), "bytes": int(sizes[reason])}
        for reason, words in reason_names(work).items()
        if documents[reason]
    }
    return SiftedDomain(
        name=name,
        documents=int(documents.sum()),
        bytes=int(sizes.sum()),
        kept_documents=int(documents[KEPT]),
        kept_bytes=int(sizes[KEPT]),
        bytes_per_token=None if encoder is None else bytes_per_token(work, name, encoder),
        dropped=dropped,
    )


def _below(work: Work, column: str, name: str, folder: Path, limit: float) -> dict[str, int]:
    found = {"documents": 0, "documents_below": 0, "bytes": 0, "bytes_below": 0}
    for part in _training(work, name):
        scores, size = columns.read(folder, part.stem, column), columns.read(folder, part.stem, "size")
        below = scores < limit
        found["documents"] += int((~np.isnan(scores)).sum())
        found["documents_below"] += int(below.sum())
        found["bytes"] += int(size.sum(dtype=np.int64))
        found["bytes_below"] += int(size[below].sum(dtype=np.int64))
    return found


def _training(work: Work, name: str) -> list[Part]:
    return [part for part in work.parts if part.domain == name and part.split == "train"]


def _write_audit(
    work: Work,
    folders: Mapping[str, Path],
    thresholds: Mapping[str, Mapping[str, float]],
    copies: Copies,
    config: Mapping[str, Any],
    out: Path,
) -> None:
    found = audit.collect(work, folders, thresholds, copies, config)
    write_json_atomic(out / audit.JSON, found)
    if audit.can_draw():
        write_atomic(out / audit.HTML, audit.page(found).encode())


def _receipt(config: Mapping[str, Any], out: Path, state: str, scored: int, seconds: float) -> Sifted:
    page = out / audit.HTML
    return Sifted(
        out=str(out),
        state=state,
        domains=tuple(SiftedDomain(**row) for row in config["domains"]),
        filters=tuple(config["filters"]),
        audit=str(page) if page.is_file() else None,
        files_scored=scored,
        seconds=seconds,
    )
