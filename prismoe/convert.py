"""Dense folder + plan + target → MoE folder, streamed: memory and speed do not depend on the size of the model.

Everything is decided and checked on shapes first; then shards are written side by side, each one made in chunks that
are hashed and written past the page cache at the same time. That beats copying inside the kernel
(docs/benchmarks.md): the hash needs the bytes in our hands anyway, and pages that nobody reads again are not cached.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InterruptedRun
from prismoe.folder import FileEntry, Manifest, claim, hash_files, write_atomic, write_json_atomic
from prismoe.gather import Gatherer
from prismoe.job import PLAN, Job, check_room, is_shard, prepare
from prismoe.layout import index_json
from prismoe.plan import Plan, plan_shape
from prismoe.progress import Progress, quiet
from prismoe.writer import write_shard

__all__ = ["Conversion", "convert"]

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Conversion:
    """Receipt of `convert`. Sizes in bytes, `seconds` of wall time.

    `state` is "written", "already complete" or "dry run"; `kept_shards` were finished by an earlier, stopped run.
    `dropped` are source tensors that the converted model does not need. `free_bytes` is what the disk had before.
    """

    out: str
    target: str
    state: str
    num_experts: int
    top_k: int
    num_tensors: int
    num_shards: int
    kept_shards: int
    dropped: tuple[str, ...]
    total_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    plan_matches_source: bool
    files: dict[str, FileEntry]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def convert(
    source: str | Path | Checkpoint,
    plan: Plan,
    *,
    target: str = "mixtral",
    out: str | Path,
    pad_to: int = 32,
    max_shard_bytes: int = 5_000_000_000,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Conversion:
    """Write the MoE model of `plan` on `source` into the folder `out`, loadable with stock transformers.

    Every tensor keeps the dtype of its source and, unless a factor is folded in, every bit. The same call after a
    stop, even by kill -9, continues and gives the same bytes. `dry_run` stops after all checks and writes nothing.

    Args:
        source: a dense checkpoint, its folder or hub name.
        plan: see `make_plan`.
        target: a file of `prismoe/targets`.
        pad_to: expert widths are rounded up to a multiple of this with zero neurons (lossless).
        max_shard_bytes: data bytes of one output file; a single larger tensor gets its own.
        force: start over in an output folder of ours that holds another job.

    Raises:
        UsageError: the target cannot hold this plan on this model exactly.
        InputError: the checkpoint is damaged, holds NaN or infinity, or is not the plan's.
        ResourceError: not enough disk or memory, or the output folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    started, out = time.monotonic(), Path(out)
    job = prepare(Checkpoint.open(source, offline=offline), plan, target, pad_to, max_shard_bytes)
    free = check_room(job, out)
    if dry_run:
        return _receipt(job, out, "dry run", {}, free=free, kept=0, started=started)
    with claim(out, kind="convert", key=job.key, force=force):
        if done := _finished(job, out):
            return _receipt(job, out, "already complete", done, free=free, kept=len(job.shards), started=started)
        files, kept = _write_shards(job, out, on_progress)
        files |= _write_the_rest(job, out)
        manifest = Manifest(
            kind="convert",
            key=job.key,
            parents={"source": job.checkpoint.fingerprint, "plan": hashlib.sha256(job.plan_bytes).hexdigest()},
            config=job.settings,
            files=dict(sorted(files.items())),
        )
        manifest.write(out)
    return _receipt(job, out, "written", manifest.files, free=free, kept=kept, started=started)


def _finished(job: Job, out: Path) -> dict[str, FileEntry] | None:
    """The files of a complete folder. A manifest whose files are not all there is taken back and the work goes on."""
    manifest = Manifest.read(out)
    if manifest is None:
        return None
    paths = {out / name: entry["bytes"] for name, entry in manifest.files.items()}
    if manifest.same_work("convert", job.key) and all(p.is_file() and p.stat().st_size == n for p, n in paths.items()):
        return manifest.files
    manifest.remove(out)
    return None


def _write_shards(job: Job, out: Path, on_progress: Progress) -> tuple[dict[str, FileEntry], int]:
    """Write the shards that are not there yet; returns all entries, and how many were there."""
    kept = [shard for shard in job.shards if is_shard(out / shard.name, shard)]
    todo = [shard for shard in job.shards if shard not in kept]
    files = hash_files(out, [shard.name for shard in kept])
    done, lock, stop = sum(shard.nbytes for shard in kept), Lock(), Event()

    def wrote(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            on_progress("bytes written", done, job.total_bytes)

    with (
        Gatherer.reading(job.checkpoint) as gatherer,
        ThreadPoolExecutor(3 * job.workers, "chunk") as chunks,
        ThreadPoolExecutor(job.workers, "shard") as workers,
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


def _write_the_rest(job: Job, out: Path) -> dict[str, FileEntry]:
    if len(job.shards) > 1:
        write_json_atomic(out / INDEX, index_json(job.shards))
    for name, data in job.side_files.items():
        write_atomic(out / name, data)
    write_atomic(out / PLAN, job.plan_bytes)
    write_json_atomic(out / CONFIG, job.config)
    names = [*job.side_files, PLAN, CONFIG, *([INDEX] if len(job.shards) > 1 else [])]
    return hash_files(out, names)


def _receipt(
    job: Job, out: Path, state: str, files: dict[str, FileEntry], *, free: int, kept: int, started: float
) -> Conversion:
    return Conversion(
        out=str(out),
        target=job.settings["target"],
        state=state,
        num_experts=plan_shape(job.plan).num_experts,
        top_k=job.plan.top_k,
        num_tensors=sum(len(shard.keys) for shard in job.shards),
        num_shards=len(job.shards),
        kept_shards=kept,
        dropped=job.dropped,
        total_bytes=job.total_bytes,
        free_bytes=free,
        memory_bytes=job.memory_bytes,
        seconds=round(time.monotonic() - started, 3),
        plan_matches_source=job.plan.origin.source == job.checkpoint.fingerprint,
        files=files,
    )
