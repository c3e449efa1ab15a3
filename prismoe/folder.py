"""Folders that are never half-written: temporary name, fsync, rename, and a manifest that is written last.

A folder of ours carries `prismoe.json` (kind and key of what is being made) from the first moment and
`manifest.json` from the last: the manifest's presence means complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from prismoe.errors import InputError, ResourceError
from prismoe.lock import LOCK, hold
from prismoe.room import unwritten
from prismoe.strictjson import MAX_BYTES, read_json

__all__ = [
    "FileEntry",
    "Manifest",
    "bytes_there",
    "check_once",
    "claim",
    "fsync_folder",
    "hash_files",
    "make_folder",
    "read_mark",
    "remove_folder",
    "sha256_file",
    "unchecked",
    "versions",
    "write_atomic",
    "write_json_atomic",
    "write_mark",
]

MANIFEST = "manifest.json"
MARKER = "prismoe.json"
_HASH_CHUNK = 1 << 20


class FileEntry(TypedDict):
    """What a manifest says of one file."""

    sha256: str
    bytes: int


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until its folder is synced)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """`folder` with all above it, their names durable: what is synced in a folder without a name is lost with it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        fsync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove `folder` with all in it, durably; nothing happens where there is none."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir():
        fsync_folder(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # of a disk that became read-only; `claim` clears it away another time
            partial.unlink(missing_ok=True)
        raise unwritten(path, error, size=len(data)) from error


def write_json_atomic(path: Path, obj: object) -> None:
    """`write_atomic` of readable JSON with sorted keys: equal objects give equal bytes. NaN is refused."""
    write_atomic(path, _json_bytes(obj))


def _json_bytes(obj: object) -> bytes:
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def sha256_file(path: Path) -> str:
    """Hex sha256 of the bytes of `path`."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of `names` in `folder` (names may contain `/`)."""
    return {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def versions() -> dict[str, str]:
    """Versions that can change a result, read from package metadata so that nothing heavy is imported."""
    found = {"python": platform.python_version()}
    for name in ("prismoe", "numpy", "ml_dtypes", "safetensors", "tokenizers", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an absent package cannot have taken part
    return found


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds and how it came to be. No times: the same command gives the same bytes.

    `parents` maps a role ("source", "plan", …) to a fingerprint, `files` a name in the folder to its size and sha256.
    `key` is the key the folder was claimed with.
    """

    kind: str
    parents: dict[str, str]
    config: dict[str, Any]
    files: dict[str, FileEntry]
    key: str = ""
    versions: dict[str, str] = field(default_factory=versions)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; call it last, after every file of the folder is in place.

        It carries the sha256 of its own other lines: it is a file that can be damaged like the others.
        """
        body = asdict(self)
        write_json_atomic(folder / MANIFEST, {**body, "sha256": hashlib.sha256(_json_bytes(body)).hexdigest()})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a complete folder, None when there is none.

        Raises:
            InputError: `manifest.json` is there but is not one of ours, or not what was written.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            return None
        if _checking:
            read_mark(folder)
        body = read_json(path)
        stated = body.pop("sha256", None)  # one that was written by hand has none
        try:
            found = cls(**body)
        except TypeError as error:
            raise InputError(f"not a readable manifest ({error})"[:200], where=str(path)) from error
        if problem := _misshapen(found):
            raise InputError(f"not a readable manifest ({problem})"[:200], where=str(path))
        if stated is not None:
            written = {**body, "sha256": hashlib.sha256(_json_bytes(body)).hexdigest()}
            if _json_bytes(written) != path.read_bytes():
                raise InputError("was changed after it was written", where=str(path), hint="make the folder again")
        return found

    @classmethod
    def ours(cls, folder: Path) -> Manifest | None:
        """`read`, but None where a stranger's folder has some other `manifest.json`.

        Raises:
            InputError: it is one of ours, and damaged.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        data = path.read_bytes()
        known = sum(f'"{name}"'.encode() in data for name in cls.__dataclass_fields__)
        if known > 2:  # one wrong bit spoils one name
            return cls.read(folder)
        try:
            json.loads(data)
        except (ValueError, RecursionError) as error:  # as the beginning of one is not
            if _checking:
                hint = "the folder was damaged; make it again, or --no-verify"
                raise InputError("neither a manifest nor JSON", where=str(path), hint=hint) from error
        return None

    def check(self, folder: Path) -> None:
        """Compare size and sha256 of every file.

        Raises:
            InputError: a file is missing or is not what was written.
        """
        for name, entry in self.files.items():
            _check_file(Path(folder) / name, entry)

    @staticmethod
    def remove(folder: Path) -> None:
        """Take the promise of completeness back, before anything in the folder is written anew."""
        (Path(folder) / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)

    def same_work(self, kind: str, key: str) -> bool:
        """Whether this is the finished result of the same job."""
        return self.kind == kind and self.key == key


def _misshapen(manifest: Manifest) -> str:
    """What is wrong with the types and names of a manifest that was read, or nothing."""
    for name in ("parents", "versions"):
        table = getattr(manifest, name)
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            return f"{name} is not a map of strings"
    if not isinstance(manifest.kind, str) or not isinstance(manifest.key, str) or not isinstance(manifest.config, dict):
        return "kind, key or config"
    if not isinstance(manifest.files, dict):
        return "files is not a map"
    for name, entry in manifest.files.items():
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            return f"{name!r} has not sha256 and bytes"
        if not isinstance(entry["sha256"], str) or type(entry["bytes"]) is not int:
            return f"{name!r} has not sha256 and bytes"
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            return f"{name!r} is not a name in the folder"
    return ""


def _check_file(path: Path, entry: FileEntry) -> None:
    """Compare one file with its entry, see `Manifest.check`."""
    if not path.is_file():
        raise InputError("listed in the manifest but missing", where=str(path))
    if (size := path.stat().st_size) != entry["bytes"]:
        raise InputError(f"{size} bytes", where=str(path), needed=f"{entry['bytes']} (manifest.json)")
    if (found := sha256_file(path)) != entry["sha256"]:
        raise InputError(
            f"sha256 {found[:12]}… differs from the manifest's {entry['sha256'][:12]}…",
            where=str(path),
            hint="the file was changed after it was written; make the folder again, or --no-verify",
        )


_checking = True
_intact: set[tuple[str, int, int, int, str]] = set()


@contextmanager
def unchecked() -> Iterator[None]:
    """Within it, finished folders are read without hashing their files (`--no-verify`)."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


def check_once(folder: Path, names: Iterable[str] | None = None, *, manifest: Manifest | None = None) -> None:
    """Hash files of a finished folder of ours before they are read; a folder without a manifest passes.

    Each file once in a process, as long as nobody writes it again, and by one process of a machine. `names` that the
    manifest does not list pass as well; None: all that it lists.

    Raises:
        InputError: a file is missing or is not what was written; names it.
    """
    if not _checking or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    manifest = Manifest.ours(folder) if manifest is None else manifest
    if manifest is None:
        return
    for name in manifest.files if names is None else names:
        if (entry := manifest.files.get(name)) is None:
            continue
        path = Path(folder) / name
        facts = path.stat() if path.is_file() else None
        state = facts and (str(path), facts.st_ino, facts.st_mtime_ns, facts.st_size, entry["sha256"])
        if state is None or state not in _intact:
            _check_file(path, entry)
        if state is not None:
            _intact.add(state)


def read_mark(folder: Path) -> tuple[str, str] | None:
    """The kind and key that `folder` was claimed with, None where nobody did.

    Raises:
        InputError: the mark is there, and is not what was written.
    """
    path = Path(folder) / MARKER
    if not path.is_file():
        return None
    body = read_json(path)
    kind, key = body.get("kind", 0), body.get("key", 0)
    bare = {"kind": kind, "key": key}  # as it was written before it had a seal
    whole = isinstance(kind, str) and isinstance(key, str)
    if not whole or path.read_bytes() not in (_json_bytes(bare), _json_bytes(_mark(kind, key))):
        raise InputError("was changed after it was written", where=str(path), hint="make the folder again")
    return kind, key


def bytes_there(out: Path, *, kind: str, key: str, force: bool = False) -> int | None:
    """What a job need not find room for: bytes in `out` of its stopped call, or those that `force` clears away.

    None where it is finished, and needs nothing. A file counts by what it takes on the disk: scratch files have holes.

    Raises:
        InputError: mark or manifest are there, and are not what was written.
    """
    mark = read_mark(out)
    if mark is None or (mark != (kind, key) and not force):
        return 0
    if not force and (manifest := Manifest.read(out)) is not None and manifest.same_work(kind, key):
        return None
    found = 0
    for folder, _, names in os.walk(out):
        for name in names:
            with suppress(OSError):  # another process may be at work there: `claim` will tell
                facts = Path(folder, name).lstat()
                found += min(facts.st_size, 512 * facts.st_blocks)
    return found


def write_mark(folder: Path, kind: str, key: str) -> None:
    """Say durably what is being made in `folder`."""
    write_json_atomic(folder / MARKER, _mark(kind, key))


def _mark(kind: str, key: str) -> dict[str, str]:
    body = {"kind": kind, "key": key}
    return {**body, "sha256": hashlib.sha256(_json_bytes(body)).hexdigest()}


@contextmanager
def claim(out: Path, *, kind: str, key: str, force: bool = False) -> Iterator[Path]:
    """Hold `out` for one job: `kind` names the verb, `key` is a hash over everything that decides the bytes.

    An empty or new folder becomes ours; a folder of the same kind and key is continued; one of another key or kind
    is refused unless `force`, which empties it first. A folder that is not ours is refused whatever `force` says.
    Left-over partial files of `write_atomic` are removed.

    Raises:
        ResourceError: in use by another process, holds something else, or cannot be written.
    """
    out = Path(out)
    with ExitStack() as held:
        try:
            make_folder(out)
            held.enter_context(hold(out / LOCK, where=out))
        except OSError as error:
            raise unwritten(out, error, what="cannot make the output folder") from error
        _take_over(out, kind=kind, key=key, force=force)
        yield out


def _take_over(out: Path, *, kind: str, key: str, force: bool) -> None:
    for leftover in out.glob(".*.partial"):
        leftover.unlink()
    mark = read_mark(out)
    entries = [path for path in out.iterdir() if path.name != LOCK]
    if mark is None and entries:
        raise ResourceError(
            f"output folder holds something else ({min(path.name for path in entries)})",
            where=str(out),
            hint="choose an empty or new folder with --out",
        )
    if mark is not None and force:
        # The marker goes last, so that an interrupted clean-up still leaves a folder that is known to be ours.
        for path in sorted(entries, key=lambda path: path.name == MARKER):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif mark is not None and mark != (kind, key):
        what = "a different job" if mark[0] == kind else f"the output of '{mark[0]}'"
        raise ResourceError(
            f"output folder holds {what}", where=str(out), hint="--force replaces it, or choose another --out"
        )
    write_mark(out, kind, key)
