"""Where a row works: a folder, how long it may take, and small real inputs."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.runs import workplace
from tests.torture.processes import Finished, command

__all__ = ["Place", "contents"]


@dataclass(frozen=True)
class Place:
    """`folder` is the row's own; `full` asks for the long form; everything that draws takes `seed`."""

    folder: Path
    full: bool
    seed: int

    @cached_property
    def draw(self) -> random.Random:
        return random.Random(self.seed)

    @cached_property
    def config(self) -> Path:
        """A config of a whole small run (tests/runs.py): a dense model, two domains, six steps. `out` is to be set."""
        inputs = self.folder / "inputs"
        inputs.mkdir()
        return workplace(inputs)

    def command(self, *words: str, timeout: float = 120) -> Finished:
        """One command that must go well."""
        done = command(words, log=self.folder / "log", timeout=timeout)
        assert done.code == 0, f"{' '.join(words)}: {done.code}\n{done.error[-2000:]}"
        return done

    def fresh(self, name: str, like: Path | None = None) -> Path:
        """An empty folder, or a copy of `like`."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        if like is None:
            path.mkdir()
        else:
            shutil.copytree(like, path)
        return path


def contents(folder: Path, *, without: Sequence[str] = ()) -> dict[str, str]:
    """sha256 of every file by its name in `folder`, hidden ones and those named in `without` left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.name not in without:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
