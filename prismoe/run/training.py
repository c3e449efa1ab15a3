"""The stage `pretrain`: training itself, or what it would need."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from prismoe.run.recovery import mixture
from prismoe.train.engine.layout import Layout, launched

if TYPE_CHECKING:
    from prismoe.run.stages import Work

__all__ = ["train"]


def train(work: Work) -> dict[str, Any]:
    """Train what `pretrain.model` names; a dry run checks what is there already and says what the run would need."""
    from prismoe.train.pretrain import pretrain

    settings = work.config.need("pretrain")
    source = mixture(work) if settings.model == "moe" else work.checkpoint
    needed = [*work.domains(), *([mixture(work)] if settings.model == "moe" else [])]
    missing = [path.name for path in needed if not (path / "manifest.json").is_file()] if work.dry_run else []
    if settings.model != "moe" and work.dry_run and not work.checkpoint.has_weights and settings.init == "source":
        missing.append("the weights of the source")
    receipt: dict[str, Any] = {}
    if not missing:
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
    command = shlex.join(["pretrain", *work.config.words()])
    return forecast(model, settings, layout, where=where, command=command).to_dict()


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
