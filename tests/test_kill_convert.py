"""kill -9 at every kind of step of a conversion: the same call finishes with the bytes of an unstopped one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prismoe.convert import convert
from prismoe.folder import Manifest
from prismoe.plan import make_plan
from tests.handmade import handmade

POINTS = 24
SHARD_BYTES = 5000

# Runs a conversion in its own process and kills it at the N-th system call that changes the disk: half of a write is
# done, or the step itself is not. With N = 0 it only counts.
DRIVER = """
import os, signal, sys, threading
from pathlib import Path
from prismoe.convert import convert
from prismoe.plan import Plan

dense, plan, out, at, shard_bytes = sys.argv[1:]
at, seen, lock = int(at), [], threading.Lock()

def die_at(name, half=None):
    real = getattr(os, name)
    def step(*args, **named):
        with lock:
            seen.append(name)
            if len(seen) == at:
                if half:
                    half(real, *args)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    setattr(os, name, step)

die_at("pwrite", lambda real, handle, data, start: real(handle, data[: len(data) // 8192 * 4096], start))
for name in ("rename", "fsync", "posix_fallocate", "ftruncate", "unlink", "mkdir"):
    die_at(name)
convert(dense, Plan.load(plan), out=out, max_shard_bytes=int(shard_bytes))
print(len(seen), *sorted(set(seen)))
"""


def run(dense: Path, out: Path, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, str(dense), str(dense.parent / "plan.safetensors"), str(out)]
    return subprocess.run([*command, str(at), str(SHARD_BYTES)], capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A dense folder, a plan beside it, an unstopped result, and the number of steps."""
    base = tmp_path_factory.mktemp("kill")
    dense = handmade(base / "dense", shards=2)
    make_plan(dense, num_experts=4).save(base / "plan.safetensors")
    counted = run(dense, base / "whole", 0)
    assert counted.returncode == 0, counted.stderr
    steps, *kinds = counted.stdout.split()
    assert {"pwrite", "rename", "fsync", "posix_fallocate", "ftruncate"} <= set(kinds)
    assert int(steps) >= 2 * POINTS
    return dense, int(steps)


@pytest.mark.parametrize("point", range(POINTS))
def test_killed_then_continued_gives_the_same_bytes(work: tuple[Path, int], point: int, tmp_path: Path) -> None:
    dense, steps = work
    out, whole = tmp_path / "moe", contents(dense.parent / "whole")
    at = 1 + point * (steps - 1) // (POINTS - 1)
    killed = run(dense, out, at)
    if point < POINTS - 2:  # threads reorder steps, so that the last ones may not be reached
        assert killed.returncode == -9, killed.stderr
    left = {name: data for name, data in contents(out).items() if not name.startswith(".")} if out.exists() else {}
    assert all(whole[name] == data for name, data in left.items()), "a file under its final name is not whole"
    assert ("manifest.json" in left) <= (left.keys() == whole.keys())
    convert(dense, make_plan(dense, num_experts=4), out=out, max_shard_bytes=SHARD_BYTES)
    assert contents(out) == whole
    manifest = Manifest.read(out)
    assert manifest is not None
    manifest.check(out)
