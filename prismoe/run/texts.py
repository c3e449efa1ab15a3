"""The stages that turn text into tokens, and what they depend on."""

from __future__ import annotations

import glob
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.state import read_state

if TYPE_CHECKING:
    from prismoe.config.settings import Config, DataConfig
    from prismoe.data.sources import DomainSource
    from prismoe.run.stages import Work

__all__ = ["SIFTED", "is_sifted", "prepare_part", "sift_texts", "sifting", "sources", "texts"]

SIFTED = "sift"


def prepare_part(work: Work, part: tuple[int, int] | None) -> dict[str, Any]:
    """The stage, or one share of it: see `prepare`."""
    from prismoe.data.prepare import prepare

    data = work.config.need("data")
    return prepare(
        sources(data),
        tokenizer=data.tokenizer or work.checkpoint.folder,
        out=work.folder("data"),
        heldout_fraction=data.heldout_fraction,
        files_per_shard=data.files_per_shard,
        max_bad=data.max_bad,
        keep=_keep(work),
        part=part,
        offline=work.offline,
        force=work.force,
        dry_run=work.dry_run,
        on_progress=work.on_progress,
    ).to_dict()


def sift_texts(work: Work) -> dict[str, Any]:
    """The stage: fluency is judged by the dense parent unless another model is named."""
    from prismoe.data.sift import sift

    data = work.config.need("data")
    filters = [
        replace(spec, arguments={"model": str(work.checkpoint.folder), **spec.arguments})
        if spec.name == "perplexity"
        else spec
        for spec in data.filters
    ]
    return sift(
        sources(data),
        filters=filters,
        deduplicate=data.deduplicate,
        decontaminate=_benchmarks(work.config),
        tokenizer=data.tokenizer or work.checkpoint.folder,
        out=work.folder(SIFTED),
        offline=work.offline,
        force=work.force,
        dry_run=work.dry_run,
        on_progress=work.on_progress,
    ).to_dict()


def sources(data: DataConfig) -> dict[str, DomainSource]:
    """The text of every domain, as `prepare` takes it."""
    from prismoe.data.prepare import DomainSource

    return {
        name: DomainSource(
            train=_tuple(domain.train),
            heldout=_tuple(domain.heldout),
            field=domain.field,
            select={key: _tuple(values) for key, values in (domain.select or {}).items()},
        )
        for name, domain in data.domains.items()
    }


def _keep(work: Work) -> Path | None:
    """The folder that says which documents are tokenised; a dry run may come before it is made."""
    if not is_sifted(work.config):
        return None
    folder = work.folder(SIFTED)
    return None if work.dry_run and not (folder / "manifest.json").exists() else folder


def is_sifted(config: Config) -> bool:
    """Whether anything is dropped before the text is tokenised."""
    return any(value not in ([], "none") for value in sifting(config).values())


def sifting(config: Config) -> dict[str, Any]:
    """What decides which documents are dropped, the content of benchmark files included.

    Benchmarks that are named when the text is prepared already change nothing about it: it stays as it was sifted, and
    the scores say so.
    """
    from prismoe.folder import sha256_file

    data = config.need("data")
    files = [sha256_file(Path(path)) if Path(path).is_file() else path for path in _benchmarks(config)]
    found: dict[str, Any] = {"filters": [asdict(spec) for spec in data.filters], "deduplicate": data.deduplicate}
    if data.decontaminate is None and config.out is not None and "prepare" in (state := read_state(Path(config.out))):
        unsifted: dict[str, Any] = {"filters": [], "deduplicate": "none", "decontaminate": []}
        before = state["sift"]["settings"]["sift"] if "sift" in state else unsifted
        if all(before[key] == value for key, value in found.items()):
            files = before["decontaminate"]
    return {**found, "decontaminate": files}


def _benchmarks(config: Config) -> tuple[str, ...]:
    """Files that the training text must have no 13 words in common with: unless told otherwise what `eval` scores."""
    from prismoe.run.evaluation import scored_files

    given = config.need("data").decontaminate
    if given is None:
        return tuple(str(path) for path in scored_files(config.eval))
    return () if given == "none" else _tuple(given)


def texts(config: Config) -> dict[str, Any]:
    """Everything that decides the token shards: the files with their sizes, and how they are read."""
    data = config.need("data")
    found: dict[str, Any] = {"tokenizer": data.tokenizer, "heldout_fraction": data.heldout_fraction}
    found["files_per_shard"] = data.files_per_shard
    for name, domain in data.domains.items():
        for split, paths in (("train", domain.train), ("heldout", domain.heldout)):
            texts = sorted(
                path
                for pattern in _tuple(paths)
                for path in glob.glob(pattern, recursive=True)  # noqa: PTH207 - patterns may be absolute
            )
            found[f"domains.{name}.{split}"] = {path: Path(path).stat().st_size for path in texts}
        found[f"domains.{name}.field"] = domain.field
        if domain.select:
            found[f"domains.{name}.select"] = domain.select
    return found


def _tuple(paths: str | list[str] | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths or ())
