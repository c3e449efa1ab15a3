"""SIGTERM and SIGINT in every phase: exit 75 with the command that goes on, at most one more step, the same bytes."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from prismoe.folder import Manifest
from tests.torture.disk import Counter
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.processes import Finished, command
from tests.torture.rows.kill import BEFORE, CURVES, OFTEN, TIMES

SECONDS = 120
OUT = Path("run")
STEPS = {"pretrain": "prismoe.train.trainer:Trainer.step", "tune": "prismoe.tune.trainer:Tuner._begin"}
PHASES: dict[str, dict[str, tuple[str, int]]] = {
    "pretrain": {
        "start-up": ("prismoe.run:run", 1),
        "reading the weights": ("prismoe.train.model:fill", 1),
        "reading data": ("prismoe.data.mixture:Mixture.batch", 3),
        "a step": (STEPS["pretrain"], 3),
        "the first evaluation": ("prismoe.train.heldout:score_text", 1),
        "an evaluation": ("prismoe.train.heldout:score_text", 4),
        "the last evaluation": ("prismoe.train.heldout:score_text", 6),
        "saving": ("prismoe.train.checkpoints:save", 1),
        "export": ("prismoe.train.model:_write_shard", 1),
    },
    "tune": {
        "start-up": ("prismoe.tune.job:tune", 1),
        "reading data": ("prismoe.tune.job:read_rows", 1),
        "a step": (STEPS["tune"], 3),
        "the first evaluation": ("prismoe.tune.training:heldout_losses", 1),
        "the last evaluation": ("prismoe.tune.training:heldout_losses", 2),
        "saving": ("prismoe.train.checkpoints:save", 1),
        "export": ("prismoe.train.model:_write_shard", 1),
    },
    "prepare": {"start-up": ("prismoe.run:run", 1), "writing": ("prismoe.folder:write_json_atomic", 3)},
    "convert": {"start-up": ("prismoe.run:run", 1), "writing": ("os:pwrite", 2)},
}
"""Where a signal comes: at the n-th call of a function."""
TWICE = ("reading the weights", "a step", "the last evaluation", "saving", "export")


@dataclass(frozen=True)
class Case:
    """A signal that a verb gets in a phase, or two of them at once."""

    verb: str
    phase: str
    name: str
    twice: bool

    def __str__(self) -> str:
        return f"{self.verb}, {self.name} {'twice ' if self.twice else ''}in {self.phase}"


def run(place: Place) -> Iterator[Outcome]:
    work = {verb: _unstopped(place, verb) for verb in PHASES}
    cases = [Case(verb, phase, name, False) for verb in PHASES for phase in PHASES[verb] for name in SIGNALS]
    what = "SIGTERM or SIGINT in any phase: saved within one step, exit 75 and the command that goes on, same bytes"
    yield Outcome.of(what, place.spread(cases, lambda case: _signalled(case, *work[case.verb])), goal=30)
    twice = [
        Case(verb, phase, name, True) for verb in STEPS for phase in PHASES[verb] if phase in TWICE for name in SIGNALS
    ]
    what = "a second signal stops at once; the last checkpoint is whole, the same command goes on to the same bytes"
    yield Outcome.of(what, place.spread(twice, lambda case: _signalled(case, *work[case.verb])), goal=len(twice))


SIGNALS = ("SIGTERM", "SIGINT")


def _unstopped(place: Place, verb: str) -> tuple[list[str], Path, dict[str, str]]:
    """The command, what is there before it, and what an unstopped one leaves."""
    config, before = place.tuning if verb == "tune" else place.config, place.fresh(f"before {verb}")
    for stage in BEFORE[verb]:
        place.command(stage, str(config), "--out", str(before))
    words = [verb, str(config), "--out", str(OUT), *([OFTEN[verb]] if verb in OFTEN else [])]
    whole = place.folder / f"whole {verb}"

    def unstopped(_: str) -> None:
        _begin(before)
        done = command(words, log=Path("log"))
        assert done.code == 0, done.error[-2000:]
        OUT.rename(whole)

    problems = place.spread([verb], unstopped, workers=1)
    assert not any(problems.values()), problems
    return words, before, contents(whole, without=TIMES)


def _begin(before: Path) -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    if any(before.iterdir()):
        shutil.copytree(before, OUT)


def _signalled(case: Case, words: list[str], before: Path, expected: dict[str, str]) -> str | None:
    _begin(before)
    sent, steps = Counter(), Counter()
    done = command(words, log=Path("log"), before=lambda: _plant(case, sent, steps))
    return _wrong(case, done, sent, steps, words) or _again(words, expected)


def _plant(case: Case, sent: Counter, steps: Counter) -> None:
    """In the process that is to be signalled: it does it itself, in the middle of the phase."""
    where, nth = PHASES[case.verb][case.phase]
    number = signal.Signals[case.name]

    def at(call: int) -> None:
        if call == nth:
            for _ in range(2 if case.twice else 1):
                sent.add()
                os.kill(os.getpid(), number)

    def counted(_: int) -> None:
        if sent.value:
            steps.add()

    if case.verb in STEPS:
        _wrap(STEPS[case.verb], counted)
    _wrap(where, at)


def _wrap(where: str, called: Any) -> None:
    module, _, name = where.partition(":")
    *path, last = name.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), Counter()

    def wrapped(*args: Any, **named: Any) -> Any:
        called(calls.add())
        return real(*args, **named)

    setattr(owner, last, wrapped)


def _wrong(case: Case, done: Finished, sent: Counter, steps: Counter, words: list[str]) -> str | None:
    if not sent.value:
        return "the phase never came"
    if done.code != 75:
        return f"exit {done.code}: {done.last_line}"
    if f"the same command continues: {shlex.join(['prismoe', *words])}" not in done.last_line:
        return f"without the command: {done.last_line}"
    if "Traceback" in done.error:
        return "a traceback"
    if steps.value > 1:
        return f"{steps.value} more steps began"
    for path in OUT.rglob("step-*/manifest.json"):
        manifest = Manifest.read(path.parent)
        assert manifest is not None
        manifest.check(path.parent)
    return None


def _again(words: list[str], expected: dict[str, str]) -> str | None:
    again = command(words, log=Path("log"))
    if again.code != 0:
        return f"the same command then ended with {again.code}: {again.last_line}"
    found = contents(OUT, without=TIMES)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong = [name for name in wrong if CURVES not in Path(name).parts]
    return f"other bytes: {', '.join(wrong)}" if wrong else None
