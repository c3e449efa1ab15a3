"""Disks that are or become full or read-only, quotas, limits of file sizes and memory: exit 4, nothing old is lost."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from prismoe.errors import PrismoeError
from prismoe.folder import Manifest
from tests.torture import scarce
from tests.torture.disk import Counter, install
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.processes import Finished, command
from tests.torture.rows.kill import BEFORE, CURVES, DISK, OFTEN, OUT, TIMES

SECONDS = 70
KINDS = {"full": 8, "quota": 4, "read-only": 4, "for a moment": 3, "file size": 3, "memory": 2}
"""What happens to each verb, and how often in the short form; in the long form ten times that."""
INJECTED = {"quota": errno.EDQUOT, "read-only": errno.EROFS, "for a moment": errno.ENOSPC, "full": errno.ENOSPC}
AT_ONCE = ("disk full", "disk read-only", "folder locked")
LEFT = (0, 4096, 3 * 4096, 10 * 4096)
# Appended to, or told again after every stage.
GROWING = ("metrics.jsonl", "run.yaml", "prismoe.json", *TIMES)
NOTED = Path("noted")  # what was finished when it happened
SMALLEST = 32 << 10  # what a command prints is a file as well


@dataclass(frozen=True)
class Point:
    """What happens to a verb, at a step of it; `number` of the `count` of its kind."""

    verb: str
    kind: str
    number: int
    count: int
    step: int
    steps: int

    def __str__(self) -> str:
        return f"{self.verb}, {self.kind} {self.number}: step {self.step} of {self.steps}"


@dataclass(frozen=True)
class Job:
    """A verb's command, what is there before it, and what it leaves when nothing happens."""

    words: list[str]
    before: Path
    old: dict[str, str]
    new: dict[str, str]
    steps: int
    largest: int


def run(place: Place) -> Iterator[Outcome]:
    refused = next(iter(place.spread(["a disk"], lambda _: scarce.own_disk(DISK) or None, workers=1).values()))
    jobs = {verb: _job(place, verb) for verb in BEFORE}
    yield from _at_once(place, jobs, refused or "")
    disk = f"injected ({refused})" if refused else "a real one"
    note = f"{', '.join(KINDS)}; the full disk is {disk}"
    for verb, job in jobs.items():
        draw = random.Random(f"{place.seed} {verb}")
        cases = []
        for kind, count in KINDS.items():
            count *= 10 if place.full else 1
            steps = [1 + (job.steps - 1) * (2 * number + 1) // (2 * count) for number in range(count)]
            steps = [min(max(step + draw.randint(-1, 1), 1), job.steps) for step in steps]
            cases += [Point(verb, kind, number, count, step, job.steps) for number, step in enumerate(steps, 1)]
        found = place.spread(cases, partial(_during, job))
        what = f"`{verb}`: no room while it works: exit 4 and one line, what was there is whole, then the same bytes"
        yield Outcome.of(what, found, goal=len(cases), note=note)


def _job(place: Place, verb: str) -> Job:
    config, before = place.tuning if verb == "tune" else place.config, place.fresh(f"before {verb}")
    words = [verb, str(config), "--out", str(OUT), *([OFTEN[verb]] if verb in OFTEN else [])]
    for stage in BEFORE[verb]:
        place.command(stage, str(config), "--out", str(before))
    if verb == "plan":  # an older one, of another seed, is replaced
        place.command("plan", str(config), "seed=9", "--out", str(before))
    whole, counter = place.folder / f"whole {verb}", Counter()

    def unstopped(_: str) -> None:
        _begin(before)
        done = command(words, log=Path("log"), before=lambda: install(DISK, counter))
        assert done.code == 0, done.error[-2000:]
        shutil.copytree(OUT, whole)

    problems = place.spread([verb], unstopped, workers=1)
    assert not any(problems.values()), problems
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    return Job(words, before, contents(before), contents(whole, without=TIMES), counter.value, largest)


@cache
def _disk() -> str:
    """This worker's disk, made with its first case; why there is none of its own."""
    return scarce.own_disk(DISK)


def _begin(before: Path) -> None:
    """A disk with what is there before the command."""
    _disk()
    DISK.mkdir(exist_ok=True)
    for path in DISK.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if any(before.iterdir()):
        shutil.copytree(before, OUT)
    NOTED.write_text("[]")


def _during(job: Job, point: Point) -> str | None:
    _begin(job.before)
    steps = Counter()
    done = command(job.words, log=Path("log"), before=partial(_plant, job, point, steps))
    scarce.free_again(DISK)
    return _told(point.kind, done) or _left(job) or _again(job)


def _plant(job: Job, point: Point, steps: Counter) -> None:
    """In the process that it is to happen to."""
    if point.kind == "file size":
        size = max(job.largest * point.number // (point.count + 1), SMALLEST)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return
    happened = [False]

    def meet(number: int, name: str, path: str) -> None:
        if not happened[0] and number >= point.step:
            happened[0] = True
            _note_finished()
            if point.kind == "memory":
                scarce.limit_memory(point.number << 20)
            elif point.kind == "full" and not _disk():
                scarce.fill(DISK, leave=LEFT[point.number % len(LEFT)])
            elif point.kind == "for a moment":
                scarce.fail(INJECTED[point.kind], name, path)
        if happened[0] and (point.kind in ("quota", "read-only") or (point.kind == "full" and _disk())):
            scarce.fail(INJECTED[point.kind], name, path)

    install(DISK, steps, meet=meet)


def _note_finished() -> None:
    NOTED.write_text(json.dumps([str(path.parent) for path in OUT.rglob("manifest.json")]))


def _told(kind: str, done: Finished) -> str | None:
    """What is wrong with how it ended."""
    if done.code == 0:
        return None  # the last step that needs anything had passed
    lines = [line for line in done.error.splitlines() if line.startswith("prismoe: ")]
    if done.code != 4:
        return f"exit {done.code}: {done.last_line[-300:]}"
    if "Traceback" in done.error or len(lines) != 1:
        return f"not one line: {done.error[-600:]}"
    if kind in ("full", "disk full") and not ("free" in lines[0] and "needed" in lines[0]):
        return f"does not say what there is and what is needed: {lines[0]}"
    return None


def _left(job: Job) -> str | None:
    """What is wrong with what a command left that had no room."""
    for name, found in contents(OUT).items() if OUT.is_dir() else ():
        path = Path(name)
        if found in (job.old.get(name), job.new.get(name)) or path.name in GROWING or CURVES in path.parts:
            continue
        if "checkpoints" in path.parts:
            continue  # finished ones are hashed below, others are none
        return f"neither what was there nor what should be: {name}"
    for path in OUT.rglob("*.json"):
        if path.stat().st_size:
            json.loads(path.read_bytes())
    finished = {path.parent for path in OUT.rglob("manifest.json")}
    for folder in finished:
        try:
            manifest = Manifest.read(folder)
            assert manifest is not None
            manifest.check(folder)
        except PrismoeError as error:
            return f"damaged: {error}"
    for folder in map(Path, json.loads(NOTED.read_text())):
        newer = (other for other in finished if other.parent == folder.parent and other.name > folder.name)
        done = folder.parent.parent in finished  # checkpoints go when the model is there
        if folder not in finished and not done and not ("checkpoints" in folder.parts and any(newer)):
            return f"was finished, and is no more: {folder}"
    return None


def _again(job: Job) -> str | None:
    """The same command, with room."""
    again = command(job.words, log=Path("log"))
    if again.code != 0:
        return f"the same command then ended with {again.code}: {again.last_line}"
    found = contents(OUT, without=TIMES)
    wrong = sorted(name for name in job.new.keys() | found.keys() if job.new.get(name) != found.get(name))
    wrong = [name for name in wrong if CURVES not in Path(name).parts]
    return f"other bytes: {', '.join(wrong)}" if wrong else None


# Before the first byte


def _at_once(place: Place, jobs: dict[str, Job], refused: str) -> Iterator[Outcome]:
    kinds = [kind for kind in AT_ONCE if not refused or kind == "folder locked"]
    cases = {f"{verb}, {kind}": (jobs[verb], kind) for verb in jobs for kind in kinds}
    found = place.spread(list(cases), lambda name: _refused(*cases[name]))
    what = "no room from the start, or nothing may be written: exit 4 before the first byte, then the same bytes"
    yield Outcome.of(what, found, goal=len(jobs) * len(AT_ONCE), note=refused and f"no disk of its own: {refused}")


def _refused(job: Job, kind: str) -> str | None:
    _begin(job.before)
    OUT.mkdir(exist_ok=True)
    there = contents(OUT)
    before: Callable[[], None] | None = None
    if kind == "disk full":
        scarce.fill(DISK, leave=0)
    elif kind == "disk read-only":
        scarce.remount(DISK, read_only=True)
    else:
        scarce.locked(DISK, locked=True)
        before = scarce.without_privileges
    done = command(job.words, log=Path("log"), before=before)
    changed = contents(OUT) != there
    if kind == "disk read-only":
        scarce.remount(DISK, read_only=False)
    scarce.locked(DISK, locked=False)
    scarce.free_again(DISK)
    if done.code != 4:
        return f"exit {done.code}: {done.last_line}"
    return _told(kind, done) or ("something was written" if changed else None) or _again(job)
