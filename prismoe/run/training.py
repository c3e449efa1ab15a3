"""The stage `pretrain`: training itself, or what it would need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.run.recovery import mixture

if TYPE_CHECKING:
    from prismoe.checkpoint import Checkpoint
    from prismoe.config import Config
    from prismoe.run.stages import Work

__all__ = ["check_training", "taught_by", "train"]


def check_training(work: Work) -> None:
    """That the teacher of this run is there and fits, before the first stage begins."""
    from prismoe.train.fit import check_teacher

    teacher = _teacher(work)
    if teacher is not None and (teacher.has_weights or not work.dry_run):
        check_teacher(teacher, work.checkpoint.config, config=work.config.need("pretrain"))


def taught_by(config: Config) -> Mapping[str, str]:
    """The teacher by what it is, not by where it lies; the source decides anyway."""
    from prismoe.checkpoint import Checkpoint

    named = config.need("pretrain").teacher
    there = named not in ("", "source") and Path(named).is_dir()
    return {"teacher": Checkpoint.open(named).fingerprint} if there else {}


def _teacher(work: Work) -> Checkpoint | None:
    from prismoe.checkpoint import Checkpoint

    named = work.config.need("pretrain").teacher
    if named == "source":
        return work.checkpoint
    return Checkpoint.open(named, offline=work.offline) if named else None


def train(work: Work) -> dict[str, Any]:
    """Train what `pretrain.model` names; a dry run checks what is there already and says what the run would need."""
    from prismoe.train.pretrain import pretrain

    settings = work.config.need("pretrain")
    source = mixture(work) if settings.model == "moe" else work.checkpoint
    needed = [*work.domains(), *([mixture(work)] if settings.model == "moe" else [])]
    missing = [path.name for path in needed if not (path / "manifest.json").is_file()] if work.dry_run else []
    if settings.model != "moe" and work.dry_run and not work.checkpoint.has_weights and settings.init == "source":
        missing.append("the weights of the source")
    teacher = _teacher(work)
    if teacher is not None and work.dry_run and not teacher.has_weights:
        missing.append("the weights of the teacher")
    receipt: dict[str, Any] = {}
    if not missing:
        if teacher is not None:
            settings = replace(settings, teacher=str(teacher.folder))
        trained = pretrain(
            source,
            settings,
            **(_online(work) if settings.model == "online" else {}),
            domains=work.domains(),
            weights=work.config.need("data").weights,
            out=work.folder("train"),
            force=work.force,
            dry_run=work.dry_run,
            offline=work.offline,
            on_progress=work.on_progress,
        )
        receipt = {} if trained is None else trained.to_dict()
    return {**_forecast(work), "not_checked": missing} if work.dry_run else receipt


def _online(work: Work) -> dict[str, Any]:
    """The plan, and how it would be converted, for a mixture that is never written before it is trained."""
    from prismoe.plan import plan_shape

    convert = work.config.convert
    target = work.target(plan_shape(work.plan))
    return {"plan": work.plan, "target": target, "pad_to": convert.pad_to, "absorb": convert.absorb}


def _forecast(work: Work) -> dict[str, Any]:
    """What the run would need, from shapes alone; the processes are those that the config or the launcher speaks of."""
    from prismoe.train.engine.layout import Layout, launched
    from prismoe.train.fit import num_experts
    from prismoe.train.forecast import forecast

    settings = work.config.need("pretrain")
    model, where = _model_config(work)
    layout = Layout(settings.processes or launched()[1], settings.replicate, settings.expert_parallel)
    layout.check(
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        num_experts=num_experts(model),
    )
    teacher = _teacher(work) if settings.teacher_weight else None
    taught = None if teacher is None else teacher.config
    command = shlex.join(["pretrain", *work.config.words()])
    return forecast(model, settings, layout, where=where, command=command, teacher=taught).to_dict()


def _model_config(work: Work) -> tuple[dict[str, Any], str]:
    """config.json of the model that would be trained: there already, or as the plan would make it."""
    from prismoe.plan import plan_shape
    from prismoe.target import absorbed, output_config
    from prismoe.targets import find_target

    if work.config.need("pretrain").model == "dense":
        return work.checkpoint.config, str(work.checkpoint.folder)
    written = work.out / "moe" / "config.json" if work.out is not None else None
    if written is not None and written.is_file():
        return json.loads(written.read_bytes()), str(written)
    shape, convert = plan_shape(work.plan), work.config.convert
    target = find_target(work.target(shape))
    shape = absorbed(shape) if convert.absorb else shape
    return output_config(work.checkpoint, shape, target, pad_to=convert.pad_to), str(work.checkpoint.folder)
