"""Writes a folder of shards that were laid out before: many threads, no model in memory, whole or resumable.

Shards are written side by side, each one made in chunks that are hashed and written past the page cache at the same
time. That beats copying inside the kernel (docs/benchmarks.md): the hash needs the bytes in our hands anyway, and pages
that nobody reads again are not cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import branch_key
from prismoe.convert.gather import Gatherer
from prismoe.convert.layout import Shard, index_json
from prismoe.convert.writer import BUFFER_BYTES, write_shard
from prismoe.errors import InterruptedRun
from prismoe.folder import FileEntry, Manifest, claim, hash_files, write_atomic, write_json_atomic
from prismoe.progress import Progress
from prismoe.recipe import sources
from prismoe.room import require_room

__all__ = ["Output", "Written", "check_room", "finished", "job_key", "write_folder", "write_output"]

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MOST_WORKERS = 4  # shards at a time; more only adds memory, the disk is busy by then
BASE_BYTES = 96 << 20  # interpreter, NumPy, indices


@dataclass(frozen=True, eq=False)
class Output:
    """All that is known of a folder before its first byte is written. `files` are whole small files, by name."""

    kind: str
    checkpoint: Checkpoint
    settings: dict[str, Any]
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    files: dict[str, bytes]
    parents: dict[str, str]
    key: str

    @property
    def workers(self) -> int:
        return min(MOST_WORKERS, len(self.shards), os.cpu_count() or 1)

    @property
    def total_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def memory_bytes(self) -> int:
        return BASE_BYTES + self.workers * BUFFER_BYTES

    @property
    def dropped(self) -> tuple[str, ...]:
        """Source tensors that no shard is made of; with branches, those of which it takes none of the checkpoints'."""
        used = {name for shard in self.shards for piece in shard.pieces for name in sources(piece.recipe)}
        keys = range(len(self.checkpoint.donors))
        found = {name for donor in self.checkpoint.donors for name in donor.tensors}
        return tuple(sorted(name for name in found if used.isdisjoint(branch_key(number, name) for number in keys)))


@dataclass(frozen=True)
class Written:
    """`state` is "written" or "already complete"; `kept_shards` were finished by an earlier, stopped run."""

    state: str
    files: dict[str, FileEntry]
    kept_shards: int


def job_key(checkpoint: Checkpoint, described: Any, *parts: bytes, side_files: Mapping[str, bytes]) -> str:
    """sha256 over everything that decides the bytes: the source, JSON-able `described`, and files."""
    digest = hashlib.sha256(json.dumps([checkpoint.fingerprint, *described], sort_keys=True).encode())
    for part in (*parts, *(text for pair in side_files.items() for text in (pair[0].encode(), pair[1]))):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def check_room(output: Output, out: Path) -> int:
    """Compare disk and memory with what the job needs; returns the free bytes of the disk.

    Shards that an earlier, stopped run finished are there already.
    """
    there = sum(shard.nbytes for shard in output.shards if _is_shard(out / shard.name, shard))
    needed = output.total_bytes - there + sum(map(len, output.files.values())) + (1 << 20)
    return require_room(out, disk_bytes=needed, memory_bytes=output.memory_bytes)


def write_folder(output: Output, out: Path, *, force: bool, on_progress: Progress) -> Written:
    """Write everything, the manifest last. The same call after a stop continues and gives the same bytes.

    Raises:
        InputError: the source is damaged, or holds NaN or infinity.
        ResourceError: the disk is full, or the folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    with claim(out, kind=output.kind, key=output.key, force=force):
        if done := finished(out, kind=output.kind, key=output.key):
            return Written("already complete", done, len(output.shards))
        return write_output(output, out, on_progress=on_progress)


def finished(out: Path, *, kind: str, key: str) -> dict[str, FileEntry] | None:
    """The files of a complete folder. A manifest whose files are not all there is taken back and the work goes on."""
    manifest = Manifest.read(out)
    if manifest is None:
        return None
    paths = {out / name: entry["bytes"] for name, entry in manifest.files.items()}
    if manifest.same_work(kind, key) and all(p.is_file() and p.stat().st_size == n for p, n in paths.items()):
        return manifest.files
    manifest.remove(out)
    return None


def write_output(output: Output, out: Path, *, on_progress: Progress) -> Written:
    """`write_folder` inside a folder that the caller has claimed and that is not complete."""
    files, kept = _write_shards(output, out, on_progress)
    files |= _write_the_rest(output, out)
    manifest = Manifest(
        kind=output.kind,
        key=output.key,
        parents=output.parents,
        config=output.settings,
        files=dict(sorted(files.items())),
    )
    manifest.write(out)
    return Written("written", manifest.files, kept)


def _write_shards(output: Output, out: Path, on_progress: Progress) -> tuple[dict[str, FileEntry], int]:
    """Write the shards that are not there yet; returns all entries, and how many were there."""
    kept = [shard for shard in output.shards if _is_shard(out / shard.name, shard)]
    todo = [shard for shard in output.shards if shard not in kept]
    files = hash_files(out, [shard.name for shard in kept])
    done, lock, stop = sum(shard.nbytes for shard in kept), Lock(), Event()

    def wrote(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            on_progress("bytes written", done, output.total_bytes)

    with (
        Gatherer.reading(output.checkpoint) as gatherer,
        ThreadPoolExecutor(3 * output.workers, "chunk") as chunks,
        ThreadPoolExecutor(output.workers, "shard") as workers,
    ):
        futures = {
            workers.submit(write_shard, shard, out, gatherer=gatherer, pool=chunks, stop=stop, wrote=wrote): shard
            for shard in todo
        }
        try:
            for future in as_completed(futures):
                files[futures[future].name] = future.result()
        except BaseException as error:
            stop.set()
            for future in futures:
                future.cancel()
            if isinstance(error, KeyboardInterrupt):
                raise InterruptedRun("stopped", where=str(out), hint="the same command continues") from None
            raise
    return files, len(kept)


def _write_the_rest(output: Output, out: Path) -> dict[str, FileEntry]:
    if len(output.shards) > 1:
        write_json_atomic(out / INDEX, index_json(output.shards))
    for name, data in output.files.items():
        write_atomic(out / name, data)
    write_json_atomic(out / CONFIG, output.config)
    names = [*output.files, CONFIG, *([INDEX] if len(output.shards) > 1 else [])]
    return hash_files(out, names)


def _is_shard(path: Path, shard: Shard) -> bool:
    """Whether `path` is this shard, finished: only whole files ever get the final name."""
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header
