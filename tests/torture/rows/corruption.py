"""Single-bit flips and truncations over every file of every artefact: each is detected by what reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from prismoe.errors import PrismoeError
from tests.torture.guarded import Case, attempt
from tests.torture.mutate import flipped
from tests.torture.outcome import Outcome
from tests.torture.place import Place

Opens = Callable[[Path], object]


def run(place: Place) -> Iterator[Outcome]:
    count = 1000 if place.full else 200
    for what, (folder, opens) in _artefacts(place).items():
        opens(folder)  # whole, it is read
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "prismoe.json")
        cases = {}
        for number in range(count):
            path = files[number % len(files)]
            cut, at = number // len(files) % 4 == 3, place.draw.randrange(8 * path.stat().st_size)
            how = f"cut at byte {at // 8}" if cut else f"bit {at} flipped"
            cases[f"{path.relative_to(folder)}, {how}"] = _case(folder, opens, path, at, cut=cut)
        found = dict(zip(cases, attempt(list(cases.values())), strict=True))
        yield Outcome.of(f"corruption of {what}: detected on load, naming the file", found, goal=len(cases))


def _case(folder: Path, opens: Opens, path: Path, at: int, *, cut: bool) -> Case:
    def case() -> str | None:
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[: at // 8] if cut else flipped(whole, at))
            opens(folder)
            return "not detected"
        except PrismoeError as error:
            # What stands for the file may be the folder, where the file cannot be told from one that is not there.
            return None if path.name in str(error) else f"does not name the file: {error}"
        finally:
            path.write_bytes(whole)

    return case


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
    sizes = ["calibrate.seq_len=16", "calibrate.max_tokens=512", "calibrate.sample_tokens=64"]
    sizes.append("calibrate.quantities=[activation, marks]")
    for verb in ("plan", "convert", "prepare", "calibrate"):
        place.command(verb, str(place.config), *(sizes if verb == "calibrate" else ()), "--out", str(run))
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
