"""The torture harness itself: steps are counted, writes are halved, what was not synced is lost, faults are seen."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from prismoe import folder as folders
from prismoe.folder import Manifest, claim, hash_files, remove_folder
from tests.torture.disk import Counter, Journal, install
from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import warm
from tests.torture.rows import kill
from tests.torture.scarce import fail, fill, free_again, locked, own_disk, remount, without_privileges
from tests.torture.spread import spread

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


SKIPPED = 77


def forked(work: Callable[[], object]) -> int:
    """Do it in a process of its own; how that ended."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watched(disk: Path, work: Callable[[], object], *, at: int = 0, journal: Journal | None = None) -> tuple[int, int]:
    """(how it ended, steps that it took) of work that is watched."""
    counter = Counter()

    def begin() -> None:
        install(disk, counter, at=at, journal=journal)
        work()

    return forked(begin), counter.value


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.mkdir()
    return path


def six_steps(disk: Path) -> None:
    (disk / "inner").mkdir()  # 1
    with (disk / "inner/a").open("wb") as file:
        file.write(b"12345678")
        file.flush()  # 2
        os.fsync(file.fileno())  # 3
    (disk / "inner/a").rename(disk / "b")  # 4
    handle = os.open(disk / "c", os.O_WRONLY | os.O_CREAT)
    os.pwrite(handle, b"abcd", 0)  # 5
    os.close(handle)
    (disk / "c").unlink()  # 6
    (disk.parent / "elsewhere").write_bytes(b"not counted")


def test_a_step_meets_a_full_disk(disk: Path) -> None:
    met: list[tuple[int, str, str]] = []

    def meet(number: int, name: str, path: str) -> None:
        met.append((number, name, Path(path).name))
        if number >= 3 or (name == "create" and number == 2):
            fail(errno.ENOSPC, name, path)

    def work() -> None:
        install(disk, Counter(), meet=meet)
        (disk / "a").mkdir()  # 1
        (disk / "a").rename(disk / "b")  # 2
        with pytest.raises(OSError, match="No space left on device") as caught:
            (disk / "c").open("wb")
        assert caught.value.filename == str(disk / "c")
        with pytest.raises(OSError, match="No space left"):
            (disk / "d").mkdir()  # 3
        (disk / "b").rmdir()  # 4, which needs no room
        assert met == [(1, "mkdir", "a"), (2, "rename", "a"), (2, "create", "c"), (3, "mkdir", "d"), (4, "rmdir", "b")]

    assert forked(work) == 0
    assert list(disk.iterdir()) == []


def test_a_disk_of_its_own_is_full_by_the_kernel(disk: Path) -> None:
    def work() -> None:
        if own_disk(disk, size=1 << 20):
            os._exit(SKIPPED)  # where namespaces are not allowed
        fill(disk, leave=4096)
        with pytest.raises(OSError, match="No space left on device"):
            (disk / "a").write_bytes(bytes(10_000))
        assert (disk / "a").stat().st_size == 4096
        free_again(disk)
        (disk / "a").write_bytes(bytes(10_000))
        remount(disk, read_only=True)
        with pytest.raises(OSError, match="Read-only file system"):
            (disk / "a").unlink()
        remount(disk, read_only=False)
        (disk / "inner").mkdir()
        locked(disk, locked=True)
        without_privileges()
        with pytest.raises(OSError, match="Permission denied"):
            (disk / "inner" / "b").touch()

    assert forked(work) in (0, SKIPPED)
    assert list(disk.iterdir()) == []  # it was that process's own


def test_every_step_below_the_folder_is_counted_and_no_other(disk: Path) -> None:
    assert watched(disk, lambda: six_steps(disk)) == (0, 6)
    assert (disk / "b").read_bytes() == b"12345678"


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (1, {}),
        (2, {"inner/a": b"1234"}),
        (3, {"inner/a": b"12345678"}),
        (4, {"inner/a": b"12345678"}),
        (5, {"b": b"12345678", "c": b"ab"}),
        (6, {"b": b"12345678", "c": b"abcd"}),
    ],
)
def test_a_process_dies_at_its_step_with_half_of_a_write_done(disk: Path, at: int, left: dict[str, bytes]) -> None:
    assert watched(disk, lambda: six_steps(disk), at=at) == (-signal.SIGKILL, at)
    found = {str(path.relative_to(disk)): path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert found == left


def test_what_was_not_synced_is_lost_names_and_bytes(disk: Path, tmp_path: Path) -> None:
    (disk / "old").write_bytes(b"as it was")
    (disk / "gone").write_bytes(b"removed, but nobody synced that")

    def work() -> None:
        with (disk / "old").open("ab") as file:
            file.write(b", and more")
        (disk / "gone").unlink()
        with (disk / "named").open("wb") as file:
            file.write(b"bytes without fsync")
        folders.fsync_folder(disk)
        (disk / "old").rename(disk / "new")
        with (disk / "whole").open("wb") as file:
            file.write(b"bytes with fsync, name without")
            file.flush()
            os.fsync(file.fileno())

    journal = Journal(disk, tmp_path / "journal")
    assert watched(disk, work, journal=journal)[0] == 0
    assert {path.name for path in disk.iterdir()} == {"new", "named", "whole"}
    journal.lose()
    assert {path.name: path.read_bytes() for path in disk.iterdir()} == {"old": b"as it was", "named": b""}


def test_a_finished_folder_keeps_its_name_and_a_removed_one_stays_away(disk: Path, tmp_path: Path) -> None:
    (disk / "checkpoints").mkdir()
    (disk / "checkpoints/state").write_bytes(b"old")

    def work() -> None:
        with claim(disk / "runs/first", kind="test", key="k") as out:
            folders.write_atomic(out / "a", b"data")
            Manifest(kind="test", parents={}, config={}, files=hash_files(out, ["a"])).write(out)
        remove_folder(disk / "checkpoints")

    journal = Journal(disk, tmp_path / "journal")
    assert watched(disk, work, journal=journal)[0] == 0
    journal.lose()
    manifest = Manifest.read(disk / "runs/first")
    assert manifest is not None
    manifest.check(disk / "runs/first")
    assert not (disk / "checkpoints").exists()


def test_cases_come_back_in_order_from_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def check(case: int) -> str | None:
        if case == 4:
            raise ValueError("four")
        if case == 9:
            os._exit(3)
        return None if case % 3 else Path.cwd().name

    found = dict(spread(range(11), check, workers=2))
    assert list(found) == [*range(10), 10]
    assert {case for case, problem in found.items() if problem is None} == {1, 2, 5, 7, 8, 10}
    assert (found[0], found[3], found[6]) == ("worker-0", "worker-1", "worker-0")
    assert "ValueError: four" in str(found[4])
    assert found[9] == "the worker ended with 3"
    assert spread(range(4), check, late=lambda: True) == []


def test_an_outcome_is_met_when_all_held_and_none_is_missing() -> None:
    assert Outcome.of("x", {"a": None, "b": None}, goal=2).met
    assert not Outcome.of("x", {"a": None, "b": "other bytes"}, goal=2).met
    assert not Outcome.of("x", {"a": None}, goal=2).met


def test_a_writer_that_is_not_atomic_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, full=False, seed=1)
    warm([["plan", str(place.config), "--out", str(tmp_path / "warm")]], log=tmp_path / "log")
    assert [outcome.faults for outcome in kill.killed(place, "plan", 4)] == [(), ()]
    monkeypatch.setattr(folders, "write_atomic", lambda path, data: path.write_bytes(data))
    plain, lost = kill.killed(place, "plan", 6)
    assert plain.held < plain.tried
    assert lost.held < lost.tried
