"""The stage `recover`, and with which mixture a run goes on: the recovered one where its config asks for that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.folder import MANIFEST

if TYPE_CHECKING:
    from prismoe.run.stages import Work

__all__ = ["RECOVERED", "check_recovery", "mixture", "recover_run"]

RECOVERED = "recovered"


def mixture(work: Work) -> Path:
    """The folder that training begins with."""
    return work.folder(RECOVERED if work.config.recover is not None else "moe")


def recover_run(work: Work) -> dict[str, Any]:
    """The stage; a dry run checks what is there already and names what is not."""
    if work.dry_run and (missing := _missing(work)):
        return {"state": "dry run", "not_checked": missing}
    return _recover(work, dry_run=work.dry_run)


def check_recovery(work: Work) -> None:
    """What can be wrong, once that is there which it goes by and is not made again."""
    if not work.force and not _missing(work):
        _recover(work, dry_run=True)


def _missing(work: Work) -> list[str]:
    needed = [*work.domains(), work.folder("moe")]
    return [path.name for path in needed if not (path / MANIFEST).is_file()]


def _recover(work: Work, *, dry_run: bool) -> dict[str, Any]:
    from prismoe.recover import recover

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
            dry_run=dry_run,
            on_progress=work.on_progress,
        ).to_dict()
