"""Where a row works: a folder, how long it may take, and small real inputs."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TypeVar

from tests.runs import workplace
from tests.torture.processes import Finished, command
from tests.torture.spread import spread
from tests.training import tiny_moe
from tests.tuning import conversations

__all__ = ["Place", "contents"]

T = TypeVar("T")
TUNE = """\
source: {folder}/mixture
tune:
  {{data: {folder}/talk.jsonl, template: vicuna_v1_1, seq_len: 128, batch_size: 8, micro_batch_size: 4, epochs: 1,
    lr: 1.0e-3, heldout: 0.1, threads: 1, device: cpu}}
"""


@dataclass(frozen=True)
class Place:
    """`folder` is the row's own; `full` asks for the long form; everything that draws takes `seed`.

    No case begins after `deadline` (of `time.monotonic`): what is left out then is missing in the number tried.
    """

    folder: Path
    full: bool
    seed: int
    deadline: float = inf

    @cached_property
    def draw(self) -> random.Random:
        return random.Random(self.seed)

    @cached_property
    def config(self) -> Path:
        """A config of a whole small run (tests/runs.py): a dense model, two domains, six steps. `out` is to be set."""
        inputs = self.folder / "inputs"
        inputs.mkdir()
        return workplace(inputs)

    @cached_property
    def tuning(self) -> Path:
        """A config of `tune`: a small mixture, forty conversations, five steps. `out` is to be set."""
        inputs = self.folder / "talk"
        inputs.mkdir()
        tiny_moe(inputs / "mixture")
        conversations(inputs / "talk.jsonl")
        path = inputs / "tune.yaml"
        path.write_text(TUNE.format(folder=inputs))
        return path

    @property
    def late(self) -> bool:
        """Whether no case may begin any more."""
        return time.monotonic() > self.deadline

    def spread(
        self, cases: Iterable[T], check: Callable[[T], str | None], *, workers: int = 0
    ) -> dict[str, str | None]:
        """What `check` found in each case, by the case's name; see `spread`. Workers stand in `folder`/worker-N."""
        with chdir(self.folder):
            found = spread(list(cases), check, late=lambda: self.late, workers=workers)
        return {str(case): problem for case, problem in found}

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
