"""Two processes on one output: the second leaves at once and names the first, whose result is what it was to be.

The first is stopped (SIGSTOP) in the middle of its work, so that the second can only leave if it does not wait.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prismoe.lock import LOCK
from tests.torture.disk import Counter, install
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.processes import Finished, Running, command, start
from tests.torture.rows.kill import CURVES, DISK, OFTEN, OUT, TIMES

SECONDS = 45
RACES = ("plan", "convert", "prepare")
STAGES = ("plan", "convert", "verify", "prepare", "calibrate", "pretrain", "eval", "trace", "report")
MEASURE = (*("calibrate.seq_len=16", "calibrate.max_tokens=512"), *("calibrate.sample_tokens=64", "eval.max_tokens=64"))
# How long they took is in what these write.
CLOCKS = ("eval", "trace", "report", "run", "verify", "prune-experts", "similarity", "generate")
WRITTEN = OUT / "made.json"  # of a verb that makes a single file


@dataclass(frozen=True)
class Job:
    """A command, what is there before it, the files that it leaves, and the steps in which it holds the output."""

    words: tuple[str, ...]
    before: Path
    expected: dict[str, str]
    first: int
    last: int


@dataclass(frozen=True)
class Case:
    """A verb that is at work up to a step when a second process begins, with the same command or another one."""

    verb: str
    step: int
    second: str

    def __str__(self) -> str:
        return f"{self.verb}, stopped at step {self.step}, then {self.second}"


def run(place: Place) -> Iterator[Outcome]:
    commands = _commands(place)
    jobs = {verb: _job(place, verb, *command) for verb, command in commands.items()}
    cases = []
    for verb, job in jobs.items():
        often = verb in (*RACES, "pretrain", "tune")
        count = 12 if place.full else 3 if often else 1
        steps = {job.first + (job.last - job.first) * number // (count - 1 or 1) for number in range(count)}
        steps = steps if count > 1 else {(job.first + job.last) // 2}
        cases += [Case(verb, step, "the same") for step in sorted(steps)]
        if often or (place.full and verb != "reference-loss"):  # which has nothing to force
            cases.append(Case(verb, (job.first + job.last) // 2, "--force"))
    found = place.spread(cases, lambda case: _second(jobs[case.verb], case))
    what = "two processes on one output: the second leaves at once, naming the first, whose result is as alone"
    yield Outcome.of(what, found, goal=len(cases), note=f"{len(jobs)} verbs")
    times = 25 if place.full else 4
    races = [f"{verb}, {number}" for verb in RACES for number in range(times)]
    found = place.spread(races, lambda name: _race(jobs[name.partition(",")[0]]))
    what = "two processes that begin at the same moment: one does the work, the other leaves naming it"
    yield Outcome.of(what, found, goal=len(races))


def _commands(place: Place) -> dict[str, tuple[tuple[str, ...], Path]]:
    """Every verb that writes: its words, and the folder that is there before."""
    config, base = str(place.config), place.fresh("base")
    found: dict[str, tuple[tuple[str, ...], Path]] = {}
    for verb in STAGES:
        words = (verb, config, *(MEASURE if verb in ("calibrate", "eval") else ()), *_often(verb))
        found[verb] = (words, place.fresh(f"before {verb}", like=base))
        if verb != "calibrate":  # everything after it would depend on it
            place.command(*words, "--out", str(base))
    nothing, moe = place.fresh("nothing"), str(base / "moe")
    found["run"] = (("run", config, *MEASURE[-1:]), nothing)
    found["tune"] = (("tune", str(place.tuning), *_often("tune")), nothing)
    found["densify"] = (("densify", moe), nothing)
    found["similarity"] = (("similarity", moe), nothing)
    found["prune-experts"] = (("prune-experts", str(base), "keep=3", "seq_len=16", "max_tokens=64"), nothing)
    texts = [str(place.folder / "inputs" / name) for name in ("stories0.jsonl", "code.txt")]
    found["train-filter"] = (("train-filter", f"keep={place.folder}/keep.txt", f"drop={texts[1]}"), nothing)
    words = [f"a story of {number} kings and their {number * 7} sons" for number in range(30)]
    (place.folder / "keep.txt").write_text("\n".join(words))
    prompts = place.folder / "prompts.txt"
    prompts.write_text("Once upon a time\nThe king\n")
    single = ("template=vicuna_v1_1", "max_new_tokens=4", "device=cpu", "batch_size=1")
    found["generate"] = (("generate", moe, str(prompts), *single), nothing)
    sizes = ("seq_len=16", "max_tokens=64", "batch_size=4")
    found["reference-loss"] = (("reference-loss", moe, str(base / "data"), *sizes), nothing)
    return found


def _often(verb: str) -> tuple[str, ...]:
    return (OFTEN[verb],) if verb in OFTEN else ()


def _job(place: Place, verb: str, words: tuple[str, ...], before: Path) -> Job:
    """Run it alone, in a worker, for the files that it leaves and the steps that it takes."""
    whole, held, all_steps = place.folder / f"whole {verb}", Counter(), Counter()
    out = WRITTEN if verb in ("generate", "reference-loss") else OUT
    words = (*words, "--out", str(out))

    def meet(number: int, name: str, path: str) -> None:
        if name == "pwrite" and not held.value and Path(path).name in (LOCK, f".{out.name}.lock"):
            while held.value < number + 1:
                held.add()

    def alone(_: str) -> None:
        _begin(before)
        done = command(words, log=Path("log"), before=lambda: install(DISK, all_steps, meet=meet))
        assert done.code == 0, f"{' '.join(words)}: {done.error[-2000:]}"
        shutil.copytree(OUT, whole)

    problems = place.spread([verb], alone, workers=1)
    assert not any(problems.values()), problems
    assert held.value, f"{verb} holds nothing"
    return Job(words, before, _compared(verb, whole), held.value, all_steps.value)


def _compared(verb: str, folder: Path) -> dict[str, str]:
    found = {name: sha for name, sha in contents(folder, without=TIMES).items() if CURVES not in Path(name).parts}
    return dict.fromkeys(found, "") if verb in CLOCKS else found


def _begin(before: Path) -> None:
    shutil.rmtree(DISK, ignore_errors=True)
    DISK.mkdir()
    if any(before.iterdir()):
        shutil.copytree(before, OUT)


def _second(job: Job, case: Case) -> str | None:
    _begin(job.before)

    def meet(number: int, name: str, path: str) -> None:
        if number == case.step and name not in ("create", "open"):
            os.kill(os.getpid(), signal.SIGSTOP)

    first = start(job.words, log=Path("first"), before=lambda: install(DISK, Counter(), meet=meet))
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        return f"the first ended before step {case.step}: {first.printed()[-300:]}"
    there = _everything()
    more = ("--force",) if case.second == "--force" else ()
    second = command((*job.words, *more), log=Path("second"))
    changed = sorted(name for name, _ in there ^ _everything())
    first.signal(signal.SIGCONT)
    done = first.wait()
    if wrong := _refused(second, first):
        return wrong
    if changed:
        return f"the second changed {', '.join(changed[:3])}"
    return _finished(job, case.verb, done)


def _race(job: Job) -> str | None:
    """Both wait until both are there."""
    _begin(job.before)
    reader, writer = os.pipe()

    def ready() -> None:
        os.close(writer)
        os.read(reader, 1)

    both = [start(job.words, log=Path(name), before=ready) for name in ("one", "two")]
    os.close(reader)
    os.close(writer)
    ended = [running.wait() for running in both]
    verb = job.words[0]
    winners = [number for number, done in enumerate(ended) if done.code == 0]
    if not winners:
        return f"none did it: {ended[0].last_line}; {ended[1].last_line}"
    if len(winners) == 1:  # else one began when the other was done already
        winner = winners[0]
        if wrong := _refused(ended[1 - winner], both[winner]):
            return wrong
    return _finished(job, verb, ended[winners[0]])


def _refused(second: Finished, first: Running) -> str | None:
    if second.timed_out:
        return "the second waits"
    lines = [line for line in second.error.splitlines() if line.startswith("prismoe: ")]
    if second.code != 4 or len(lines) != 1 or "Traceback" in second.error:
        return f"the second: exit {second.code}: {second.error[-300:]}"
    return None if f"in use by process {first.pid} " in lines[0] else f"does not name process {first.pid}: {lines[0]}"


def _finished(job: Job, verb: str, done: Finished) -> str | None:
    if done.code != 0:
        return f"the first then ended with {done.code}: {done.last_line}"
    found = _compared(verb, OUT)
    wrong = sorted(name for name in job.expected.keys() | found.keys() if job.expected.get(name) != found.get(name))
    return f"the first left other bytes: {', '.join(wrong)}" if wrong else None


def _everything() -> set[tuple[str, bytes]]:
    return {(str(path), path.read_bytes()) for path in DISK.rglob("*") if path.is_file()}
