"""A stopped training run goes on as if it had never stopped, bit by bit; and on other numbers of processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.place import Place, contents
from tests.torture.world import rank, together

SECONDS = 120
AFTER = 50
EVERY = 13  # steps between checkpoints: AFTER steps behind a stop the unstopped run has one, at the stop it has none
STOPS = (2, 15, 28)
MOVES = (4, 2, 1, 3)
SEGMENT = 10
CLOSE = 1e-6  # relative
TRAINING = ("pretrain.max_epochs=1000", "pretrain.router=noisy_topk", "pretrain.eval_every=9")


def run(place: Place) -> Iterator[Outcome]:
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, str(place.config), "--out", str(place.folder / "before"))
    cases: dict[str, str | None] = {}
    for world in (1, 2):
        for precision in ("fp32", "bf16"):
            cases |= _stopped(place, precision, world)
    what = (
        f"SIGTERM in a step, then the same command: weights, AdamW's moments, random draws and log of the {AFTER} steps"
    )
    yield Outcome.of(
        f"{what} after it are those of an unstopped run, bit for bit",
        cases,
        goal=12,
        note="3 points × fp32 and bf16 × 1 and 2 processes",
    )
    yield _moved(place)


def _words(place: Place, out: Path, *more: str) -> list[str]:
    return ["pretrain", str(place.config), "--out", str(out), *TRAINING, *more]


def _stopped(place: Place, precision: str, world: int) -> dict[str, str | None]:
    settings = ["pretrain.steps=100", "pretrain.batch_size=4", "pretrain.micro_batch_size=1", "pretrain.keep=99"]
    settings += [f"pretrain.save_every={EVERY}", f"pretrain.precision={precision}"]

    def trained(out: Path, *more: str, stop: int = 0) -> list[int]:
        words = _words(place, out, *settings, *more)
        ended = together(words, world=world, log=place.folder / "log", before=_drawn(out.with_suffix(".draws"), stop))
        return [one.code for one in ended]

    whole = place.fresh("whole", place.folder / "before")
    codes = trained(whole, "--max-steps", str(STOPS[-1] + AFTER))
    assert codes == [75] * world, (codes, (place.folder / "log-0.err").read_text()[-2000:])
    found: dict[str, str | None] = {}
    for step in STOPS:
        out = place.fresh("run", place.folder / "before")
        codes = trained(out, stop=step) + trained(out, "--max-steps", str(AFTER))
        wrong = f"exit codes {codes}" if set(codes) != {75} else _other(whole, out, step + AFTER, world)
        found[f"{precision}, {world} processes, stopped after step {step}"] = wrong
        for path in place.folder.glob("run.draws-*"):
            path.unlink()
    for path in place.folder.glob("whole.draws-*"):
        path.unlink()
    return found


def _drawn(log: Path, stop: int) -> Callable[[], None]:
    """After every step: the state of every generator into `log`-RANK; a SIGTERM for the last rank after step `stop`."""

    def install() -> None:
        import numpy as np
        import torch

        from prismoe.train.trainer import Trainer

        real = Trainer.step

        def step(self: Trainer, number: int) -> dict[str, object]:
            line = real(self, number)
            state = [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()]
            digest = hashlib.sha256(b"".join(state) + repr(random.getstate()).encode()).hexdigest()
            with log.with_name(f"{log.name}-{rank()}").open("a") as file:
                file.write(f"{number + 1} {digest}\n")
            if number + 1 == stop and rank() == self.engine.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return line

        Trainer.step = step  # type: ignore[method-assign]

    return install


def _other(whole: Path, out: Path, step: int, world: int) -> str | None:
    """What the run in `out` has otherwise than the one in `whole`, at its checkpoint of `step` and until there."""
    expected, found = (contents(folder / f"train/checkpoints/step-{step:08d}") for folder in (whole, out))
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        return f"checkpoint of step {step}: other bytes in {', '.join(wrong)}"
    if not any(name.endswith(".safetensors") for name in found):
        return f"no weights in the checkpoint of step {step}"
    log = (out / "train/metrics.jsonl").read_bytes()
    if not (whole / "train/metrics.jsonl").read_bytes().startswith(log) or f'"step": {step},'.encode() not in log:
        return "another log"
    for number in range(world):
        first, again = (folder.with_suffix(f".draws-{number}").read_text().split("\n") for folder in (whole, out))
        if again[:-1] != first[:step] or len(again) != step + 1:
            return f"other random draws on rank {number}"
    return None


def _moved(place: Place) -> Outcome:
    """`MOVES`: the number of processes changes at every stop; one process that never stops is the measure."""
    steps = SEGMENT * len(MOVES)
    settings = [f"pretrain.steps={steps}", "pretrain.batch_size=12"]
    one, several = (place.fresh(name, place.folder / "before") for name in ("one", "several"))

    def trained(out: Path, world: int, *more: str) -> list[int]:
        before = _read(out.with_suffix(".rows"))
        ended = together(_words(place, out, *settings, *more), world=world, log=place.folder / "log", before=before)
        return [process.code for process in ended]

    codes = [trained(one, 1)]
    codes += [
        trained(several, world, *(["--max-steps", str(SEGMENT)] if world != MOVES[-1] else [])) for world in MOVES
    ]
    expected = [[0], *([75] * world for world in MOVES[:-1]), [0] * MOVES[-1]]
    assert codes == expected, (codes, (place.folder / "log-0.err").read_text()[-2000:])
    rows = [_rows(folder.with_suffix(".rows")) for folder in (one, several)]
    losses = [_losses(folder / "train/metrics.jsonl") for folder in (one, several)]
    furthest, cases = 0.0, {}
    for step in range(1, steps + 1):
        first, again = (log.get(step, float("nan")) for log in losses)
        away = abs(again - first) / first
        furthest = max(furthest, away)
        wrong = None if away <= CLOSE else f"loss {again:.9g} and {first:.9g}, {away:.1e} apart"
        same = rows[0].get(step) == rows[1].get(step) is not None and len(rows[1][step]) == 12
        cases[f"step {step}"] = wrong if same else "other tokens"
    path = " → ".join(map(str, MOVES))
    return Outcome.of(
        f"{path} processes, stopped {len(MOVES) - 1} times: the tokens of every step are those of one process, "
        f"loss within {CLOSE:.0e} (fp32)",
        cases,
        goal=steps,
        note=f"largest difference {furthest:.0e}",
    )


def _read(log: Path) -> Callable[[], None]:
    """Every row that a process reads, by step and its number in the batch of all, into `log`-PROCESS."""

    def install() -> None:
        from prismoe.train.trainer import Trainer

        real = Trainer._batches

        def batches(self: Trainer, step: int) -> list[tuple[int, object]]:
            found = real(self, step)
            with log.with_name(f"{log.name}-{os.getpid()}").open("a") as file:
                for first, batch in found:
                    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
                        digest = hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()
                        file.write(f"{step + 1} {first + row} {digest}\n")
            return found

        Trainer._batches = batches  # type: ignore[method-assign]

    return install


def _rows(log: Path) -> dict[int, dict[int, str]]:
    found: dict[int, dict[int, str]] = {}
    for path in log.parent.glob(f"{log.name}-*"):
        for line in path.read_text().splitlines():
            step, row, digest = line.split()
            assert row not in found.get(int(step), {}), "read twice"
            found.setdefault(int(step), {})[int(row)] = digest
    return found


def _losses(log: Path) -> dict[int, float]:
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
