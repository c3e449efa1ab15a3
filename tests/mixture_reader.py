"""Ranks that read a mixture, each in a process of its own and by itself: started by tests, killed and started again.

    python -m tests.mixture_reader DOMAINS OUT RULES WORLD STEPS

Prints nothing; for each of the rules (a,b) OUT/RULE gets a file of every rank, one line a step with a hash of each of
its rows, and state.json with what a trainer would keep. They go on from what is in resume.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path

from prismoe.data.mixture import Mixture
from prismoe.data.rules import Mixing
from prismoe.data.shards import Domain
from prismoe.folder import write_json_atomic

BATCH, SEQ, EVERY, SAVE = 8, 16, 7, 5


def losses(names: tuple[str, ...], step: int) -> dict[str, float]:
    """What an evaluation would give, the same on every rank."""
    return {name: 2 + math.sin(step + number) for number, name in enumerate(names)}


def open_mixing(folder: Path, rule: str) -> Mixing:
    domains = [Domain.open(path) for path in sorted(folder.iterdir())]
    mixture = Mixture(domains, weights="uniform", seq_len=SEQ, batch_size=BATCH, seed=3, max_epochs=99)
    reference = dict.fromkeys(mixture.names, 2.0)
    return Mixing(mixture, rule=rule, reference=reference, interval_tokens=EVERY * BATCH * SEQ)


def row_hashes(mixing: Mixing, step: int, *, rank: int, world: int) -> list[str]:
    batch = mixing.mixture.batch(step, rank=rank, world=world)
    columns = zip(batch.input_ids, batch.labels, batch.domain_ids, strict=True)
    return [
        hashlib.sha256(ids.tobytes() + labels.tobytes() + g.tobytes()).hexdigest()[:16] for ids, labels, g in columns
    ]


def read(folder: Path, out: Path, rule: str, *, rank: int, world: int, steps: int) -> None:
    out.mkdir(exist_ok=True)
    mixing = open_mixing(folder, rule)
    state = {"step": 0}
    if (out / "resume.json").is_file():  # not state.json, which rank 0 may have written by now
        state = json.loads((out / "resume.json").read_bytes())
        mixing.mixture.restore(state["history"])
    with (out / f"rank-{rank}-of-{world}").open("a") as log:
        for step in range(state["step"], steps):
            if step > state["step"]:  # at a checkpoint the update is in the history already
                mixing.update(step, losses(mixing.mixture.names, step))
            if step % SAVE == 0 and rank == 0:
                write_json_atomic(out / "state.json", {"step": step, "history": mixing.mixture.history})
            log.write(json.dumps([step, row_hashes(mixing, step, rank=rank, world=world)]) + "\n")
            log.flush()


def main() -> None:
    folder, out, rules, world, steps = sys.argv[1:]
    ranks = []
    for rank in range(int(world)):
        ranks.append(os.fork())  # what is imported is imported once
        if not ranks[-1]:
            for rule in rules.split(","):
                read(Path(folder), Path(out) / rule, rule, rank=rank, world=int(world), steps=int(steps))
            return
    ended = [os.waitpid(process, 0)[1] for process in ranks]
    sys.exit(any(ended))


if __name__ == "__main__":
    main()
