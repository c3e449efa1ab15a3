"""`reference_loss`: the held-out losses by domain that a dynamic mixing rule compares a training run with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from prismoe.checkpoint import Checkpoint
from prismoe.data.reference import DomainReference, Reference, heldout_sha256
from prismoe.data.shards import Domain
from prismoe.errors import InputError, UsageError
from prismoe.evaluate import evaluate
from prismoe.folder import MANIFEST, Manifest, sha256_file
from prismoe.lock import hold_file
from prismoe.progress import Progress, quiet

__all__ = ["find_domains", "reference_loss"]


def reference_loss(
    model: str | Path | Checkpoint,
    domains: Iterable[Domain | str | Path],
    *,
    out: str | Path | None = None,
    seq_len: int = 512,
    max_tokens: int | None = 65_536,
    batch_size: int = 16,
    threads: int = 0,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Reference:
    """Measure `model`, dense or mixture, on the held-out split of `domains`, and write the losses to `out` (JSON).

    What `pretrain` measures on its way is comparable when `seq_len` and `max_tokens` are its `seq_len` and
    `eval_tokens` (the defaults here are the defaults there). No router loss is in it. Sheared-LLaMA measures the dense
    parent where it cannot fit a scaling law (arXiv 2310.06694, section 2.2).

    Raises:
        UsageError: no domain, or `out` is a folder.
        InputError: a model or domain that is damaged, or was made with another tokenizer.
        ResourceError: another process makes `out`, or it cannot be written.
        NumericalError: a loss that is not finite.
    """
    opened = [domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains]
    if out is not None and Path(out).is_dir():
        raise UsageError(
            "a folder", where=str(out), needed="the name of a file", hint=f"{Path(out) / 'reference.json'}"
        )
    with hold_file(Path(out)) if out is not None else nullcontext():
        scores = evaluate(
            {"reference": model},
            opened,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            threads=threads,
            offline=offline,
            on_progress=on_progress,
        )
        losses = {}
        for domain in opened:
            score = scores.of("reference", domain.name)
            losses[domain.name] = DomainReference(
                loss=score.loss,
                standard_error=score.standard_error,
                scored_tokens=score.scored_tokens,
                documents=score.documents,
                domain_sha256=sha256_file(domain.folder / MANIFEST),
                heldout_sha256=heldout_sha256(domain),
            )
        found = Reference(
            losses=losses,
            model=scores.models["reference"],
            tokenizer_sha256=opened[0].tokenizer_sha256,
            seq_len=seq_len,
            max_tokens=max_tokens,
        )
        if out is not None:
            found.write(Path(out))
        return found


def find_domains(folder: str | Path) -> list[Domain]:
    """The prepared domain in `folder`, or all those one level below it, or below its `data` (a run folder), by name.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    for place in (folder, folder / "data"):
        candidates = [place, *sorted(place.iterdir())] if place.is_dir() else []
        manifests = {path: Manifest.read(path) for path in candidates if path.is_dir()}
        found = [path for path, manifest in manifests.items() if manifest is not None and manifest.kind == "domain"]
        if found:
            return [Domain.open(path) for path in found]
    raise InputError("no prepared domain", where=str(folder), hint="make them with `prismoe prepare`")
