"""A stopped training run goes on as if it had never stopped, bit by bit; and on other numbers of processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import tiny_dense
from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.world import rank, ready, together

SECONDS = 80
AFTER = 50
EVERY = 13  # steps between checkpoints: AFTER steps behind a stop the unstopped run has one, at the stop it has none
STOPS = (2, 15, 28)
MOVES = (4, 2, 1, 3)
SEGMENT = 10
CLOSE = 1e-6  # relative
TRAINING = (
    "pretrain.max_epochs=1000",
    "pretrain.router=noisy_topk",
    "pretrain.eval_every=20",
    "pretrain.eval_tokens=64",
)


@dataclass(frozen=True)
class Case:
    """A run of `world` processes that is stopped after step `stop`; 0: one that never is."""

    precision: str
    world: int
    stop: int = 0

    def __str__(self) -> str:
        return f"{self.precision}, {self.world} processes, stopped after step {self.stop}"

    @property
    def name(self) -> str:
        return f"{self.precision}-{self.world}-{self.stop}"


class Moves:
    """A run whose processes are `MOVES[0]`, `MOVES[1]`, … in number, stopped in between."""

    def __str__(self) -> str:
        return "other numbers of processes"


def run(place: Place) -> Iterator[Outcome]:
    ready()
    tiny_dense(place.folder / "small", num_hidden_layers=2)
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, *_common(place, place.folder / "before"))
    both = [(precision, world) for world in (2, 1) for precision in ("fp32", "bf16")]  # the long ones first
    wholes: list[Case | Moves] = [*(Case(*one) for one in both), Moves()]
    found = place.spread(wholes, lambda case: _unstopped(place, case))
    assert not any(found.values()), found
    stopped: list[Case | Moves] = [Case(precision, world, stop) for precision, world in both for stop in STOPS]
    moves = Moves()
    found = place.spread([moves, *stopped], lambda case: _stopped(place, case))
    wrong = found.pop(str(moves), "no time")
    what = (
        f"SIGTERM in a step, then the same command: weights, AdamW's moments, random draws and log of the {AFTER} steps"
    )
    yield Outcome.of(
        f"{what} after it are those of an unstopped run, bit for bit",
        found,
        goal=12,
        note="3 points × fp32 and bf16 × 1 and 2 processes",
    )
    yield _moved(place, wrong)


def _common(place: Place, out: Path) -> list[str]:
    return [str(place.config), "--out", str(out), f"source={place.folder / 'small'}"]


def _trained(
    place: Place, case: Case | Moves, out: Path, before: Callable[[], None], *more: str, world: int = 0
) -> list[int]:
    """How the processes of one command ended, by rank."""
    words = ["pretrain", *_common(place, out), *TRAINING]
    if isinstance(case, Moves):
        words += [f"pretrain.steps={SEGMENT * len(MOVES)}", "pretrain.batch_size=12"]
    else:
        world = case.world
        words += ["pretrain.steps=100", "pretrain.batch_size=4", "pretrain.micro_batch_size=2"]
        words += [f"pretrain.save_every={EVERY}", f"pretrain.keep={len(STOPS)}", f"pretrain.precision={case.precision}"]
    ended = together([*words, *more], world=world, log=out.with_name(f"{out.name}-log"), before=before, timeout=900)
    return [one.code for one in ended]


def _said(out: Path) -> str:
    return out.with_name(f"{out.name}-log-0.err").read_text()[-600:]


def _unstopped(place: Place, case: Case | Moves) -> str | None:
    """Make what the stopped runs are compared with."""
    if isinstance(case, Moves):
        one = place.fresh("one", place.folder / "before")
        codes, expected = _trained(place, case, one, _read(one.with_suffix(".rows")), world=1), [0]
    else:
        one = place.fresh(case.name, place.folder / "before")
        before = _drawn(one.with_suffix(".draws"), stop=0)
        codes = _trained(place, case, one, before, "--max-steps", str(STOPS[-1] + AFTER))
        expected = [75] * case.world
    return None if codes == expected else f"exit codes {codes}: {_said(one)}"


def _stopped(place: Place, case: Case | Moves) -> str | None:
    if isinstance(case, Moves):
        return _move(place, case)
    out, whole = place.fresh(case.name, place.folder / "before"), place.folder / Case(case.precision, case.world).name
    draws = out.with_suffix(".draws")
    codes = _trained(place, case, out, _drawn(draws, case.stop))
    codes += _trained(place, case, out, _drawn(draws, stop=0), "--max-steps", str(AFTER))
    return f"exit codes {codes}: {_said(out)}" if set(codes) != {75} else _other(whole, out, case)


def _drawn(log: Path, stop: int) -> Callable[[], None]:
    """After every step: torch's generator, and who else has drawn, into `log`-RANK; a SIGTERM for the last rank after
    step `stop`.

    The generators of numpy and Python begin anywhere in every process: nothing may draw from them.
    """

    def install() -> None:
        import numpy as np
        import torch

        from prismoe.train.trainer import Trainer

        real = Trainer.step

        def step(self: Trainer, number: int) -> dict[str, object]:
            others = repr((np.random.get_state(legacy=False), random.getstate()))
            line = real(self, number)
            still = repr((np.random.get_state(legacy=False), random.getstate())) == others
            digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest() if still else "others drew"
            with log.with_name(f"{log.name}-{rank()}").open("a") as file:
                file.write(f"{number + 1} {digest}\n")
            if number + 1 == stop and rank() == self.engine.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return line

        Trainer.step = step  # type: ignore[method-assign]

    return install


def _other(whole: Path, out: Path, case: Case) -> str | None:
    """What the run in `out` has otherwise than the one in `whole`, at its last checkpoint and until there."""
    step = case.stop + AFTER
    expected, found = (_state(folder / f"train/checkpoints/step-{step:08d}") for folder in (whole, out))
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        return f"checkpoint of step {step}: other bytes in {', '.join(wrong[:3])} and in all {len(wrong)}"
    held = {name.rpartition(" ")[2] for name in found}
    if not {"model.lm_head.weight", "exp_avg.lm_head.weight", "exp_avg_sq.lm_head.weight", "state.json"} <= held:
        return f"no weights, moments or state in the checkpoint of step {step}: {sorted(held)[:5]}"
    log = (out / "train/metrics.jsonl").read_bytes()
    if not (whole / "train/metrics.jsonl").read_bytes().startswith(log) or f'"step": {step},'.encode() not in log:
        return "another log"
    for number in range(case.world):
        first, again = (folder.with_suffix(f".draws-{number}").read_text().split("\n") for folder in (whole, out))
        if again[:-1] != first[:step] or len(again) != step + 1 or any(line.endswith("drew") for line in again):
            return f"other random draws on rank {number}"
    return None


def _state(folder: Path) -> dict[str, str]:
    """sha256 of every tensor that a checkpoint's files hold, of their other headers, and of its other files.

    (The library that writes the headers puts the keys of `__metadata__` in another order each time.)
    """
    found: dict[str, bytes] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            found[path.name] = json.dumps(header, sort_keys=True).encode()
            places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            found |= {f"{path.name}: {name}": data[start:][first:end] for name, (first, end) in places.items()}
        elif path.name != "manifest.json":  # it has the hashes of whole files
            found[path.name] = data
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def _move(place: Place, moves: Moves) -> str | None:
    """`MOVES`: the number of processes changes at every stop; one process that never stops is the measure."""
    several = place.fresh("several", place.folder / "before")
    before = _read(several.with_suffix(".rows"))
    for world in MOVES:
        last = world == MOVES[-1]
        more = () if last else ("--max-steps", str(SEGMENT))
        codes = _trained(place, moves, several, before, *more, world=world)
        if codes != [0 if last else 75] * world:
            return f"exit codes {codes} of {world}: {_said(several)}"
    return None


def _moved(place: Place, wrong: str | None) -> Outcome:
    steps = SEGMENT * len(MOVES)
    cases: dict[str, str | None] = {"the runs": wrong} if wrong else {}
    furthest = 0.0
    if not wrong:
        one, several = (place.folder / name for name in ("one", "several"))
        rows = [_rows(folder.with_suffix(".rows")) for folder in (one, several)]
        losses = [_losses(folder / "train/metrics.jsonl") for folder in (one, several)]
        for step in range(1, steps + 1):
            first, again = (log.get(step, float("nan")) for log in losses)
            away = abs(again - first) / first
            furthest = max(furthest, away)
            wide = None if away <= CLOSE else f"loss {again:.9g} and {first:.9g}, {away:.1e} apart"
            same = rows[0].get(step) == rows[1].get(step) is not None and len(rows[1][step]) == 12
            cases[f"step {step}"] = wide if same else "other tokens"
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
