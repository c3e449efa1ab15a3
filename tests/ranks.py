"""Several `pretrain` runs, one after the other, in each of N processes: what a launcher starts in the tests.

`python -m tests.ranks JOBS.json`; a job is {"source", "out", "domains", "config", "plan"?, "pad_to"?, "stop_at"?}. A job that is
told to stop sends its rank 1 a real SIGTERM after that step; one process importing torch serves all jobs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(jobs: Sequence[dict[str, Any]], folder: Path, *, world: int, timeout: float = 240) -> list[str]:
    """Run `jobs` in `world` processes, as torchrun would start them; what each process printed to stderr.

    Raises:
        AssertionError: a process failed; with what it printed.
    """
    path = folder / f"jobs-{world}.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **shared, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(path)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [child.communicate(timeout=timeout)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * world, "\n".join(printed)[-6000:]
    return printed


def main(path: str) -> None:
    from prismoe.errors import InterruptedRun
    from prismoe.plan import Plan
    from prismoe.train.pretrain import PretrainConfig, pretrain

    rank = int(os.environ["RANK"])
    for job in json.loads(Path(path).read_text()):
        stop_at = job.get("stop_at")

        def progress(what: str, done: int, total: int | None, stop_at: int | None = stop_at) -> None:
            if rank == 1 and what.startswith("train step") and done == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        plan = Plan.load(Path(job["plan"])) if "plan" in job else None
        config = PretrainConfig(**job["config"])
        try:
            pretrain(
                job["source"],
                config,
                domains=job["domains"],
                out=job["out"],
                plan=plan,
                pad_to=job.get("pad_to", 32),
                on_progress=progress,
            )
            assert stop_at is None, "was not stopped"
        except InterruptedRun:
            assert stop_at is not None, "was stopped"


if __name__ == "__main__":
    main(sys.argv[1])
