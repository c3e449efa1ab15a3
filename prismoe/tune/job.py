"""`tune`: instruction tuning of a model folder on conversations, on TRL's SFTTrainer with our router policies.

A stock folder goes in and one comes out. What fails quietly elsewhere is counted or stops the run: labels that are all
masked, experts or routers that stand still, a balance loss that is off, an end-of-turn token that is never learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, PrismoeError, ResourceError, UsageError
from prismoe.folder import Manifest, bytes_there, claim, hash_files, remove_folder, write_json_atomic
from prismoe.lock import LOCK, check_free
from prismoe.progress import Progress, quiet
from prismoe.room import require_room
from prismoe.train.engine.layout import launched
from prismoe.train.origin import Origin
from prismoe.train.recorded import differences
from prismoe.train.routers import arguments_of, check_steps
from prismoe.train.stopping import stop_on_signal
from prismoe.tune.conversations import find_files
from prismoe.tune.rows import open_tokenizer, read_rows
from prismoe.tune.settings import MAY_CHANGE, TuneConfig

__all__ = ["Tuned", "tune"]

KIND, MODEL_KIND, SETTINGS = "tune", "model", "settings.json"


@dataclass(frozen=True)
class Tuned:
    """Receipt. Losses are means over supervised tokens, in nats.

    `state` is "tuned", "kept" (finished before) or "checked" (a dry run). `text` counts rows, refusals and supervised
    tokens file by file; `rows` are what a batch is made of. `roles` is the table of who trains: parameters, how many of
    them train, gradient norm after the first step. `heldout_before` and `heldout_after` have loss, standard error and
    the routers' load on conversations that were kept apart. `merged` says what merging an adapter changed.
    `expert_tokens` are assignments in training, by layer and expert. `seconds` and `tokens_per_second` (ids, supervised
    or not) speak of this command.
    """

    model: Path
    state: str
    text: dict[str, Any]
    rows: int
    steps: int
    tokens_per_epoch: int
    supervised_share: float
    parameters: int
    memory_bytes: int
    roles: list[dict[str, Any]]
    router: str | None
    first_loss: float | None
    last_loss: float | None
    heldout_before: dict[str, Any] | None
    heldout_after: dict[str, Any] | None
    merged: dict[str, Any] | None
    expert_tokens: list[list[int]]
    runtime: dict[str, Any]
    warnings: list[str]
    resumed_from: int
    seconds: float | None
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "model": str(self.model)}


def tune(
    source: str | Path | Checkpoint,
    config: TuneConfig,
    *,
    out: str | Path,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Tuned:
    """Tune the model of `source` on the conversations of `config` and leave it in `out/model`.

    `out` also holds `metrics.jsonl` and, while training, `checkpoints/`. The same command continues a stopped run and
    gives the same weights as one that never stopped; a finished run is recognised and left alone. With `dry_run` all
    text is rendered and everything is checked, and nothing is written.

    Raises:
        UsageError: settings that do not fit together or the model.
        InputError: conversations or a checkpoint that are damaged, or nothing to learn in them.
        ResourceError: TRL or PEFT is missing, no room, or `out` is in use or not ours.
        NumericalError: a role that does not train, a loss or gradient that cannot be, a merge that is not exact.
        InterruptedRun: SIGINT or SIGTERM came; the state is saved.
    """
    _require_libraries(lora=bool(config.lora_rank))
    if launched()[1] > 1:
        raise UsageError(f"{launched()[1]} processes", where="tune", needed="one process")
    out = Path(out)
    check_free(out / LOCK, where=out)  # reading all conversations takes its time
    with _told():
        config = replace(config, arguments=_arguments(config))
    find_files(config.data, offline=offline)  # what is missing is told before a model is fetched
    checkpoint = Checkpoint.open(source, offline=offline)
    if not checkpoint.has_weights:
        raise InputError("no weights", where=str(checkpoint.folder), needed="a trained model")
    positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and config.seq_len > positions:
        where = str(checkpoint.folder / "config.json")
        raise InputError(f"{positions} positions", where=where, needed=f"tune.seq_len {config.seq_len} or more")
    origin = Origin.folder(checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    rows = read_rows(config, checkpoint, tokenizer, offline=offline, on_progress=on_progress)
    with _told():
        names = config.policies[0] if len(config.policies) == 1 else config.policies
        check_steps(names, config.arguments, steps=rows.steps)
    parents = {**origin.parents, **rows.parents}
    decisive = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    job = json.loads(json.dumps({"tune": decisive, "template": rows.template_sha256, "parents": parents}))
    memory = _room(origin, config, out, there=bytes_there(out, kind=KIND, key=_hash(job), force=force))
    plain: dict[str, Any] = {
        "text": rows.text.receipt.to_dict(),
        "rows": rows.count,
        "steps": rows.steps,
        "tokens_per_epoch": rows.tokens,
        "supervised_share": rows.supervised / rows.tokens,
        "parameters": _num_parameters(origin),
        "memory_bytes": memory,
    }
    if dry_run:
        return _receipt(out, "checked", plain)
    with _claimed(out, job, force=force), stop_on_signal() as stop:
        done = Manifest.read(out)
        if done is not None:
            return _receipt(out, "kept", done.config["result"])
        from prismoe.tune.training import train

        files = {**origin.files, **rows.files}
        origin = replace(origin, files=files)
        result, clock = train(origin, config, rows, tokenizer, out, stop=stop, on_progress=on_progress)
        settings = {"tune": asdict(config)}
        names = result.pop("files")
        model_files = hash_files(out / "model", names)
        Manifest(kind=MODEL_KIND, parents=parents, config=settings, files=model_files).write(out / "model")
        result = json.loads(json.dumps({**plain, **result}))
        kept = hash_files(out, ["metrics.jsonl", "model/manifest.json"])
        record = Manifest(kind=KIND, parents=parents, config={**settings, "result": result}, files=kept, key=_hash(job))
        record.write(out)
        remove_folder(out / "checkpoints")
        stop.after(f"step {rows.steps}, the last: the model is written", where=str(out))
        return _receipt(out, "tuned", {**result, **clock})


def _receipt(out: Path, state: str, result: Mapping[str, Any]) -> Tuned:
    nothing: dict[str, Any] = {
        **{"roles": [], "expert_tokens": [], "warnings": [], "runtime": {}, "resumed_from": 0},
        **dict.fromkeys(("router", "first_loss", "last_loss", "heldout_before", "heldout_after", "merged")),
        **dict.fromkeys(("seconds", "tokens_per_second")),
    }
    return Tuned(model=out / "model", state=state, **{**nothing, **result})


def _arguments(config: TuneConfig) -> dict[str, Any]:
    """Arguments of all policies at work, completed; by name where there are several."""
    if len(config.policies) == 1:
        return arguments_of(config.policies[0], config.arguments)
    given = {config.router: config.arguments} if isinstance(config.router, str) else dict(config.arguments)
    if config.warmup_routers:
        given = {**given, "warmup": {"router_steps": config.warmup_routers}}
    return arguments_of(config.policies, given)


@contextmanager
def _told() -> Iterator[None]:
    """What other code says of `pretrain.` is here about `tune.`."""
    try:
        yield
    except PrismoeError as error:
        if not error.where.startswith("pretrain."):
            raise
        where = "tune." + error.where.removeprefix("pretrain.")
        raise type(error)(error.found, where=where, needed=error.needed, hint=error.hint) from error


def _require_libraries(*, lora: bool) -> None:
    for name in ("trl", "peft") if lora else ("trl",):
        if find_spec(name) is None:
            raise ResourceError(f"{name} is not installed", where="tune", hint="pip install 'prismoe[tune]'")


def _num_parameters(origin: Origin) -> int:
    from math import prod

    return sum(prod(shape) for _, shape in origin.tensors().values())


def _room(origin: Origin, config: TuneConfig, out: Path, *, there: int | None) -> int:
    """Weights in float32; gradients and two moments of what trains; logits of a micro-batch. Activations come on top.

    What is `there` needs no room, and None nothing. Returns the bytes of memory, by that estimate.
    """
    count = _num_parameters(origin)
    trained = count // 50 if config.lora_rank else count  # of an adapter the share that it has at usual ranks
    tokens = config.micro_batch_size * config.seq_len
    memory = 4 * count + 12 * trained + 12 * tokens * int(origin.config.get("vocab_size", 0))
    checkpoints = config.keep + 1 if config.save_every else 1
    disk = 12 * trained * checkpoints + 4 * count + (16 << 20)
    if there is not None:
        hint = "free some space, or a smaller tune.keep"
        require_room(out, disk_bytes=disk - there, memory_bytes=memory, hint=hint)
    return memory


@contextmanager
def _claimed(out: Path, job: dict[str, Any], *, force: bool) -> Iterator[None]:
    """Hold the folder, after saying what differs where it was begun with something else."""
    path = out / SETTINGS
    if not force and (changed := differences(path, {name: job[name] for name in ("tune", "parents")})):
        raise ResourceError(
            f"output folder holds a different job ({'; '.join(changed)})",
            where=str(out),
            hint=f"--force begins anew, --out elsewhere; only these may change: {', '.join(MAY_CHANGE)}",
        )
    with claim(out, kind=KIND, key=_hash(job), force=force):
        if not path.exists():
            write_json_atomic(path, job)
        if Manifest.read(out) is not None:
            remove_folder(out / "checkpoints")
        yield


def _hash(value: object) -> str:
    from hashlib import sha256

    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
