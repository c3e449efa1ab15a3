"""SIGKILL at enumerated steps of every verb that writes: the same command then ends with an unstopped one's bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.torture.disk import Counter, Journal, install
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.processes import command

VERBS = ("prepare", "plan", "convert", "pretrain")
# Times and rates differ from run to run; everything that is a result is compared.
TIMES = ("state.json", "speed.jsonl")


def run(place: Place) -> Iterator[Outcome]:
    points = 500 if place.full else 60
    for verb in VERBS:
        for lost in (False, True):
            yield _verb(place, verb, points, lost=lost)


def _verb(place: Place, verb: str, points: int, *, lost: bool) -> Outcome:
    before = place.fresh("before")  # what the stages before it left
    stages = {"prepare": (), "plan": (), "convert": ("plan",), "pretrain": ("plan", "convert", "prepare")}[verb]
    for stage in stages:
        place.command(stage, str(place.config), "--out", str(before))
    out, whole = place.folder / "run", place.folder / "whole"
    words = [verb, str(place.config), "--out", str(out)]

    def killed(at: int, counter: Counter, journal: Journal | None) -> int:
        return command(
            words, log=place.folder / "log", before=lambda: install(out, counter, at=at, journal=journal)
        ).code

    shutil.copytree(before, out, dirs_exist_ok=True)
    counter = Counter()
    assert killed(0, counter, None) == 0, (place.folder / "log.err").read_text()[-2000:]
    shutil.rmtree(whole, ignore_errors=True)
    out.rename(whole)
    expected, steps = contents(whole, without=TIMES), counter.value
    cases: dict[str, str | None] = {}
    for point in range(points):
        at = 1 + point * (steps - 1) // max(points - 1, 1) if point < points // 2 else place.draw.randint(1, steps)
        shutil.copytree(before, out)
        journal = Journal(out, place.folder / "journal") if lost else None
        code = killed(at, Counter(), journal)
        if journal is not None:
            journal.lose()
        cases[f"{verb}, point {point}, step {at} of {steps}"] = _check(place, words, out, expected, code)
        shutil.rmtree(out)
    shutil.rmtree(whole)
    how = "kill -9 and everything since the last fsync lost" if lost else "kill -9"
    what = f"`{verb}`: {how}; the same command ends with the bytes of an unstopped run"
    return Outcome.of(what, cases, goal=points, note=f"{steps} steps that change the disk")


def _check(place: Place, words: list[str], out: Path, expected: dict[str, str], code: int) -> str | None:
    if code not in (-9, 0):  # threads reorder steps, so that the very last may not be reached
        return f"exit {code} instead of being killed"
    again = command(words, log=place.folder / "log")
    if again.code != 0:
        return f"the same command then ended with {again.code}: {again.last_line}"
    found = contents(out, without=TIMES)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"other bytes: {', '.join(wrong)}" if wrong else None
