"""Writes one shard: made in chunks, hashed in order and written past the page cache at the same time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from prismoe.convert.gather import Gatherer
from prismoe.convert.layout import Shard
from prismoe.folder import FileEntry, fsync_folder
from prismoe.room import unwritten

__all__ = ["BUFFER_BYTES", "Stopped", "write_shard"]

CHUNK = 4 << 20
DEPTH, AHEAD = 8, 4  # chunks in flight, and how many of them are being made while the others are written
BUFFER_BYTES = CHUNK * DEPTH
BLOCK = 4096  # direct writes are whole blocks; the file is cut to its size at the end
O_DIRECT = getattr(os, "O_DIRECT", 0)


class Stopped(Exception):
    """Another shard failed or the user interrupted; not an error of this shard."""


def write_shard(
    shard: Shard,
    folder: Path,
    *,
    gatherer: Gatherer,
    pool: ThreadPoolExecutor,
    stop: Event,
    wrote: Callable[[int], None],
) -> FileEntry:
    """Write `shard` under a temporary name, sync, rename. Returns its size and sha256.

    `pool` runs the making and the writing of chunks, this thread hashes; `wrote` is told the bytes of each chunk.

    Raises:
        InputError: see `Gatherer.fill`.
        ResourceError: the disk is full or fails.
        Stopped: `stop` was set.
    """
    partial = folder / f".{shard.name}.{os.getpid()}.partial"
    try:
        handle = _open(partial)
        try:
            _reserve(handle, shard.nbytes)
            digest = _stream(shard, handle, gatherer, pool, stop, wrote)
            os.ftruncate(handle, shard.nbytes)
            os.fsync(handle)
        finally:
            os.close(handle)
        partial.rename(folder / shard.name)
        fsync_folder(folder)
    except OSError as error:
        raise unwritten(folder / shard.name, error, size=shard.nbytes) from error
    finally:
        with suppress(OSError):  # of a disk that became read-only; `claim` clears it away another time
            partial.unlink(missing_ok=True)
    return {"sha256": digest, "bytes": shard.nbytes}


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without direct writes answers
            raise
        return os.open(path, flags, 0o644)


def _reserve(handle: int, size: int) -> None:
    """Claim the disk space at once: it fails early, lies together, and chunks may then be written in any order."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _stream(
    shard: Shard, handle: int, gatherer: Gatherer, pool: ThreadPoolExecutor, stop: Event, wrote: Callable[[int], None]
) -> str:
    digest = hashlib.sha256()
    count = -(-shard.nbytes // CHUNK)
    # Page-aligned memory, as direct writes need; freed when the last view of it is gone.
    view = memoryview(mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    buffers = [view[slot * CHUNK : (slot + 1) * CHUNK] for slot in range(DEPTH)]
    made: list[Future[int] | None] = [None] * DEPTH
    written: list[Future[int] | None] = [None] * DEPTH
    try:
        for number in range(count + AHEAD):
            slot = number % DEPTH
            if number < count:
                if (last := written[slot]) is not None:
                    wrote(last.result())
                made[slot] = pool.submit(_make, shard, number * CHUNK, buffers[slot], gatherer)
            ready = number - AHEAD
            if ready < 0:
                continue
            if stop.is_set():
                raise Stopped
            slot = ready % DEPTH
            future = made[slot]
            assert future is not None
            size = future.result()
            written[slot] = pool.submit(_write, handle, buffers[slot], ready * CHUNK, size)
            digest.update(buffers[slot][:size])
            made[slot] = None
        for last in written:
            if last is not None:
                wrote(last.result())
    finally:
        # Whatever ended the loop: the caller closes the file, so nobody may still write to it.
        for future in (*made, *written):
            if future is not None and not future.cancel():
                future.exception()
    return digest.hexdigest()


def _make(shard: Shard, start: int, buffer: memoryview, gatherer: Gatherer) -> int:
    """Fill `buffer` with the bytes of the file from `start` on; returns how many there are."""
    end = min(start + len(buffer), shard.nbytes)
    head = len(shard.header)
    if start < head:
        part = shard.header[start:end]
        buffer[: len(part)] = part
    position = max(start, head)
    number = bisect_right(shard.pieces, position, key=lambda piece: piece.start) - 1
    while position < end:
        piece = shard.pieces[number]
        stop = min(end, piece.start + piece.nbytes)
        gatherer.fill(piece, position - piece.start, stop - piece.start, buffer[position - start : stop - start])
        position = stop
        number += 1
    return end - start


def _write(handle: int, buffer: memoryview, start: int, size: int) -> int:
    """Write `size` bytes, rounded up to whole blocks with zeros."""
    whole = -(-size // BLOCK) * BLOCK
    buffer[size:whole] = bytes(whole - size)
    done = 0
    while done < whole:
        try:
            done += os.pwrite(handle, buffer[done:whole], start + done)
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & O_DIRECT:
                raise
            # Some file systems accept the flag and refuse the write.
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~O_DIRECT)
    return size
