"""One rank that reads a mixture by itself: run as a process by tests, killed and run again.

    python -m tests.mixture_reader DOMAINS OUT RULE RANK WORLD STEPS

Prints nothing; OUT gets one line a step with a hash of each of its rows, and state.json what a trainer would keep.
It goes on from what is in resume.json.
"""

from __future__ import annotations

import hashlib
import json
import math
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


def main() -> None:
    folder, out, rule, rank, world, steps = sys.argv[1:]
    mixing, file = open_mixing(Path(folder), rule), Path(out) / f"rank-{rank}-of-{world}"
    state = {"step": 0, "length": 0}
    if (Path(out) / "resume.json").is_file():  # not state.json, which rank 0 may have written by now
        state = json.loads((Path(out) / "resume.json").read_bytes())
        mixing.mixture.restore(state["history"])
    with file.open("a") as log:
        for step in range(state["step"], int(steps)):
            if step > state["step"]:  # at a checkpoint the update is in the history already
                mixing.update(step, losses(mixing.mixture.names, step))
            if step % SAVE == 0 and rank == "0":
                write_json_atomic(Path(out) / "state.json", {"step": step, "history": mixing.mixture.history})
            log.write(json.dumps([step, row_hashes(mixing, step, rank=int(rank), world=int(world))]) + "\n")
            log.flush()


if __name__ == "__main__":
    main()
