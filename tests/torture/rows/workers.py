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
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import tiny_dense
from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.spread import CORES
from tests.torture.world import EVERY, begin, die, rank, ready, together, whole

SECONDS = 100
STEPS, AT = 12, 7
SAVED = 10  # the first checkpoint after `AT`
RELAUNCHED = (AT, 11)  # rank 0 is killed the first time, rank 1 the second time
PHASES = ("reading the batch", "forward", "backward", "adding up gradients", "changing the weights", "saving")
WATCHDOG = 8.0  # seconds; many times as long where a process needs that before it stands still
PATIENCE = 900.0  # seconds that a whole command may take
ROOT = Path(__file__).resolve().parents[3]
TRAINING = (
    *(f"pretrain.steps={STEPS}", f"pretrain.save_every={EVERY}", "pretrain.batch_size=6", "pretrain.max_epochs=1000"),
    *("pretrain.eval_tokens=64", "pretrain.eval_every=0", "pretrain.keep=99"),
)


@dataclass(frozen=True)
class Case:
    """In rank `who` of `world`, when it comes to `phase` of step `AT` or, if it saves, of the first save after it."""

    world: int
    who: int
    phase: str
    frozen: bool

    def __str__(self) -> str:
        what = "stands still" if self.frozen else "killed"
        return f"rank {self.who} of {self.world} {what} in '{self.phase}'"


def run(place: Place) -> Iterator[Outcome]:
    ready()
    tiny_dense(place.folder / "small", num_hidden_layers=2)
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, *_common(place, place.folder / "before"))
    torchrun = _relaunch(place)  # most of its time goes into imports
    try:
        ranks = [(world, who) for world in (2, 3) for who in range(world)]
        frozen = [Case(world, who, phase, True) for (world, who), phase in zip(ranks, PHASES, strict=False)]
        killed = [
            Case(world, who, phase, False)
            for world, who in ranks
            for number, phase in enumerate(PHASES)
            if place.full or world == 2 or number == 2 * who + 1
        ]
        wrong = place.spread((2, 3), lambda world: _unstopped(place, world))
        assert not any(wrong.values()), wrong
        # Those that stand still are waited for, not worked for.
        found = place.spread([*frozen, *killed], lambda case: _lost(place, case), workers=CORES + 2)
        yield _killed(place, {str(case): found[str(case)] for case in killed if str(case) in found})
        yield Outcome.of(
            f"each rank of 2 and of 3 stopped for good: the watchdog ({WATCHDOG:.0f} s here) ends the others with "
            "exit 4, naming rank, step and phase, and the same command goes on",
            {str(case): found[str(case)] for case in frozen if str(case) in found},
            goal=5,
        )
        yield _relaunched(place, torchrun)
    finally:
        torchrun.kill()
        torchrun.wait()


def _common(place: Place, out: Path) -> list[str]:
    return [str(place.config), "--out", str(out), f"source={place.folder / 'small'}"]


def _words(place: Place, out: Path, *more: str) -> list[str]:
    return ["pretrain", *_common(place, out), "--json", *TRAINING, *more]


def _unstopped(place: Place, world: int) -> str | None:
    out = place.fresh(f"whole-{world}", place.folder / "before")
    ended = together(_words(place, out), world=world, log=Path("log").absolute(), timeout=PATIENCE)
    return None if [one.code for one in ended] == [0] * world else ended[0].error[-600:]


def _result(out: Path) -> dict[str, str]:
    found = contents(out / "train")
    kept = ("model/", "metrics.jsonl")
    return {name: digest for name, digest in found.items() if name.startswith(kept) and "manifest" not in name}


def _at(case: Case, out: Path) -> Callable[[], None]:
    """What is done to the processes of `case`: nothing to the others.

    It comes when the last checkpoint is written, for that is one that the run can go on from.
    """

    def install() -> None:
        from prismoe.train.engine import Engine

        if rank() != case.who:
            return
        real, seen = Engine.at, [0]

        def at(self: Engine, name: str, step: int | None = None) -> None:
            real(self, name, step)
            seen[0] = max(seen[0], self.step)
            if name == case.phase and seen[0] >= AT:
                whole(out / "train/checkpoints", before=AT)
                if case.frozen:
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    die()

        Engine.at = at  # type: ignore[method-assign]

    return install


def _lost(place: Place, case: Case) -> str | None:
    out = place.folder / str(case).replace(" ", "-").replace("'", "")
    wrong = _stood_still(place, case, out) if case.frozen else _died(place, case, out)
    return wrong or _went_on(place, case.world, out)


def _died(place: Place, case: Case, out: Path) -> str | None:
    place.fresh(out.name, place.folder / "before")
    running = begin(_words(place, out), world=case.world, log=Path("log").absolute(), before=_at(case, out))
    ended = [one.wait(PATIENCE) for one in running]
    first = ended.pop(case.who)
    if first.code != -signal.SIGKILL or first.timed_out:
        return f"exit {first.code} instead of being killed: {first.last_line[:300]}"
    if any(one.timed_out for one in ended):
        return "the others hang"
    told = [re.search(r"step (\d+), .+: rank \d+ lost the others", one.error) for one in ended]
    if {one.code for one in ended} != {4} or not all(told):
        return f"others: {[(one.code, one.last_line[:300]) for one in ended]}"
    steps = [int(found[1]) for found in told if found]
    # Those that are not killed go on while the checkpoint is written.
    expected = range(SAVED, STEPS + 1) if case.phase == "saving" else (AT,)
    return None if all(step in expected for step in steps) else f"told of the steps {steps}"


def _stood_still(place: Place, case: Case, out: Path) -> str | None:
    """SIGSTOP: nobody closes a connection, so that only the watchdog can tell."""
    for timeout in (WATCHDOG, 20 * WATCHDOG):
        place.fresh(out.name, place.folder / "before")
        words = _words(place, out, f"pretrain.timeout={timeout}")
        running = begin(words, world=case.world, log=Path("log").absolute(), before=_at(case, out))
        while (state := _state(running[case.who].pid)) not in "TZ":
            time.sleep(0.02)
        others = [one.wait(PATIENCE) for number, one in enumerate(running) if number != case.who]
        running[case.who].signal(signal.SIGKILL)
        running[case.who].wait()
        if state == "T":
            break  # else the machine was so slow that the watchdog spoke before
    else:
        return f"did not come so far: {[(one.code, one.last_line[:200]) for one in others]}"
    if any(one.timed_out for one in others) or {one.code for one in others} != {4}:
        return f"others: {[(one.code, one.last_line[:300]) for one in others]}"
    # Rank 0 keeps the places of all here, so that they go when it stands still or ends.
    store = rf"step {AT}: rank 0, or the launcher, .+ do not answer .+ which waits in '"
    named = rf"step \d+: rank {case.who} has said nothing since phase '.+ which waits in '.+' of step {AT}\b"
    told = [re.search(f"{named}|{store}", one.error) for one in others]
    if not any(told) or (case.who and not any(re.search(named, one.error) for one in others)):
        return f"told: {[one.error[-400:] for one in others]}"
    return None


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _went_on(place: Place, world: int, out: Path) -> str | None:
    """What is wrong with the run that the same command makes of it."""
    last = _steps(out)
    ended = together(_words(place, out), world=world, log=Path("log").absolute(), timeout=PATIENCE)
    if [one.code for one in ended] != [0] * world:
        return f"the same command then ended with {[one.code for one in ended]}: {ended[0].last_line[:300]}"
    # What was made while a checkpoint was being written is not of the interval before it.
    lost = min(last, SAVED) - json.loads(ended[0].out)["resumed_from"]
    out.with_suffix(".lost").write_text(str(lost))
    if not 0 <= lost <= EVERY:
        return f"{lost} steps lost"
    return None if _result(out) == _result(place.folder / f"whole-{world}") else "other bytes than an unstopped run"


def _steps(out: Path) -> int:
    lines = map(json.loads, (out / "train/metrics.jsonl").read_text().splitlines())
    return max((line["step"] for line in lines if line["event"] == "step"), default=0)


def _killed(place: Place, cases: dict[str, str | None]) -> Outcome:
    most = max((int(path.read_text()) for path in place.folder.glob("*.lost")), default=0)
    return Outcome.of(
        f"each rank of 2 and of 3 killed in each phase of a step: the others end with step and phase, the same command "
        f"ends with an unstopped run's bytes; a checkpoint every {EVERY} steps, written when the rank is killed",
        cases,
        goal=30 if place.full else 15,
        note=f"{most} steps lost at most",
    )


def _relaunch(place: Place) -> subprocess.Popen[str]:
    """The real torchrun, which starts all processes again by itself."""
    out = place.fresh("relaunched", place.folder / "before")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", str(len(RELAUNCHED)), "-m", "tests.torture.victim", *map(str, RELAUNCHED), "--"]
    with (place.folder / "torchrun.out").open("w") as said, (place.folder / "torchrun.err").open("w") as error:
        words = [*torchrun, *_words(place, out)]
        return subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=error, text=True)


def _relaunched(place: Place, torchrun: subprocess.Popen[str]) -> Outcome:
    code = torchrun.wait(PATIENCE)
    error = (place.folder / "torchrun.err").read_text()
    begun = [1, *(1 + (step - 1) // EVERY * EVERY for step in RELAUNCHED)]
    cases: dict[str, str | None] = {}
    for who in range(len(RELAUNCHED)):
        again = [f"attempt {who + 1}, rank {each}: first step {begun[who + 1]}" for each in range(2)]
        wrong = None
        if code != 0 or f"(exitcode: -9) local_rank: {who} " not in error:
            wrong = f"exit {code}: {error[-600:]}"
        elif missing := [line for line in again if line not in error]:
            wrong = f"not so: {missing}"
        elif _result(place.folder / "relaunched") != _result(place.folder / "whole-2"):
            wrong = "other bytes than an unstopped run"
        cases[f"rank {who} of 2 killed under torchrun"] = wrong
    return Outcome.of(
        f"each rank killed once under torchrun --max-restarts: started again by it from the last checkpoint (one every "
        f"{EVERY} steps), and ends with an unstopped run's bytes",
        cases,
        goal=2,
    )
