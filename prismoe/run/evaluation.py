"""The stage `eval`: which models, texts and tasks it is about, what it depends on, and what can be checked before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError, UsageError
from prismoe.folder import MANIFEST, sha256_file, write_json_atomic
from prismoe.run.recovery import RECOVERED
from prismoe.state import read_state

if TYPE_CHECKING:
    from prismoe.checkpoint import Checkpoint
    from prismoe.config.settings import Config, EvalConfig
    from prismoe.evaluate import Control
    from prismoe.run.stages import Work

__all__ = ["check_evaluation", "evaluate_run", "is_evaluated", "measured", "scored_files"]

TEXT = ("seq_len", "max_tokens", "batch_size")
MADE = {"moe": "step 0", RECOVERED: "recovered", "train/model": "trained"}
"""What a run makes: folder, and what it is called."""


def is_evaluated(config: Config) -> bool:
    """Whether there is anything to measure on."""
    return config.data is not None or bool(config.eval.benchmarks)


def scored_files(settings: EvalConfig) -> tuple[Path, ...]:
    """The local files whose items are scored; pools of examples are not among them. What is missing is told later."""
    from prismoe.evaluate.benchmarks import task_files

    if settings.files is None:
        return ()
    return task_files(**settings.benchmarks, files=Path(settings.files))


def measured(config: Config) -> dict[str, Any]:
    """What the scores depend on beside the models of the run and its text."""
    settings = config.eval
    found: dict[str, Any] = {"eval": {key: getattr(settings, key) for key in TEXT}}
    if settings.benchmarks:
        from prismoe.evaluate.benchmarks import content

        files = {} if settings.files is None else content(Path(settings.files))
        found["benchmarks"] = {**settings.benchmarks, "limit": settings.limit, "files": files, "seed": config.seed}
    if settings.models:
        found["models"] = {name: _fingerprint(place) for name, place in settings.models.items()}
    if _wants_control(config):
        found["control"] = True
    return found


def _fingerprint(place: str) -> str:
    from prismoe.checkpoint import Checkpoint

    return Checkpoint.open(place).fingerprint if (Path(place) / "config.json").is_file() else place


def _wants_control(config: Config) -> bool:
    """By itself only where it costs little beside the rest, or neurons were measured anyway."""
    settings = config.eval
    by_itself = settings.control == "auto" and (bool(settings.benchmarks) or config.calibrate is not None)
    return settings.control == "static" or by_itself


def check_evaluation(work: Work) -> tuple[Any, ...]:
    """Everything that can be wrong before a model is there: told before hours of training, not after them.

    Returns the tasks that will be run.

    Raises:
        UsageError, InputError, ResourceError: see `check_tasks`; a folder that is no model; a tokenizer that does not
            fit its model.
    """
    from prismoe.evaluate.benchmarks import check_tokenizer
    from prismoe.evaluate.tasks import check_tasks

    settings = work.config.eval
    wanted: tuple[Any, ...] = ()
    with work.placed("eval"):
        if settings.benchmarks:
            files = None if settings.files is None else Path(settings.files)
            wanted = check_tasks(**settings.benchmarks, files=files, offline=work.offline)
    others = {f"eval.models.{name}": place for name, place in (settings.models or {}).items()}
    for checkpoint in (work.checkpoint, *(_open(place, where, work) for where, place in others.items())):
        if not checkpoint.has_weights:
            raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
        if wanted:
            check_tokenizer(checkpoint)
    return wanted


def _open(place: str, where: str, work: Work) -> Checkpoint:
    from prismoe.checkpoint import Checkpoint

    try:
        return Checkpoint.open(place, offline=work.offline)
    except InputError as error:
        raise InputError(str(error), where=work.config.place(where)) from None


def evaluate_run(work: Work) -> dict[str, Any]:
    """The stage; a dry run says what would be measured."""
    from prismoe.evaluate import evaluate

    settings, training = work.config.eval, work.config.pretrain
    if work.dry_run:
        return _planned(work)
    models = _models(work)
    domains = work.domains() if work.config.data is not None else []
    scores = evaluate(
        models,
        domains,
        seq_len=settings.seq_len or (training.seq_len if training else 512),
        max_tokens=settings.max_tokens,
        **settings.benchmarks,
        files=settings.files,
        limit=settings.limit,
        control=_control(work, models),
        batch_size=settings.batch_size,
        threads=training.threads if training else 0,
        seed=work.config.seed,
        keep=work.folder("eval"),
        offline=work.offline,
        on_progress=work.on_progress,
    ).to_dict()
    clean = _decontaminated(work)
    receipt = {**scores, "decontaminated": clean, "warnings": [*scores["warnings"], *_dirty(clean)]}
    write_json_atomic(work.folder("scores.json"), receipt)
    return receipt


def _first(work: Work) -> str:
    from prismoe.train.fit import num_experts

    return work.checkpoint.folder.name if num_experts(work.checkpoint.config) else "dense"


def _models(work: Work) -> dict[str, str | Path | Checkpoint]:
    made = {name: work.folder(folder) for folder, name in MADE.items()}
    found: dict[str, str | Path | Checkpoint] = {_first(work): work.checkpoint}
    found |= {name: path for name, path in made.items() if (path / "config.json").is_file()}
    return found | (work.config.eval.models or {})


def _control(work: Work, models: Mapping[str, str | Path | Checkpoint]) -> Control | None:
    """The static control of the first mixture that carries the plan by which it was cut from the first model."""
    from prismoe.checkpoint import Checkpoint
    from prismoe.convert.job import PLAN
    from prismoe.evaluate import Control, static_control
    from prismoe.plan import Plan
    from prismoe.train.fit import num_experts

    if not _wants_control(work.config):
        return None
    opened = {name: Checkpoint.open(place, offline=work.offline) for name, place in models.items()}
    mixtures = {name: checkpoint for name, checkpoint in opened.items() if num_experts(checkpoint.config)}
    dense, *_ = opened.values()
    plans = {name: (one.folder / PLAN).read_bytes() for name, one in mixtures.items() if (one.folder / PLAN).is_file()}
    for name, written in plans.items():
        plan = Plan.load(mixtures[name].folder / PLAN)
        if dense.is_source_of(plan.origin.source):
            given, own = work.config.plan.calibration, work.folder("calibration")
            measured = given or (own if (own / MANIFEST).is_file() else None)
            return static_control(
                dense,
                plan,
                out=work.folder("controls"),
                of=[other for other, bytes_ in plans.items() if bytes_ == written],
                target=str(mixtures[name].config["model_type"]),
                calibration=measured,
                domains=work.domains() if work.config.data is not None else [],
                seed=work.config.seed,
                on_progress=work.on_progress,
            )
    if work.config.eval.control == "static" or mixtures:
        reason = f"no mixture here carries the plan by which it was cut from {next(iter(opened))}"
        if work.config.eval.control == "static":
            raise UsageError(reason, where=work.config.place("eval.control"), needed="one with its moe.plan")
        return Control(None, reason, "", "", 0, 0, tuple(mixtures))
    return None


def _planned(work: Work) -> dict[str, Any]:
    """Receipt of a dry run: the models as they will be, without looking at those that are not made yet."""
    from prismoe.evaluate.benchmarks import count_requests

    settings = work.config.eval
    wanted = check_evaluation(work)
    models = [_first(work), *_to_come(work), *(settings.models or ())]
    if _wants_control(work.config) and len(models) > 1:
        models.append("static")
    tasks = count_requests(wanted, limit=settings.limit, seed=work.config.seed)
    counts = [row["num_requests"] for row in tasks]
    return {
        "state": "dry run",
        "models": models,
        "tasks": tasks,
        "num_requests": None if None in counts else len(models) * sum(counts),
    }


def _to_come(work: Work) -> list[str]:
    """Models of the run by the time its evaluation begins: there already, or of a section that was written."""
    config = work.config
    written = "plan" in config.places or config.data is not None
    mixture = written and (config.pretrain is None or config.pretrain.model == "moe")
    trained = config.pretrain is not None and config.data is not None
    recovered = mixture and config.recover is not None and config.data is not None
    coming = {"step 0": mixture, "recovered": recovered, "trained": trained}
    there = {name for at, name in MADE.items() if work.out is not None and (work.out / at / "config.json").is_file()}
    return [name for name in MADE.values() if coming[name] or name in there]


def _decontaminated(work: Work) -> dict[str, Any] | None:
    """Which benchmark files the training text was searched for, and what went; None where there is neither."""
    from prismoe.data.sift.decide import IN_BENCHMARK

    config = work.config
    files = scored_files(config.eval)
    if config.data is None or not files:
        return None
    record = read_state(work.folder(".")).get("sift")
    searched = record["settings"]["sift"]["decontaminate"] if record else []
    names = {path.name: sha256_file(path) in searched for path in files}
    dropped = [row["dropped"].get(IN_BENCHMARK, {}) for row in (record["receipt"]["domains"] if record else ())]
    return {
        "searched": sorted(name for name, found in names.items() if found),
        "not_searched": sorted(name for name, found in names.items() if not found),
        "documents_dropped": sum(row.get("documents", 0) for row in dropped),
        "bytes_dropped": sum(row.get("bytes", 0) for row in dropped),
    }


def _dirty(clean: dict[str, Any] | None) -> list[str]:
    if clean is None or not clean["not_searched"]:
        return []
    names = ", ".join(clean["not_searched"])
    return [f"the training text was never searched for {names}: prepare it anew in another run folder to have that"]
