"""`pretrain`: go on training a checkpoint (or train one from its config alone) on weighted domains.

Dense or mixture, the model is the stock class and what comes out is a stock folder. A dense checkpoint with a plan is
trained as the mixture that `convert` would write, without writing it first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.mixture import Mixture
from prismoe.data.reference import resolve_reference
from prismoe.data.rules import STATIC, Mixing
from prismoe.data.shards import Domain
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.folder import Manifest, bytes_there, claim, hash_files, remove_folder, sha256_file, write_json_atomic
from prismoe.plan import Plan
from prismoe.progress import Progress, quiet
from prismoe.train.alarms import warnings_of
from prismoe.train.engine.layout import Layout, launched
from prismoe.train.fit import check_fit, check_room, check_teacher
from prismoe.train.metrics import read_metrics
from prismoe.train.origin import Origin
from prismoe.train.recorded import as_recorded, differences
from prismoe.train.routers import arguments_of, check_steps
from prismoe.train.settings import MAY_CHANGE, PretrainConfig
from prismoe.train.stopping import StopRequest, stop_on_signal

if TYPE_CHECKING:
    from prismoe.train.engine import Engine

__all__ = ["PretrainConfig", "Trained", "pretrain"]

KIND, MODEL_KIND, SETTINGS = "pretrain", "model", "settings.json"


@dataclass(frozen=True)
class Trained:
    """Receipt. `loss` is the language-model loss alone, in nats a token; `heldout` per domain before and after;
    `teacher_loss` the divergence from the teacher, first and last.

    `mixture` is requested against achieved shares, `weight_history` what the mixing `rule` made of the weights and
    `weights` what it recommends for another run. `runtime` is by what function the experts computed, and what was set
    in the process for speed. `skipped` steps changed no weight, and the run `went_back` to a
    checkpoint that often. `warnings` says what a person should look at: a balance loss that
    is off, experts without a token of held-out text. `resumed_from` counts the steps that an earlier command had done;
    `seconds` and `tokens_per_second` speak of this command and are None when nothing was left to do.
    """

    model: Path
    steps: int
    tokens: int
    parameters: int
    runtime: dict[str, Any]
    first_loss: float
    last_loss: float
    heldout_before: dict[str, float]
    heldout_after: dict[str, float]
    mixture: list[dict[str, Any]]
    rule: str
    weight_history: list[dict[str, Any]]
    weights: dict[str, float]
    router: str | None
    router_gradient_norm: tuple[float, float] | None
    idle_experts: int | None
    skipped: int
    went_back: int
    warnings: list[str]
    resumed_from: int
    seconds: float | None
    tokens_per_second: float | None
    teacher_loss: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "model": str(self.model)}


def pretrain(
    source: str | Path | Checkpoint,
    config: PretrainConfig,
    *,
    domains: Iterable[Domain | str | Path],
    weights: Mapping[str, float] | str = "proportional",
    out: str | Path,
    plan: Plan | None = None,
    target: str = "mixtral",
    pad_to: int = 32,
    absorb: bool = False,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Trained | None:
    """Train the model of `source` on `domains` mixed by `weights` and leave it in `out/model`.

    `out` also holds `metrics.jsonl` and, while training, `checkpoints/`. The same command continues a stopped run and
    gives the same bytes as one that never stopped; a finished run is recognised and left alone. With `dry_run`
    everything is checked, nothing is written and None is returned. Under torchrun every process calls this with the
    same arguments, `out` lies on a disk that all of them see, and the result is the same up to the order of sums.

    Args:
        plan: train the mixture that this plan makes of `source`, a dense checkpoint; `target`, `pad_to` and `absorb`
            are those of `convert`. Each process makes its own part from the dense tensors, in memory.

    Raises:
        UsageError: settings that do not fit together, the model, the domains or the number of processes.
        InputError: a checkpoint or domain that is damaged or made with another tokenizer.
        ResourceError: `out` is in use or not ours, or another process is gone.
        NumericalError: loss, gradient or router gradient that cannot be.
        InterruptedRun: SIGINT or SIGTERM came; the state is saved.
    """
    out = Path(out)
    config = replace(config, arguments=arguments_of(config.router, config.arguments))
    check_steps(config.router, config.arguments, steps=config.steps)
    checkpoint = Checkpoint.open(source, offline=offline)
    opened = [domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains]
    mixture = Mixture(
        opened,
        weights=weights,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_epochs=config.max_epochs,
        attend=config.attend,
    )
    mixture.check(config.steps)
    mixing, config = _mixing(config, mixture)
    if (config.init == "source" or plan is not None) and not checkpoint.has_weights:
        raise InputError(
            "no weights", where=str(checkpoint.folder), hint="pretrain.init=random trains from the config alone"
        )
    check_fit(checkpoint, mixture.domains, seq_len=config.seq_len)
    if plan is None:
        origin = Origin.folder(checkpoint)
    else:
        origin = Origin.upcycled(checkpoint, plan, target=target, pad_to=pad_to, absorb=absorb)
    teacher = _teacher(config, checkpoint, origin, offline=offline)
    if teacher is not None:
        check_teacher(teacher, origin.config, config=config, tokenizer_sha256=mixture.domains[0].tokenizer_sha256)
        config = replace(config, teacher=teacher.fingerprint)  # by what it is, not by where it lies
        teacher = teacher if config.teacher_weight else None
    layout = Layout(world=launched()[1], replicate=config.replicate, experts=config.expert_parallel)
    layout.check(batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, num_experts=origin.num_experts)
    parents = {**origin.parents, **{f"domain {d.name}": _domain_hash(d) for d in mixture.domains}}
    parents |= {"teacher": config.teacher} if config.teacher else {}
    decisive = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    if origin.num_experts:  # balance statistics are those of what all processes compute at once
        decisive["sequences_at_once"] = config.micro_batch_size * layout.world or config.batch_size
    settings = {"pretrain": asdict(config), "weights": mixture.weights(0)}
    job = {"pretrain": decisive, "weights": settings["weights"], "parents": parents}
    job = as_recorded(out / SETTINGS, job)
    if config.init == "source":
        check_room(
            out,
            config,
            layout,
            origin.config,
            num_parameters=origin.num_parameters,
            num_taught=_num_taught(teacher),
            there=bytes_there(out, kind=KIND, key=_hash(job), force=force),
        )
    if dry_run:
        return None
    from prismoe.train.engine import Engine

    # A signal that comes while the finished model is written is noted, and the writing goes on to its end.
    with (
        Engine.start(layout, device=config.device, timeout=config.timeout) as engine,
        _claimed(out, job, engine, force=force),
        stop_on_signal() as stop,
    ):
        done = Manifest.read(out)
        if done is not None:
            result = done.config["result"]
            return _receipt(out, result, resumed_from=result["steps"], seconds=None, steps_run=0)
        result, finished = _train(origin, teacher, config, mixing, engine, out, settings, _hash(job), stop, on_progress)
        engine.barrier("the model is written")
        if engine.first:
            files = hash_files(out, ["metrics.jsonl", "model/manifest.json"])
            record = Manifest(
                kind=KIND, parents=parents, config={**settings, "result": result}, files=files, key=_hash(job)
            )
            record.write(out)
            remove_folder(out / "checkpoints")
        stop.after(f"step {config.steps}, the last: the model is written", where=str(out))
        resumed_from, seconds, steps_run = finished
        return _receipt(out, result, resumed_from=resumed_from, seconds=seconds, steps_run=steps_run)


@contextmanager
def _claimed(out: Path, job: dict[str, Any], engine: Engine, *, force: bool) -> Iterator[None]:
    """Rank 0 holds the folder for all; the others wait until it does."""
    if not engine.first:
        engine.barrier("rank 0 has the folder")
        yield
        return
    if not force and (changed := differences(out / SETTINGS, job)):
        raise ResourceError(
            f"output folder holds a different job ({'; '.join(changed)})",
            where=str(out),
            hint=f"--force begins anew, --out elsewhere; only these may change: {', '.join(MAY_CHANGE)}",
        )
    with claim(out, kind=KIND, key=_hash(job), force=force):
        if not (out / SETTINGS).exists():
            write_json_atomic(out / SETTINGS, job)
        if Manifest.read(out) is not None:
            remove_folder(out / "checkpoints")
        engine.barrier("rank 0 has the folder")
        yield


def _train(
    origin: Origin,
    teacher: Checkpoint | None,
    config: PretrainConfig,
    mixing: Mixing,
    engine: Engine,
    out: Path,
    settings: dict[str, Any],
    key: str,
    stop: StopRequest,
    on_progress: Progress,
) -> tuple[dict[str, Any], tuple[int, float, int]]:
    from prismoe.train.documents import check_apart
    from prismoe.train.experts import experts_in_use
    from prismoe.train.fastest import chosen_experts
    from prismoe.train.loop import train
    from prismoe.train.model import place_model, save_model
    from prismoe.train.runtime import runtime
    from prismoe.train.teacher import Teacher

    tuned = runtime(threads=config.threads, fast_matmul=config.fast_matmul, keep_memory=config.keep_memory)
    with tuned as found:
        engine.at("choosing how experts compute")
        experts = chosen_experts(origin, config, engine=engine, out=out, on_progress=on_progress)
        engine.at("reading the weights")
        model = place_model(
            origin,
            engine,
            seed=config.seed if config.init == "random" else None,
            bf16=config.precision == "bf16",
            recompute=config.recompute,
            experts=experts,
            compiled=config.compile,
        )
        computed = {"experts": experts_in_use(model), **found}
        if config.attend == "document":
            check_apart(model, seq_len=config.seq_len, bf16=config.precision == "bf16")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.init == "random":
            check_room(
                out,
                config,
                engine.layout,
                model.config.to_dict(),
                num_parameters=num_parameters,
                num_taught=_num_taught(teacher),
                there=bytes_there(out, kind=KIND, key=key),
            )
        plan = origin.plan() if config.init == "source" else None
        learned_from = None
        if teacher is not None:
            engine.at("reading the weights of the teacher")
            learned_from = Teacher.load(teacher, config, engine)
        finished = train(
            model,
            config,
            mixing=mixing,
            engine=engine,
            out=out,
            plan=plan,
            trained=origin.trained,
            stop=stop,
            on_progress=on_progress,
            teacher=learned_from,
        )
        files = save_model(model, origin, out / "model", engine=engine)
    if engine.first:
        model_files = hash_files(out / "model", files)
        Manifest(kind=MODEL_KIND, parents=dict(origin.parents), config=settings, files=model_files).write(out / "model")
    engine.barrier("the log is complete")
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    evals = [line for line in lines if line["event"] == "eval"]
    norms = [line["router_gradient_norm"] for line in steps if "router_gradient_norm" in line]
    policies = [config.router] if isinstance(config.router, str) else config.router
    alarm = next((line for line in reversed(lines) if line["event"] == "alarm"), None)
    alarms = warnings_of(config.router, config.arguments, last_step=steps[-1], last=evals[-1], alarm=alarm)
    result = {
        "steps": finished.steps,
        "tokens": sum(line["tokens"] for line in steps),
        "parameters": num_parameters,
        "runtime": computed,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "heldout_before": {name: score["loss"] for name, score in evals[0]["heldout"].items()},
        "heldout_after": {name: score["loss"] for name, score in evals[-1]["heldout"].items()},
        "mixture": [asdict(share) for share in mixing.mixture.report(finished.batches)],
        "rule": mixing.rule,
        "weight_history": mixing.mixture.history,
        "weights": mixing.result(),
        "router": " + ".join(policies) if finished.num_routers else None,
        "router_gradient_norm": [min(norms), max(norms)] if norms else None,
        "idle_experts": evals[-1].get("idle"),
        "teacher_loss": None if learned_from is None else [steps[0]["teacher_loss"], steps[-1]["teacher_loss"]],
        "skipped": finished.skipped,
        "went_back": finished.went_back,
        "warnings": [*mixing.warnings, *(alarms if finished.num_routers else [])],
    }
    return result, (finished.resumed_from, finished.seconds, finished.steps_run)


def _receipt(out: Path, result: dict[str, Any], *, resumed_from: int, seconds: float | None, steps_run: int) -> Trained:
    norms = result["router_gradient_norm"]
    rate = result["tokens"] * steps_run / result["steps"] / seconds if seconds else None
    fields = {**result, "router_gradient_norm": None if norms is None else (norms[0], norms[1])}
    if taught := result.get("teacher_loss"):  # no version before had it
        fields["teacher_loss"] = (taught[0], taught[1])
    return Trained(model=out / "model", resumed_from=resumed_from, seconds=seconds, tokens_per_second=rate, **fields)


def _teacher(config: PretrainConfig, checkpoint: Checkpoint, origin: Origin, *, offline: bool) -> Checkpoint | None:
    """What `config.teacher` names; None without one."""
    if config.teacher != "source":
        return Checkpoint.open(config.teacher, offline=offline) if config.teacher else None
    if origin.num_experts and origin.made_with is None:
        raise UsageError(
            "source, but a mixture is trained as it is", where="pretrain.teacher", needed="its dense source's folder"
        )
    return checkpoint


def _num_taught(teacher: Checkpoint | None) -> int:
    return Origin.folder(teacher).num_parameters if teacher is not None else 0


def _mixing(config: PretrainConfig, mixture: Mixture) -> tuple[Mixing, PretrainConfig]:
    """The rule at work, and the settings with what it compares with instead of the place where that was read."""
    reference: dict[str, float] | None = None
    warnings: list[str] = []
    if config.reference is not None and config.mixing != STATIC:
        reference, warnings = resolve_reference(
            config.reference, mixture.domains, seq_len=config.seq_len, max_tokens=config.eval_tokens
        )
    mixing = Mixing(
        mixture,
        rule=config.mixing,
        arguments=config.mixing_arguments,
        reference=reference,
        interval_tokens=config.mixing_every_tokens,
        warnings=warnings,
    )
    return mixing, replace(config, mixing_arguments=mixing.arguments, reference=mixing.reference or None)


def _domain_hash(domain: Domain) -> str:
    return sha256_file(domain.folder / "manifest.json")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
