"""One command as it was typed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prismoe.errors import UsageError

if TYPE_CHECKING:
    from prismoe.config import Config
    from prismoe.console import Screen

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One command: what was typed, and the screen to show it on."""

    verb: str
    subject: str | None
    overrides: tuple[str, ...]
    flags: argparse.Namespace
    screen: Screen
    others: tuple[str, ...] = ()

    def config(self) -> Config:
        """What the subject and the overrides describe: a YAML file, a run folder, or a model as `source`."""
        from prismoe.config import load_config

        overrides = self.overrides
        if self.flags.engines is not None:
            overrides = (*overrides, f"convert.engines={self.flags.engines}")
        if self.flags.max_steps is not None:
            section = "tune" if self.verb == "tune" else "pretrain"
            overrides = (*overrides, f"{section}.max_steps={self.flags.max_steps}")
        fixed = {key: getattr(self.flags, key) for key in ("out", "seed") if getattr(self.flags, key) is not None}
        if self.subject is None:
            return load_config(overrides=overrides, **fixed)
        if self.subject.endswith((".yaml", ".yml")):
            return load_config(self.subject, overrides=overrides, **fixed)
        if (Path(self.subject) / "run.yaml").is_file():
            fixed.setdefault("out", self.subject)
            return load_config(Path(self.subject) / "run.yaml", overrides=overrides, **fixed)
        return load_config(overrides=overrides, source=self.subject, **fixed)

    def second(self, what: str) -> str:
        """The second path of a verb that takes two (`what` it should be)."""
        if len(self.others) != 1:
            raise UsageError(f"{1 + len(self.others)} paths", where=self.verb, needed=f"a second one: {what}")
        return self.others[0]

    def source_and_out(self, what: str) -> tuple[str, str]:
        """Subject and output folder of a verb that reads one folder (`what` it should be) and writes another."""
        if self.subject is None:
            raise UsageError("nothing to read", where=self.verb, needed=what)
        if self.flags.out is None:
            raise UsageError("out is not set", where=self.verb, needed="--out FOLDER")
        return self.subject, self.flags.out
