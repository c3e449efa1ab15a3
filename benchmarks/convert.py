"""Conversion against `cp`, in one run and interleaved: wall time with fsync, anonymous memory, bytes from the kernel.

    python benchmarks/convert.py --work DIR           # P4 and P5: 2.2 GB checkpoint, 8 experts and ×4 upcycling
    python benchmarks/convert.py --work DIR --wide    # 70B-shaped: planning on shapes, two layers of bytes

Page cache warm for everything that is read. Every output is synced inside the measured time and deleted afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from synthetic import SHAPES, Shape, synthetic

MEMORY_GOAL = 0.25e9
CONVERT = """
import sys, json
from prismoe.convert import convert
from prismoe.plan import make_plan
source, out, method, experts = sys.argv[1:]
plan = make_plan(source, method=method, num_experts=int(experts))
receipt = convert(source, plan, out=out)
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
print(json.dumps({"total": receipt.total_bytes, "seconds": receipt.seconds, **{k: int(v) for k, v in io.items()}}))
"""
PLAN = """
import sys, time
started = time.perf_counter()
from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import prepare
from prismoe.plan import make_plan
plan = make_plan(sys.argv[1], num_experts=16, top_k=4)
job = prepare(Checkpoint.open(sys.argv[1]), plan, "mixtral", 32, 5_000_000_000)
print(time.perf_counter() - started, sum(len(shard.keys) for shard in job.shards), job.total_bytes)
"""


def run(code: str, *arguments: str) -> tuple[float, int, str]:
    """Wall seconds from start to exit of a Python process, its peak anonymous bytes (sampled at 50 Hz), its output."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, env=environment) as child:
        peak = 0
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
                ours = [line.split() for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
                peak = max(peak, sum(int(kib) * 1024 for _, kib, _ in ours))
            except OSError:  # it has just ended
                pass
            time.sleep(0.02)
        wall = time.perf_counter() - started
        assert child.stdout is not None
        output = child.stdout.read().decode()
    if child.returncode:
        raise SystemExit(f"conversion failed with {child.returncode}")
    return wall, peak, output


def copy(source: Path, out: Path) -> float:
    """Wall seconds of `cp -r` and an fsync of every file."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def clear(path: Path) -> None:
    """Delete, and let the disk finish what it still has to do."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    time.sleep(1)


def machine(work: Path) -> dict[str, float]:
    """GB/s of sha256, memory copy and direct sequential writes, measured now."""
    block = memoryview(mmap.mmap(-1, 64 << 20))
    block[:] = os.urandom(len(block))
    rates = {}
    started = time.perf_counter()
    hashlib.sha256(block)
    rates["sha256_per_core"] = len(block) / (time.perf_counter() - started) / 1e9
    path = work / "rate"
    started = time.perf_counter()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for _ in range(24):
        os.write(handle, block)
    os.fsync(handle)
    os.close(handle)
    rates["disk_write"] = 24 * len(block) / (time.perf_counter() - started) / 1e9
    path.unlink()
    return rates


def compare(work: Path, source: Path, method: str, experts: int, *, copied: str, rounds: int) -> dict[str, object]:
    """Ours and `cp` of the input or of the output, one after the other, `rounds` times."""
    ours, theirs, peaks, facts = [], [], [], {}
    out, twin = work / "out", work / "twin"
    for _ in range(rounds):
        clear(out)
        wall, peak, output = run(CONVERT, str(source), str(out), method, str(experts))
        facts = json.loads(output)
        ours.append(wall)
        peaks.append(peak)
        os.sync()
        # Reading the output back puts it into the page cache, which direct writes leave alone: cp gets it warm.
        for path in out.glob("*.safetensors") if copied == "output" else ():
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass
        theirs.append(copy(source if copied == "input" else out, twin))
        clear(twin)
    clear(out)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    size_in = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return {
        "case": f"{method} {experts}",
        "input_GB": size_in / 1e9,
        "output_GB": facts["total"] / 1e9,
        "ours_s": ours,
        "cp_s": theirs,
        "ours_median_s": statistics.median(ours),
        f"cp_{copied}_median_s": statistics.median(theirs),
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
        "ratios": ratios,
        "write_GB_per_s": facts["total"] / 1e9 / statistics.median(ours),
        "peak_anonymous_MB": max(peaks) / 1e6,
        "memory_goal_met": max(peaks) <= MEMORY_GOAL,
        "written_per_output_byte": facts["write_bytes"] / facts["total"],
        "read_from_disk_per_input_byte": facts["read_bytes"] / size_in,
    }


def show(result: dict[str, object]) -> None:
    for name, value in result.items():
        if isinstance(value, list):
            value = " ".join(f"{x:.2f}" for x in value)
        print(f"  {name:32} {value:.3f}" if isinstance(value, float) else f"  {name:32} {value}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure; 20 GB free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="22 is 2.2 GB")
    parser.add_argument("--wide", action="store_true", help="70B widths: plan on shapes, convert two layers")
    parser.add_argument("--only", choices=("partition", "upcycle"))
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    source = work / "source"
    clear(source)
    show({"case": "machine, GB/s", "cores": os.cpu_count(), "load": os.getloadavg()[0], **machine(work)})
    try:
        if given.wide:
            synthetic(source, SHAPES["70b"], shards=30, sparse=True)
            _, peak, output = run(PLAN, str(source))
            seconds, tensors, total = output.split()
            plan = {"case": "70B: plan and layout on shapes", "seconds": float(seconds), "tensors": int(tensors)}
            show({**plan, "output_GB": float(total) / 1e9, "peak_anonymous_MB": peak / 1e6})
            clear(source)
            synthetic(source, Shape(**{**vars(SHAPES["70b"]), "layers": 2}))
            show(compare(work, source, "random", 16, copied="input", rounds=given.rounds))
        else:
            synthetic(source, Shape(**{**vars(SHAPES["1b"]), "layers": given.layers}))
            if given.only != "upcycle":
                show(compare(work, source, "random", 8, copied="input", rounds=given.rounds))
                show(compare(work, source, "random", 16, copied="input", rounds=given.rounds))
            if given.only != "partition":
                show(compare(work, source, "upcycle", 4, copied="output", rounds=given.rounds))
    finally:
        clear(source)


if __name__ == "__main__":
    main()
