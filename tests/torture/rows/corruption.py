"""Single-bit flips and truncations over every file of every artefact: each is detected by what reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from prismoe import folder as folders
from prismoe.errors import PrismoeError
from tests.torture.guarded import Case, attempt
from tests.torture.mutate import flipped
from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import Finished, command

SECONDS = 40
MANY = ("a checkpoint", "token shards", "a plan")  # what the promise is about; the others are tried a tenth as often
CALIBRATE = ["seq_len=16", "max_tokens=512", "sample_tokens=64", "quantities=[activation, marks]"]

Opens = Callable[[Path], object]


def run(place: Place) -> Iterator[Outcome]:
    many = 10_000 if place.full else 1000
    for what, (folder, opens) in _artefacts(place).items():
        opens(folder)  # whole, it is read
        files, cases = _files(folder), {}
        wholes = {path: path.read_bytes() for path in files}
        count = max(many if what in MANY else many // 10, len(files))
        for number in range(count):
            path = files[number % len(files)]
            cut, at = number // len(files) % 4 == 3, place.draw.randrange(8 * path.stat().st_size)
            name = f"{number}: {path.relative_to(folder)}, {_how(at, cut=cut)}"
            cases[name] = _case(folder, opens, path, wholes[path], at, cut=cut)
        found = dict(zip(cases, attempt(list(cases.values())), strict=True))
        yield Outcome.of(
            f"corruption of {what}: flips and cuts in {len(files)} file{'s'[: len(files) > 1]}, detected on load",
            found,
            goal=count,
        )
    yield from _commands(place, place.folder / "run")


def _files(folder: Path) -> list[Path]:
    """All of them, that of the mark as well."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _how(at: int, *, cut: bool) -> str:
    return f"cut at byte {at // 8}" if cut else f"bit {at} flipped"


def _damaged(whole: bytes, at: int, *, cut: bool) -> bytes:
    return whole[: at // 8] if cut else flipped(whole, at)


def _case(folder: Path, opens: Opens, path: Path, whole: bytes, at: int, *, cut: bool) -> Case:
    def case() -> str | None:
        folders._intact.clear()  # nothing is known of the files, as in a process that starts
        try:
            path.write_bytes(_damaged(whole, at, cut=cut))
            opens(folder)
            return "not detected"
        except PrismoeError as error:
            # What stands for the file may be the folder, where the file cannot be told from one that is not there.
            return None if path.name in str(error) else f"does not name the file: {error}"
        finally:
            path.write_bytes(whole)

    return case


def _commands(place: Place, run: Path) -> Iterator[Outcome]:
    """The same by the command that trains, once a file; and what `--no-verify` then reads."""
    cases: dict[str, str | None] = {}
    for number, path in enumerate([*_files(run / "moe"), *_files(run / "data" / "stories")]):
        if place.late:
            break
        cut, at = number % 4 == 3, place.draw.randrange(8 * path.stat().st_size)
        done = _pretrain(place, run, path, at, cut=cut)
        good = done.code == 3 and path.name in done.last_line and "Traceback" not in done.error
        name = f"{path.relative_to(run)}, {_how(at, cut=cut)}"
        cases[name] = None if good else f"exit {done.code}: {done.last_line[:200]}"
    note = "with `pretrain`, each file once"
    yield Outcome.of("corruption, by the command line: exit 3, naming the file", cases, goal=len(cases), note=note)
    cases = {}
    for path in (run / "moe" / "model.safetensors", run / "data" / "stories" / "train-00000-000.tokens"):
        at = 8 * (path.stat().st_size // 8 * 4)  # the lowest bit of a number
        refused, read = (_pretrain(place, run, path, at, *more) for more in ((), ("--no-verify",)))
        good = (refused.code, read.code) == (3, 75)  # stopped after one step
        cases[path.name] = None if good else f"exit {refused.code} and {read.code}: {read.last_line[:200]}"
    yield Outcome.of("a wrong bit is read with --no-verify and with nothing else", cases, goal=2)


def _pretrain(place: Place, run: Path, path: Path, at: int, *more: str, cut: bool = False) -> Finished:
    shutil.rmtree(run / "train", ignore_errors=True)
    whole = path.read_bytes()
    try:
        path.write_bytes(_damaged(whole, at, cut=cut))
        words = ("pretrain", str(place.config), "--max-steps", "1", "--out", str(run), *more)
        return command(words, log=place.folder / "log")
    finally:
        path.write_bytes(whole)


def _artefacts(place: Place) -> dict[str, tuple[Path, Opens]]:
    from prismoe.checkpoint import Checkpoint
    from prismoe.convert.job import PLAN
    from prismoe.data.shards import SPLITS, Domain
    from prismoe.plan import Plan
    from prismoe.routing.record import RoutingTrace
    from prismoe.stats.calibration import Calibration
    from tests.report import random_trace

    def checkpoint(folder: Path) -> None:
        found = Checkpoint.open(folder)
        for name in found.tensors:
            found.array(name)
        Plan.load(folder / PLAN)

    def domain(folder: Path) -> None:
        found = Domain.open(folder)
        for split in SPLITS:
            found.tokens(split)[:1], found.ends(split)[:1]

    def calibration(folder: Path) -> None:
        found = Calibration.open(folder)
        for layer in range(found.num_layers):
            found.layer(layer)

    run = place.folder / "run"
    for verb in ("plan", "convert", "prepare", "calibrate"):
        sizes = [f"calibrate.{size}" for size in CALIBRATE] if verb == "calibrate" else []
        place.command(verb, str(place.config), *sizes, "--out", str(run))
    (run / "plan").mkdir()
    shutil.copy(run / "plan.safetensors", run / "plan")
    (run / "trace").mkdir()
    random_trace(layers=3, sample=32).save(run / "trace" / "trace.safetensors")
    state, restore = _training_state(place.folder / "state")
    return {
        "a checkpoint": (run / "moe", checkpoint),
        "token shards": (run / "data" / "stories", domain),
        "a plan": (run / "plan", lambda folder: Plan.load(folder / "plan.safetensors")),
        "a training state": (state, restore),
        "a routing trace": (run / "trace", RoutingTrace.open),
        "a calibration": (run / "calibration", calibration),
    }


def _training_state(folder: Path) -> tuple[Path, Opens]:
    """A checkpoint of a linear layer after one step."""
    import torch

    from prismoe.train import checkpoints
    from prismoe.train.engine import Engine
    from prismoe.train.engine.layout import Layout
    from prismoe.train.routers import Policy

    model, engine, policy = torch.nn.Linear(5, 3), Engine(Layout(), rank=0, device=torch.device("cpu")), Policy([])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    tensors = checkpoints.tensors_of(model, policy, optimizer)
    path = checkpoints.save(folder, step=1, engine=engine, tensors=tensors, state={"step": 1})
    return path, lambda at: checkpoints.restore(at, engine=engine, model=model, policy=policy, optimizer=optimizer)
