"""`python -m tests.torture.victim RANK STEP WORDS...`: `prismoe WORDS`, killed in that rank and step, the first time.

A launcher starts it, and again when it has died.
"""

from __future__ import annotations

import os
import signal
import sys

from prismoe.cli import main
from prismoe.train.engine import Engine


def run(who: int, step: int, words: list[str]) -> int:
    real = Engine.at

    def at(self: Engine, name: str, now: int | None = None) -> None:
        real(self, name, now)
        if self.step == step and name == "backward":
            os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) == who and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Engine.at = at  # type: ignore[method-assign]
    return main(words)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
