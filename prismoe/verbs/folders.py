"""The verbs that turn one model folder into another: `densify` and `import`."""

from __future__ import annotations

from typing import Any

from prismoe.verbs.job import Job

__all__ = ["densify", "import_"]


def densify(job: Job) -> dict[str, Any]:
    from prismoe import views
    from prismoe.config.options import DensifyOptions, read_options
    from prismoe.densify import densify as lay_together

    options = read_options(DensifyOptions, job.overrides)
    source, out = job.source_and_out("a folder with experts")
    with job.screen.progress() as on_progress:
        receipt = lay_together(
            source,
            out=out,
            plan=options.plan,
            scale=options.scale,
            max_shard_bytes=options.max_shard_bytes,
            offline=job.flags.offline,
            force=job.flags.force,
            dry_run=job.flags.dry_run,
            on_progress=on_progress,
        ).to_dict()
    views.view(job.screen, "densify", receipt)
    for warning in receipt["warnings"]:
        job.screen.warning(warning)
    return receipt


def import_(job: Job) -> dict[str, Any]:
    from dataclasses import asdict

    from prismoe import views
    from prismoe.config.options import ImportOptions, read_options
    from prismoe.importing import import_checkpoint

    options = asdict(read_options(ImportOptions, job.overrides))
    domains = options.pop("domains")
    source, out = job.source_and_out("a checkpoint of model_type llama_moe")
    with job.screen.progress() as on_progress:
        receipt = import_checkpoint(
            source,
            out=out,
            domains=[domains] if isinstance(domains, str) and domains else domains,
            seed=job.flags.seed or 0,
            offline=job.flags.offline,
            force=job.flags.force,
            dry_run=job.flags.dry_run,
            on_progress=on_progress,
            **options,
        ).to_dict()
    views.view(job.screen, "import", receipt)
    return receipt
