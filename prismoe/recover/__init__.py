"""`recover`: each layer's mixture learns to give what its dense FFN gives, from few tokens and one layer at a time.

LaDiMo's way (Kim et al. 2024, arXiv 2408.04278): a mean squared error on the output of every FFN, no language-model
loss, and a number of experts chosen from what was measured. One layer is in memory at a time. Layers see what those
below them give once they are recovered, unless they are asked to learn each by itself from the dense model's own
hidden states, as in the paper: errors add up otherwise (docs/recovery.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain
from prismoe.errors import InterruptedRun
from prismoe.folder import claim, remove_folder
from prismoe.progress import Progress, quiet
from prismoe.recover.settings import RecoverConfig
from prismoe.strictjson import read_json

if TYPE_CHECKING:
    from prismoe.recover.job import Job
    from prismoe.recover.layers import LayerDone

__all__ = ["RecoverConfig", "Recovered", "RecoveredLayer", "recover"]


@dataclass(frozen=True)
class RecoveredLayer:
    """One layer. Errors are relative Frobenius errors of its mixture's output over text that nothing was learned from,
    against the dense FFN's output; with `inputs` "mixture" against the output that leads back to the dense stream (but
    where it is normed before it is added). Then, where K has changed, layers below still had the K that was learned
    with: `after` of all but the first is not exactly that of the written folder.

    Attributes:
        before, after: of the folder as it was, and as it is now, each with its own K.
        top_k: experts a token, chosen now.
        learned: False where learning did not lower the error: the layer stays as it was, but for the factor of its K.
        errors: with K = 1 … E experts on, the routed output by its best factor for every K but the one that was
            learned with; `factor` is that of the K chosen, folded into the down matrices.
        mass: mean share of the K = 1 … E largest router scores in the sum of all.
        load: share of the assignments of each expert.
    """

    layer: int
    before: float
    after: float
    top_k: int
    learned: bool
    factor: float
    errors: tuple[float, ...]
    mass: tuple[float, ...]
    load: tuple[float, ...]


@dataclass(frozen=True)
class Recovered:
    """Receipt of `recover`; without `state` and what follows it also `recovery.json` in the folder.

    `tokens` were read, `held_tokens` of them to measure on. `top_k_before` is that of the mixture, `learning_k` the
    one that was learned with. `state` is "written", "already complete" or "dry run"; sizes in bytes, at most.
    """

    target: str
    train: str
    inputs: str
    tokens: int
    held_tokens: int
    num_experts: int
    top_k_before: int
    learning_k: int
    layers: tuple[RecoveredLayer, ...]
    warnings: tuple[str, ...]
    out: str = ""
    state: str = ""
    memory_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0

    @property
    def mean_top_k(self) -> float:
        """Experts a token, mean over the layers that have experts."""
        return sum(layer.top_k for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def recover(
    source: str | Path | Checkpoint,
    moe: str | Path | Checkpoint,
    *,
    config: RecoverConfig | None = None,
    domains: Iterable[Domain | str | Path],
    weights: Mapping[str, float] | str = "proportional",
    out: str | Path,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Recovered:
    """Write `moe` into `out` with mixtures that have learned the FFNs of `source`; the architecture stays.

    In memory: one layer of the dense model, embedding and head, and one layer of the mixture in float32 with gradients
    and moments of what learns. On disk, while it works: hidden states of the text, six times (four with `inputs`
    "dense"). A stopped call goes on when it is made again, with the layer it was at, and gives the same bytes.

    Args:
        source: the dense checkpoint, its folder or hub name.
        moe: a mixture of it: what `convert` wrote.
        domains: prepared domains (or their folders); their train splits are read.
        weights: how the text is shared out among them, as in `pretrain`.
        dry_run: check everything, estimate memory and disk, compute nothing.

    Raises:
        UsageError: a K without a gradient for the router, a budget above the number of experts, a device that is not
            here, or text for less than two windows.
        InputError: not a mixture of `source`, or a damaged or foreign checkpoint or domain.
        ResourceError: not enough memory or disk, or `out` is in use or not ours.
        NumericalError: an error that is not finite, naming the layer.
        InterruptedRun: interrupted by the user; the same call goes on.
    """
    from prismoe.recover.job import prepare  # torch and transformers are heavy: only here

    started, out = time.monotonic(), Path(out)
    job = prepare(
        Checkpoint.open(source, offline=offline),
        Checkpoint.open(moe, offline=offline),
        config or RecoverConfig(),
        domains=[domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains],
        weights=weights,
        out=out,
        force=force,
    )
    found: dict[str, Any] = {**_receipt(job, []), "layers": (), "warnings": ()}
    state = "dry run"
    if not dry_run:
        state = _work(job, out, force=force, on_progress=on_progress)
        found = _read(out)
    return Recovered(
        **found,
        out=str(out),
        state=state,
        memory_bytes=job.memory_bytes,
        disk_bytes=job.disk_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _work(job: Job, out: Path, *, force: bool, on_progress: Progress) -> str:
    from prismoe.convert.stream import finished, write_output
    from prismoe.recover.job import KIND
    from prismoe.recover.layers import recover_layers
    from prismoe.recover.output import recovered_folder
    from prismoe.train.device import num_threads

    scratch = out / "scratch"
    with claim(out, kind=KIND, key=job.key, force=force):
        there = finished(out, kind=KIND, key=job.key) is not None
        if not there:
            try:
                with num_threads(job.config.threads):
                    done = recover_layers(job, scratch, on_progress=on_progress)
            except KeyboardInterrupt:
                raise InterruptedRun("stopped", where=str(out), hint="the same command continues") from None
            receipt = _receipt(job, done)
            top_k = tuple(layer["top_k"] for layer in receipt["layers"])
            write_output(recovered_folder(job, done, top_k, receipt), out, on_progress=on_progress)
        remove_folder(scratch)
    return "already complete" if there else "written"


def _receipt(job: Job, done: list[LayerDone]) -> dict[str, Any]:
    """What recovery.json holds."""
    from prismoe.recover.choice import choose_top_k

    config, errors = job.config, [layer.measured.errors for layer in done]
    top_k = (job.learning_k,) * len(done)
    if done and (config.budget is not None or config.error is not None):
        top_k = choose_top_k(errors, budget=config.budget, error=config.error, by_layer=job.by_layer)
    layers = [
        {
            "layer": layer.layer,
            "before": layer.before,
            "after": layer.measured.errors[k - 1],
            "top_k": k,
            "learned": layer.learned,
            "factor": layer.measured.factors[k - 1],
            **{name: list(getattr(layer.measured, name)) for name in ("errors", "mass", "load")},
        }
        for layer, k in zip(done, top_k, strict=True)
    ]
    return {
        "target": job.target.name,
        "train": config.train,
        "inputs": config.inputs,
        "tokens": job.text.num_tokens,
        "held_tokens": len(job.rows[1]),
        "num_experts": job.num_experts,
        "top_k_before": job.top_k,
        "learning_k": job.learning_k,
        "layers": layers,
        "warnings": list(_warnings(job, layers)),
    }


def _warnings(job: Job, layers: list[dict[str, Any]]) -> Iterable[str]:
    stuck = [str(row["layer"]) for row in layers if not row["learned"] and row["before"] > 1e-5]
    if stuck:
        yield f"learning did not lower the error of layer {', '.join(stuck)}: more tokens, or a lower recover.lr"
    limit = job.config.error
    above = [str(row["layer"]) for row in layers if limit is not None and row["after"] > limit]
    if above:
        yield f"no number of experts brings layer {', '.join(above)} to an error of {limit:g}: the best one was taken"
    idle = sum(share == 0 for row in layers for share in row["load"])
    if idle:
        yield f"{idle} experts got no token of the text that was kept back: a higher recover.balance keeps them in use"
    alone = [str(row["layer"]) for row in layers if row["top_k"] == 1 < job.learning_k]
    if alone:
        why = "where weights are divided by their sum no text teaches its router; pretrain with router=frozen"
        yield f"layer {', '.join(alone)} gives a token one expert: {why}"
    if job.plan is not None and len({row["top_k"] for row in layers}) > 1:
        yield "moe.plan was left behind: it has one K for all layers"


def _read(out: Path) -> dict[str, Any]:
    from prismoe.recover.output import RECEIPT

    found = read_json(out / RECEIPT)
    rows: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in found["layers"]
    ]
    return {**found, "layers": tuple(RecoveredLayer(**row) for row in rows), "warnings": tuple(found["warnings"])}
