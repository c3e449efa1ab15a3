"""Conversion against `cp` and against other converters, in one run and interleaved: wall time with fsync, CPU seconds,
anonymous memory, bytes from the kernel.

    python benchmarks/convert.py --work DIR           # P4 and P5: 2.2 GB checkpoint, 8 and 16 experts, ×4 and ×8 copies
    python benchmarks/convert.py --work DIR --peer-llama-moe CHECKOUT --peer-mergekit VENV/bin/mergekit-moe
    python benchmarks/convert.py --work DIR --only branch --peer-mergekit …    # three fine-tunes become the experts
    python benchmarks/convert.py --work DIR --cores   # the same work on one core and on all
    python benchmarks/convert.py --work DIR --wide    # 70B-shaped: planning on shapes, two layers of bytes

Page cache warm for everything that is read. Every output is synced inside the measured time and deleted afterwards.
What the peers need is in benchmarks/converters.py; one that is not named is printed as missing, which is no pass.
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
from functools import partial
from pathlib import Path
from typing import Any

from converters import Cost, Missing, llama_moe, mergekit, sync, watch
from synthetic import SHAPES, Shape, synthetic

MEMORY_GOAL = 0.25e9
CONVERT = """
import json, os, sys
if sys.argv[5:]:
    os.sched_setaffinity(0, map(int, sys.argv[5:]))
from prismoe.convert import convert
from prismoe.plan import make_plan
source, out, method, experts = sys.argv[1:5]
method, _, rest = method.partition(" ")
branches = [f"{source}{number}" for number in range(int(experts))]
arguments = {"branches": branches, "rest": rest} if method == "branch" else {"num_experts": int(experts)}
plan = make_plan(source, method=method, **arguments)
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


def run(code: str, *arguments: object) -> Cost:
    """A Python process of ours."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return watch(command, environment={"PYTHONPATH": str(Path(__file__).resolve().parents[1])})


def copy(source: Path, out: Path) -> float:
    """Wall seconds of `cp -r` and an fsync of every file."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    sync(out)
    return time.perf_counter() - started


def clear(path: Path) -> None:
    """Delete, and let the disk finish what it still has to do."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    time.sleep(1)


def machine(work: Path) -> dict[str, float]:
    """GB/s of sha256 (for each CPU second) and of direct sequential writes, measured now."""
    block = memoryview(mmap.mmap(-1, 64 << 20))
    block[:] = os.urandom(len(block))
    rates = {}
    started = time.process_time()
    hashlib.sha256(block)
    rates["sha256_per_core"] = len(block) / (time.process_time() - started) / 1e9
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


def compare(
    work: Path,
    source: Path,
    method: str,
    experts: int,
    *,
    copied: str,
    rounds: int,
    peer: Any = None,
    peer_rounds: int = 1,
) -> dict[str, object]:
    """Ours, `cp` of the input or of the output, and in the first rounds a peer, one after the other, `rounds` times.

    `peer(source, out, experts=, work=)` gives its `Cost`.
    """
    ours: list[Cost] = []
    theirs: list[float] = []
    peers: list[Cost] = []
    missing = "none for this case" if peer is None else ""
    facts: dict[str, int] = {}
    out, twin = work / "out", work / "twin"
    for number in range(rounds):
        clear(out)
        ours.append(run(CONVERT, source, out, method, experts))
        facts = json.loads(ours[-1].output)
        os.sync()
        # Reading the output back puts it into the page cache, which direct writes leave alone: cp gets it warm.
        for path in out.glob("*.safetensors") if copied == "output" else ():
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass
        theirs.append(copy(source if copied == "input" else out, twin))
        clear(twin)
        clear(out)
        if number < peer_rounds and not missing:
            try:
                peers.append(peer(source, out, experts=experts, work=work))
            except Missing as error:
                missing = str(error)
            clear(out)
    folders = [source, *(f"{source}{number}" for number in range(experts) if method.startswith("branch"))]
    size_in = sum(path.stat().st_size for folder in folders for path in Path(folder).glob("*.safetensors"))
    median = statistics.median(cost.wall for cost in ours)
    found: dict[str, object] = {
        "case": f"{method} {experts}",
        "load": os.getloadavg()[0],
        "input_GB": size_in / 1e9,
        "output_GB": facts["total"] / 1e9,
        "ours_s": [cost.wall for cost in ours],
        "ours_cpu_s": [cost.cpu for cost in ours],
        "cp_s": theirs,
        f"ratio_to_cp_{copied}": median / statistics.median(theirs),
        "write_GB_per_s": facts["total"] / 1e9 / median,
        "cpu_s_per_output_GB": min(cost.cpu for cost in ours) / (facts["total"] / 1e9),
        "peak_anonymous_MB": max(cost.anonymous for cost in ours) / 1e6,
        "memory_goal_met": max(cost.anonymous for cost in ours) <= MEMORY_GOAL,
        "written_per_output_byte": facts["write_bytes"] / facts["total"],
        "read_from_disk_per_input_byte": facts["read_bytes"] / size_in,
    }
    if missing:
        return {**found, "peer": missing}
    return {
        **found,
        "peer_s": [cost.wall for cost in peers],
        "peer_cpu_s": [cost.cpu for cost in peers],
        "peer_anonymous_GB": max(cost.anonymous for cost in peers) / 1e9,
        "times_faster_than_peer": statistics.median(cost.wall for cost in peers) / median,
        "times_less_cpu_than_peer": min(cost.cpu for cost in peers) / min(cost.cpu for cost in ours),
    }


def scaling(work: Path, source: Path, *, rounds: int) -> dict[str, object]:
    """Wall seconds of the same conversions held to one core and on all, interleaved."""
    found: dict[str, object] = {"case": "cores", "load": os.getloadavg()[0]}
    every = sorted(os.sched_getaffinity(0))
    for method, experts in (("random", 8), ("upcycle", 4)):
        walls: dict[int, list[float]] = {1: [], len(every): []}
        for _ in range(rounds):
            for count, taken in walls.items():
                clear(work / "out")
                taken.append(run(CONVERT, source, work / "out", method, experts, *every[:count]).wall)
        for count, taken in walls.items():
            found[f"{method}_{experts}_on_{count}_s"] = taken
        one, all_of_them = (statistics.median(taken) for taken in walls.values())
        found[f"{method}_{experts}_times_faster_on_{len(every)}"] = one / all_of_them
    clear(work / "out")
    return found


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
    parser.add_argument("--only", choices=("partition", "upcycle", "branch"))
    parser.add_argument("--cores", action="store_true", help="one core against all")
    parser.add_argument("--peer-llama-moe", type=Path, metavar="CHECKOUT")
    parser.add_argument("--peer-mergekit", type=Path, metavar="COMMAND")
    parser.add_argument("--peer-rounds", type=int, default=1, help="rounds in which the peer runs too; it takes long")
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    source = work / "source"
    clear(source)
    show({"case": "machine, GB/s", "cores": os.cpu_count(), "load": os.getloadavg()[0], **machine(work)})
    rounds = {"rounds": given.rounds, "peer_rounds": given.peer_rounds}
    try:
        if given.wide:
            wide(work, source, rounds=given.rounds)
            return
        synthetic(source, Shape(**{**vars(SHAPES["1b"]), "layers": given.layers}))
        if given.cores:
            show(scaling(work, source, rounds=given.rounds))
            return
        split, copies = partial(llama_moe, given.peer_llama_moe), partial(mergekit, given.peer_mergekit)
        if given.only == "branch":
            branched(work, source, Shape(**{**vars(SHAPES["1b"]), "layers": given.layers}), copies, rounds)
            return
        for experts in (8, 16) if given.only != "upcycle" else ():
            show(compare(work, source, "random", experts, copied="input", peer=split, **rounds))
        for experts in (4, 8) if given.only != "partition" else ():
            show(compare(work, source, "upcycle", experts, copied="output", peer=copies, **rounds))
    finally:
        clear(source)


def branched(work: Path, source: Path, shape: Shape, peer: Any, rounds: dict[str, int]) -> None:
    """Three fine-tunes: all but the experts from the base, as the peer has it, and averaged, which the peer cannot."""
    branches = [Path(f"{source}{number}") for number in range(3)]
    try:
        for branch in branches:
            clear(branch)
            synthetic(branch, shape)
        peer = partial(peer, branches=branches)
        show(compare(work, source, "branch base", 3, copied="output", peer=peer, **rounds))
        show(compare(work, source, "branch mean", 3, copied="output", rounds=rounds["rounds"]))
    finally:
        for branch in branches:
            clear(branch)


def wide(work: Path, source: Path, *, rounds: int) -> None:
    """70B widths: plan and layout of all layers on shapes alone, then two layers of bytes."""
    synthetic(source, SHAPES["70b"], shards=30, sparse=True)
    cost = run(PLAN, source)
    seconds, tensors, total = cost.output.split()
    plan = {"case": "70B: plan and layout on shapes", "seconds": float(seconds), "tensors": int(tensors)}
    show({**plan, "output_GB": float(total) / 1e9, "peak_anonymous_MB": cost.anonymous / 1e6})
    clear(source)
    synthetic(source, Shape(**{**vars(SHAPES["70b"]), "layers": 2}))
    show(compare(work, source, "random", 16, copied="input", rounds=rounds))


if __name__ == "__main__":
    main()
