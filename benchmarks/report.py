"""A report from a trace of 32 layers, 16 experts and 7 domains (goal: at most 10 s), its size, and where the time goes.

    python benchmarks/report.py RUN_FOLDER [--layers 32] [--experts 16] [--rounds 3]

RUN_FOLDER is a finished run: its copy gets the trace (10 texts: 7 domains and 3 benchmarks, 8,192 sampled tokens each)
and the report is written anew in a process of its own, imports and all. Wall and CPU seconds of one thread, least of
the rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GOAL = 10.0  # seconds
LARGEST = 2.0  # MB of the page
WORK = "import sys; from prismoe.report import write_report; write_report(sys.argv[1])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--sample", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from prismoe.routing.record import FILE
    from tests.report import random_trace

    with tempfile.TemporaryDirectory() as scratch:
        left_out = shutil.ignore_patterns("data", "*.safetensors")
        out = Path(shutil.copytree(given.run, Path(scratch) / "run", ignore=left_out))
        shutil.copy(given.run / "plan.safetensors", out / "plan.safetensors")
        (out / "trace").mkdir(exist_ok=True)
        random_trace(layers=given.layers, experts=given.experts, sample=given.sample).save(out / "trace" / FILE)
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
        wall, cpu = [], []
        for _ in range(given.rounds):
            started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", WORK, str(out)], env=settings, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            wall.append(time.perf_counter() - started)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        size = (out / "report.html").stat().st_size / 1e6
        pictures = sorted((out / "figures").glob("*.png"))
    print(f"{given.layers} layers, {given.experts} experts, 10 texts; load {os.getloadavg()[0]:.1f}")
    fast, small = ("met" if good else "MISSED" for good in (min(wall) <= GOAL, size < LARGEST))
    print(f"report     {min(wall):5.1f} s wall, {min(cpu):5.1f} s CPU (goal <= {GOAL:g} s: {fast})")
    print(f"page       {size:5.2f} MB (goal < {LARGEST:g}: {small}), {len(pictures)} PNG files")


if __name__ == "__main__":
    main()
