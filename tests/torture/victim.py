"""`python -m tests.torture.victim STEP STEP... -- WORDS...`: `prismoe WORDS`, started again and again by a launcher.

The n-th time rank n is killed in the n-th step; when there is none, the command goes on to its end. Every process says
in what step it began.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prismoe.cli import main
from prismoe.train.engine import Engine
from tests.torture.world import die, rank, whole


def run(steps: list[int], words: list[str]) -> int:
    real, attempt = Engine.at, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    checkpoints = Path(words[words.index("--out") + 1]) / "train/checkpoints"
    begun: list[int] = []

    def at(self: Engine, name: str, now: int | None = None) -> None:
        real(self, name, now)
        if now is not None and not begun:
            begun.append(now)
            print(f"attempt {attempt}, rank {rank()}: first step {now}", file=sys.stderr, flush=True)
        if name == "backward" and (attempt, self.step) in [(rank(), step) for step in steps[attempt : attempt + 1]]:
            whole(checkpoints, before=self.step)
            die()

    Engine.at = at  # type: ignore[method-assign]
    return main(words)


if __name__ == "__main__":
    cut = sys.argv.index("--")
    sys.exit(run([int(step) for step in sys.argv[1:cut]], sys.argv[cut + 1 :]))
