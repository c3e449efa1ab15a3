"""A process of several is killed or stands still: the others say so and end, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.world import begin, rank, together

SECONDS = 150
EVERY, STEPS, AT = 10, 30, 17
PHASES = ("reading the batch", "forward", "backward", "adding up gradients", "changing the weights", "saving")
WATCHDOG = 6.0  # seconds
ROOT = Path(__file__).resolve().parents[3]
TRAINING = (
    *(f"pretrain.steps={STEPS}", f"pretrain.save_every={EVERY}", "pretrain.batch_size=6", "pretrain.max_epochs=1000"),
    *("pretrain.eval_tokens=64", "pretrain.keep=99"),
)


def run(place: Place) -> Iterator[Outcome]:
    before = place.folder / "before"
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, str(place.config), "--out", str(before))
    whole = {world: _unstopped(place, before, world) for world in (2, 3)}
    yield _killed(place, before, whole)
    yield _frozen(place, before, whole)
    yield _relaunched(place, before, whole)


def _words(place: Place, out: Path, *more: str) -> list[str]:
    return ["pretrain", str(place.config), "--out", str(out), "--json", *TRAINING, *more]


def _unstopped(place: Place, before: Path, world: int) -> dict[str, str]:
    out = place.fresh("whole", before)
    ended = together(_words(place, out), world=world, log=place.folder / "log")
    assert [one.code for one in ended] == [0] * world, ended[0].error[-2000:]
    return _result(out)


def _result(out: Path) -> dict[str, str]:
    found = contents(out / "train")
    kept = ("model/", "metrics.jsonl")
    return {name: digest for name, digest in found.items() if name.startswith(kept) and "manifest" not in name}


def _at(phase: str, who: int, act: Callable[[], None]) -> Callable[[], None]:
    """In rank `who`: `act` when it comes to `phase` of step `AT` or, if it saves, of the first step saved after it."""

    def install() -> None:
        from prismoe.train.engine import Engine

        if rank() != who:
            return
        real, seen = Engine.at, [0]

        def at(self: Engine, name: str, step: int | None = None) -> None:
            real(self, name, step)
            seen[0] = max(seen[0], self.step)
            if name == phase and seen[0] >= AT:
                act()

        Engine.at = at  # type: ignore[method-assign]

    return install


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _killed(place: Place, before: Path, whole: dict[int, dict[str, str]]) -> Outcome:
    cases: dict[str, str | None] = {}
    longest, most = 0.0, 0
    for world in (2, 3):
        for who in range(world):
            for phase in PHASES if place.full or world == 2 else PHASES[1::2]:
                out = place.fresh("run", before)
                running = begin(_words(place, out), world=world, log=place.folder / "log", before=_at(phase, who, _die))
                first = running[who].wait(120)
                dead = time.monotonic()
                others = [one.wait(60) for number, one in enumerate(running) if number != who]
                longest = max(longest, time.monotonic() - dead)
                wrong, lost = _went_on(place, out, world, whole)
                most = max(most, lost)
                said = [re.search(r"step (\d+), .+: rank \d+ lost the others", one.error) for one in others]
                if first.code != -signal.SIGKILL:
                    wrong = f"exit {first.code} instead of being killed"
                elif any(one.timed_out for one in others):
                    wrong = "the others hang"
                elif {one.code for one in others} != {4} or not all(said):
                    wrong = f"others: {[(one.code, one.last_line[:160]) for one in others]}"
                cases[f"rank {who} of {world} killed in '{phase}'"] = wrong
    return Outcome.of(
        f"each rank of 2 and of 3 killed in each phase of a step: the others end with step and phase, the same command "
        f"ends with an unstopped run's bytes; a checkpoint every {EVERY} steps",
        cases,
        goal=12 + (18 if place.full else 9),
        note=f"the others ended within {longest:.1f} s, {most} steps lost at most",
    )


def _went_on(place: Place, out: Path, world: int, whole: dict[int, dict[str, str]]) -> tuple[str | None, int]:
    """What is wrong with the run that the same command makes of it, and how many steps were lost."""
    log = out / "train/metrics.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"step"' in line]
    ended = together(_words(place, out), world=world, log=place.folder / "log")
    if [one.code for one in ended] != [0] * world:
        return f"the same command then ended with {[one.code for one in ended]}: {ended[0].last_line}", 0
    lost = max(steps, default=0) - json.loads(ended[0].out)["resumed_from"]
    if lost > EVERY:
        return f"{lost} steps lost", lost
    return (None if _result(out) == whole[world] else "other bytes than an unstopped run"), lost


def _frozen(place: Place, before: Path, whole: dict[int, dict[str, str]]) -> Outcome:
    """SIGSTOP: nobody closes a connection, so that only the watchdog can tell."""
    cases: dict[str, str | None] = {}
    longest = 0.0
    for world in (2, 3):
        for who in range(world):
            phase = PHASES[(who + world) % 3 + 1]
            out = place.fresh("run", before)
            words = _words(place, out, f"pretrain.timeout={WATCHDOG}")
            running = begin(words, world=world, log=place.folder / "log", before=_at(phase, who, _stand_still))
            while _state(running[who].pid) not in "TZ":
                time.sleep(0.02)
            still = time.monotonic()
            others = [one.wait(120) for number, one in enumerate(running) if number != who]
            longest = max(longest, time.monotonic() - still)
            running[who].signal(signal.SIGKILL)
            running[who].wait()
            wrong, _ = _went_on(place, out, world, whole)
            told = [line for one in others for line in one.error.splitlines() if f"rank {who}" in line]
            named = any(re.search(r"step \d+", line) and "'" in line for line in told)
            if any(one.timed_out for one in others) or {one.code for one in others} != {4}:
                wrong = f"others: {[(one.code, one.last_line[:200]) for one in others]}"
            elif not named:
                wrong = f"not named: {[one.last_line[:200] for one in others]}"
            cases[f"rank {who} of {world} stands still in '{phase}'"] = wrong
    return Outcome.of(
        f"each rank of 2 and of 3 stopped for good: the watchdog ({WATCHDOG:.0f} s here) ends the others with exit 4, "
        "naming rank, step and phase, and the same command goes on",
        cases,
        goal=5,
        note=f"the others ended within {longest:.0f} s",
    )


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _relaunched(place: Place, before: Path, whole: dict[int, dict[str, str]]) -> Outcome:
    """The real torchrun, which starts all processes again by itself."""
    cases: dict[str, str | None] = {}
    for who in range(2):
        out = place.fresh("run", before)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--max-restarts", "1", "-m", "tests.torture.victim", str(who), str(AT)]
        done = subprocess.run(
            [*torchrun, *_words(place, out)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )
        wrong = None
        if done.returncode != 0 or "Signal 9 (SIGKILL)" not in done.stderr:
            wrong = f"exit {done.returncode}: {done.stderr[-300:]}"
        elif json.loads(done.stdout)["resumed_from"] != AT // EVERY * EVERY:
            wrong = f"went on from step {json.loads(done.stdout)['resumed_from']}"
        elif _result(out) != whole[2]:
            wrong = "other bytes than an unstopped run"
        cases[f"rank {who} of 2 killed under torchrun"] = wrong
    return Outcome.of(
        "each rank killed once under torchrun --max-restarts: started again by it from the last checkpoint, and ends "
        "with an unstopped run's bytes",
        cases,
        goal=2,
    )
