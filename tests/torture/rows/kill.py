"""SIGKILL at enumerated steps of every verb that writes: the same command then ends with an unstopped one's bytes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture.disk import Counter, Journal, install
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.processes import Finished, command

SECONDS = 300
POINTS, FULL_POINTS = 60, 500
BEFORE: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "plan": (),
    "convert": ("plan",),
    "pretrain": ("plan", "convert", "prepare"),
    "tune": (),
}
"""The verbs, and what must be there before each."""
LONG: dict[str, tuple[str, ...]] = {
    "calibrate": ("plan", "convert", "prepare"),
    "eval": ("plan", "convert", "prepare", "pretrain"),
    "trace": ("plan", "convert", "prepare", "pretrain"),
}
"""Those of the long form alone."""
SMALL = {"calibrate": ("calibrate.seq_len=16", "calibrate.max_tokens=512", "calibrate.sample_tokens=64")}
OFTEN = {"pretrain": "pretrain.save_every=2", "tune": "tune.save_every=1"}
# Times and rates differ from run to run; everything that is a result is compared. The curves hold clocks.
TIMES, CURVES = ("run.json", "timing.jsonl"), "tensorboard"
DISK = Path("disk")  # below the folder that each worker stands in, so that no name differs
OUT = DISK / "run"


@dataclass(frozen=True)
class Point:
    """A step of a command to be killed at; with `lost`, what was not synced by then is gone."""

    verb: str
    number: int
    step: int
    steps: int
    lost: bool

    def __str__(self) -> str:
        return f"{self.verb}, point {self.number}: step {self.step} of {self.steps}"


def run(place: Place) -> Iterator[Outcome]:
    for verb in (*BEFORE, *(LONG if place.full else ())):
        yield from killed(place, verb, FULL_POINTS if place.full else POINTS)


def killed(place: Place, verb: str, points: int) -> Iterator[Outcome]:
    """The two outcomes of one verb: killed alone, and with what was not synced lost."""
    config = place.tuning if verb == "tune" else place.config
    words = [verb, str(config), "--out", str(OUT), *([OFTEN[verb]] if verb in OFTEN else []), *SMALL.get(verb, ())]
    before, whole = place.fresh("before"), place.folder / "whole"
    for stage in {**BEFORE, **LONG}[verb]:
        place.command(stage, str(config), "--out", str(before))
    counter = Counter()
    counted = place.spread([before], lambda folder: _unstopped(words, folder, whole, counter), workers=1)
    steps = counter.value
    assert not any(counted.values()), counted
    draw = random.Random(f"{place.seed} {verb}")
    spaced = [1 + point * (steps - 1) // (points // 2 - 1) for point in range(points // 2)]
    at = [*spaced, *(draw.randint(1, steps) for _ in range(points - len(spaced)))]
    expected = contents(whole, without=TIMES)
    for lost in (False, True):
        # What a finished command leaves is durable: its end is a point as well.
        cases = [Point(verb, number, step, steps, lost) for number, step in enumerate([*at, steps + 1])]
        found = place.spread(cases, lambda point: _again(point, words, before, expected))
        how = "kill -9, and all writes since the last fsync lost" if lost else "kill -9"
        what = f"`{verb}`: {how}; the same command again ends with the bytes of a run never stopped"
        yield Outcome.of(what, found, goal=points, note=f"{steps} steps that change the disk")
    shutil.rmtree(whole)


def _stopped(words: list[str], counter: Counter, *, at: int, journal: Journal | None = None) -> Finished:
    return command(words, log=Path("log"), before=lambda: install(DISK, counter, at=at, journal=journal))


def _begin(before: Path) -> None:
    """A disk with what is there before the command."""
    shutil.rmtree(DISK, ignore_errors=True)
    DISK.mkdir()
    if any(before.iterdir()):
        shutil.copytree(before, OUT)


def _unstopped(words: list[str], before: Path, whole: Path, counter: Counter) -> None:
    """What an unstopped command leaves goes to `whole`."""
    _begin(before)
    done = _stopped(words, counter, at=0)
    assert done.code == 0, done.error[-2000:]
    OUT.rename(whole)


def _again(point: Point, words: list[str], before: Path, expected: dict[str, str]) -> str | None:
    """Kill the command there and give it again; what is wrong with the result."""
    _begin(before)
    journal = Journal(DISK, Path("journal")) if point.lost else None
    code = _stopped(words, Counter(), at=point.step, journal=journal).code
    if code not in (-9, 0):  # threads reorder steps, so that the very last may not be reached
        return f"exit {code} instead of being killed"
    if journal is not None:
        journal.lose()
    if code == 0 and (wrong := _different(point, expected)):
        return f"after its end {wrong}"
    again = command(words, log=Path("log"))
    if again.code != 0:
        return f"the same command then ended with {again.code}: {again.last_line}"
    return _different(point, expected)


def _different(point: Point, expected: dict[str, str]) -> str | None:
    found = contents(OUT, without=TIMES)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong = [name for name in wrong if CURVES not in Path(name).parts]
    if wrong:
        return f"other bytes: {', '.join(wrong)}"
    if point.verb != "tune" and point.verb not in json.loads((OUT / "run.json").read_bytes()):
        return "run.json does not say that it is finished"
    return None
