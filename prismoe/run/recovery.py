"""The stage `recover`, and with which mixture a run goes on: the recovered one where its config asks for that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.folder import MANIFEST

if TYPE_CHECKING:
    from prismoe.run.stages import Work

__all__ = ["RECOVERED", "mixture", "recover_run"]

RECOVERED = "recovered"


def mixture(work: Work) -> Path:
    """The folder that training begins with."""
    return work.folder(RECOVERED if work.config.recover is not None else "moe")


def recover_run(work: Work) -> dict[str, Any]:
    """The stage; a dry run checks what is there already and names what is not."""
    from prismoe.recover import recover

    needed = [*work.domains(), work.folder("moe")]
    missing = [path.name for path in needed if not (path / MANIFEST).is_file()] if work.dry_run else []
    if missing:
        return {"state": "dry run", "not_checked": missing}
    with work.placed("recover"):
        return recover(
            work.checkpoint,
            work.folder("moe"),
            config=work.config.need("recover"),
            domains=work.domains(),
            weights=work.config.need("data").weights,
            out=work.folder(RECOVERED),
            offline=work.offline,
            force=work.force,
            dry_run=work.dry_run,
            on_progress=work.on_progress,
        ).to_dict()
