"""Disk and memory: what is there is known within all limits, and what could not be written is told with numbers."""

import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prismoe.cli import main
from prismoe.errors import InputError, ResourceError
from prismoe.folder import claim
from prismoe.lock import LOCK, check_free, hold, hold_file
from prismoe.room import available_memory, exhausted, group_memory, unwritten
from prismoe.train.metrics import MetricsLog
from prismoe.tune import TuneConfig, tune
from tests.runs import workplace


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes of a file, by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_could_not_be_written_says_what_there_is_and_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    full = unwritten(path, OSError(errno.ENOSPC, "No space left on device"), size=2_500_000)
    assert str(full).startswith(f"{path}: cannot write: No space left on device, ")
    assert "of disk free; needed 2.5 MB (hint: free some space" in str(full)
    quota = unwritten(path, OSError(errno.EDQUOT, "Disk quota exceeded"), size=300)  # the disk has room, but not for us
    assert str(quota).startswith(f"{path}: cannot write: Disk quota exceeded; needed 300 bytes (hint:")
    # As a library below Python and PyTorch's checkpoints pass one on.
    rust = unwritten(path, ValueError("I/O error: No space left on device (os error 28)"))
    torch = unwritten(path, RuntimeError("[Errno 28] No space left on device"))
    assert all("of disk free; needed more" in str(error) and "Errno" not in str(error) for error in (rust, torch))
    other = unwritten(path, OSError(errno.EROFS, "Read-only file system"))
    assert str(other) == f"{path}: cannot write: Read-only file system"


def test_memory_is_what_the_groups_of_this_process_leave(tmp_path: Path) -> None:
    me, stat = tmp_path / "cgroup", "anon 7\ninactive_file {}\ntotal_inactive_file {}\n"
    me.write_text("4:memory:/batch/job\n1:cpu,cpuacct:/elsewhere\n0::/user/inner\n")
    for name, files in {
        "user/inner": {"memory.max": "max", "memory.current": "10"},
        "user": {"memory.max": "1000", "memory.current": "400", "memory.stat": stat.format(50, 0)},
        "memory/batch/job": {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "100"},
        "memory/batch": {"memory.limit_in_bytes": "700", "memory.usage_in_bytes": "100"},
        "elsewhere": {"memory.max": "1", "memory.current": "0", "memory.stat": ""},
    }.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in {"memory.stat": stat.format(0, 30), **files}.items():
            (tmp_path / name / file).write_text(text.rstrip() + "\n")
    assert sorted(group_memory(root=tmp_path, me=me)) == [630, 650, 830]
    assert group_memory(root=tmp_path, me=tmp_path / "none") == []


def test_memory_is_what_a_limit_of_this_process_leaves() -> None:
    if available_memory() is None:
        pytest.skip("not Linux")
    code = "import resource; from prismoe.room import available_memory; size = 3 << 30; "
    code += "resource.setrlimit(resource.RLIMIT_AS, (size, size)); print(available_memory() < size)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "True\n"


def test_out_of_memory_is_known_by_what_libraries_say() -> None:
    for error in (
        MemoryError("Unable to allocate 5.30 GiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes"),
        RuntimeError("unable to mmap 335472 bytes from file <m>: Cannot allocate memory (12)"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        found = exhausted(error)
        assert found is not None
        assert found.exit_code == 4
        assert "out of memory, " in str(found)
        assert str(error) in str(found)
    assert exhausted(RuntimeError("shape mismatch")) is None


def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, position=0)
    with files_of_at_most(64):
        log.write({"step": 1})
        with pytest.raises(ResourceError, match=r"metrics\.jsonl: cannot write: File too large; needed 1\d\d bytes"):
            log.write({"step": "2" * 100})
        log.close()
    with pytest.raises(ResourceError, match="cannot write: No such file"):
        MetricsLog(tmp_path / "gone" / "metrics.jsonl", position=0)


def test_a_run_wants_room_before_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = workplace(tmp_path), tmp_path / "out"
    monkeypatch.setattr("prismoe.room.shutil.disk_usage", lambda path: (10, 10, 0))
    assert main(["plan", str(config), "--out", str(out)]) == 4
    assert not out.exists()
    # A disk behind a network that says nothing of itself.
    monkeypatch.setattr("prismoe.room.shutil.disk_usage", lambda path: (0, 0, 0))
    assert main(["plan", str(config), "--out", str(out)]) == 0


def test_one_process_makes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with hold_file(path):
        other = (
            f"from pathlib import Path; from prismoe.lock import hold_file\nwith hold_file(Path({str(path)!r})): pass"
        )
        found = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        holder = (path.parent / ".answers.jsonl.lock").read_text().strip()
        assert f"{path}: output file is in use by process {holder} (hint:" in found.stderr
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_is_held_is_seen_without_taking_it(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    check_free(lock, where=tmp_path)
    assert not lock.exists()
    lock.touch()  # of a machine that went down
    check_free(lock, where=tmp_path)
    with hold(lock, where=tmp_path), pytest.raises(ResourceError, match="output folder is in use by process"):
        check_free(lock, where=tmp_path)


def test_tune_looks_for_another_process_before_it_reads(tmp_path: Path) -> None:
    config = TuneConfig(data=str(tmp_path / "none.jsonl"))
    with claim(tmp_path / "out", kind="tune", key="1"), pytest.raises(ResourceError, match="in use by process"):
        tune(tmp_path / "no model", config, out=tmp_path / "out")
    with pytest.raises(InputError):
        tune(tmp_path / "no model", config, out=tmp_path / "out")
