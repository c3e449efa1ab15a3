"""Several `pretrain` runs, one after the other, in each of N processes: what a launcher starts in the tests.

`python -m tests.ranks JOBS.json N`; a job is {"source", "out", "domains", "config"} and may have "plan", "pad_to",
"stop_at" (rank 1 gets a real SIGTERM after that step), "full_at" (its disk takes no large file from that step on; what
all say of it goes to `full-RANK.txt`), "rows" (the loss is computed for so many tokens at a time) or, for the last one,
"die_at" (a SIGKILL; what the others say of it goes to `lost.txt`). One process imports torch for all jobs and ranks,
which are forked from it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    *("prismoe.train.pretrain", "prismoe.train.engine.placement", "torch.distributed.fsdp"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"),
)


def launch(jobs: Sequence[dict[str, Any]], folder: Path, *, world: int, timeout: float = 240) -> None:
    """Run `jobs` in `world` processes, as torchrun would start them.

    Raises:
        AssertionError: a process failed; with what it printed.
    """
    path = folder / f"jobs-{world}.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks", str(path), str(world)],
        cwd=ROOT,
        env={**os.environ, **shared, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, printed = parent.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # ranks that wait for one that is gone
    dead = [-signal.SIGKILL if rank == 1 and "die_at" in jobs[-1] else 0 for rank in range(world)]
    assert told.splitlines()[-1:] == [json.dumps(dead)], f"{told}\n{printed}"[-6000:]


def main(path: str, world: int) -> None:
    for name in NEEDED:
        import_module(name)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run(path)
            return
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


def run(path: str) -> None:
    from prismoe.errors import InterruptedRun, ResourceError
    from prismoe.plan import Plan
    from prismoe.train import logits
    from prismoe.train.pretrain import PretrainConfig, pretrain

    rank = int(os.environ["RANK"])
    for job in json.loads(Path(path).read_text()):
        stop_at, die_at, full_at = (job.get(name) for name in ("stop_at", "die_at", "full_at"))
        signals = {stop_at: signal.SIGTERM, die_at: signal.SIGKILL}
        limits, usual = resource.getrlimit(resource.RLIMIT_FSIZE), (logits.LARGEST, logits.ROWS)
        if "rows" in job:
            logits.LARGEST, logits.ROWS = 0, job["rows"]

        def progress(
            what: str,
            done: int,
            total: int | None,
            at: dict[int, signal.Signals] = signals,
            full: tuple[int | None, int] = (full_at, limits[1]),
            ends: tuple[int | None, int | None] = (die_at, full_at),
            out: Path = Path(job["out"]),
        ) -> None:
            if rank == 1 and what.startswith("train step"):
                # A checkpoint is written beside training, at its own pace.
                while done in ends and not any(out.glob("checkpoints/*/manifest.json")):
                    time.sleep(0.01)
                if done in at:
                    os.kill(os.getpid(), at[done])
                if done == full[0]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, full[1]))

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
            assert (stop_at, die_at, full_at) == (None, None, None), "was not stopped"
        except InterruptedRun:
            assert stop_at is not None, "was stopped"
        except ResourceError as error:
            if die_at is None and full_at is None:
                raise
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            (Path(job["out"]) / ("lost.txt" if full_at is None else f"full-{rank}.txt")).write_text(str(error))
        logits.LARGEST, logits.ROWS = usual


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
