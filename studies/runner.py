"""Every run of the study that is not done yet, several at a time; then results as small files, and docs/study.md.

python -m studies.runner --dry-run                    # what it will take
python -m studies.runner                              # those that studies/results lacks; stopped, it goes on
python -m studies.runner --repeat                     # all of them, hours
python -m studies.runner --size large --device cuda   # more tokens and seeds, on a GPU
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import prismoe
from prismoe.errors import InputError, InterruptedRun, PrismoeError, UsageError
from prismoe.folder import make_folder, write_atomic
from studies.arms import questions
from studies.design import SIZES, Job, Question, Size, jobs_of
from studies.parent import DOMAINS
from studies.text import prepare_text
from studies.work import Places, calibration_of, measure_parent, run
from studies.write import write

__all__ = ["collect", "forecast", "restore", "study"]

Say = Callable[[str], None]


def study(asked: Sequence[Question], size: Size, places: Places, *, corpora: Path, say: Say = print) -> list[str]:
    """Run what is not done yet. A run that cannot be made does not stop the others; returned is what it said.

    Raises:
        InputError: no parent or no corpora.
        InterruptedRun: stopped; the same call goes on.
    """
    jobs = jobs_of(asked, size, source=check_inputs(places.parent, corpora))
    open_jobs = [job for job in jobs if not _done(job, places)]
    prepare_text(
        {job.spec["text"] for job in open_jobs},
        parent=places.parent,
        corpora=corpora,
        out=places.text,
        documents=size.heldout_documents,
        on_progress=lambda what, done, total: None,
    )
    measure_parent(places, eval_tokens=size.eval_tokens)
    made: set[Path | None] = set()
    for job in open_jobs:
        if (folder := calibration_of(job, places)) not in made:
            made.add(folder)
            calibration_of(job, places, make=True)
    failed, started, spent = [], time.monotonic(), 0.0
    left = sum(job.cost for job in open_jobs)
    for count, (job, result) in enumerate(_results(jobs, places, workers=size.workers), 1):
        if isinstance(result, PrismoeError):
            failed.append(f"{job.names[0]}, seed {job.seed}: {result}")
            say(f"{count}/{len(jobs)}  {failed[-1]}")
        elif result is not None:
            spent += job.cost
            hours = (time.monotonic() - started) * (left - spent) / spent / 3600
            loss = result["diverged"] or f"loss {_last(result):.3f}"
            took = f"{result['seconds']:.0f} s; {hours:.1f} h left"
            say(f"{count}/{len(jobs)}  {job.names[0]}, seed {job.seed}: {loss}, {took}")
    return failed


def check_inputs(parent: Path, corpora: Path) -> str:
    """What identifies parent and text.

    Raises:
        InputError: one of them is not there.
    """
    if not (parent / "config.json").exists() or not any(parent.glob("*.safetensors")):
        hint = "PARENT=FOLDER, or train one: python -m studies.parent"
        raise InputError("no parent", where=str(parent), needed="config.json and weights", hint=hint)
    if missing := [name for name in DOMAINS if not any((corpora / name).glob("train-*"))]:
        raise InputError(
            f"no text of {', '.join(missing)}", where=str(corpora), needed="train-* and heldout* a domain",
            hint="a folder, or a link, shared/corpora; or CORPORA=FOLDER",
        )  # fmt: skip
    files = [path for name in DOMAINS for path in sorted((corpora / name).iterdir())]
    sizes = [(path.parent.name, path.name, path.stat().st_size) for path in files]
    return f"{prismoe.Checkpoint.open(parent).fingerprint} {json.dumps(sizes, separators=(',', ':'))}"


def forecast(
    asked: Sequence[Question], size: Size, places: Places, *, source: str, known: Container[str] = ()
) -> list[str]:
    """Lines of a table: runs, tokens and hours by question, and what is left of them without those `known`, by key."""
    jobs, lines, total = jobs_of(asked, size, source=source), [], 0.0
    left = [job for job in jobs if job.key not in known and not _done(job, places)]
    seen: set[str] = set()
    for question in asked:
        own = [j for j in jobs if j.key not in seen and any(n.startswith(f"{question.name}: ") for n in j.names)]
        seen |= {job.key for job in own}
        seconds = sum(job.cost for job in own) / size.tokens_per_second
        total += seconds
        tokens = sum(job.spec["pretrain"]["steps"] * job.spec["pretrain"]["batch_size"] * 256 for job in own)
        lines.append(f"{question.name:14} {len(own):4} runs {tokens / 1e6:7.1f} M tokens {seconds:8.0f} worker-seconds")
    open_seconds = sum(job.cost for job in left) / size.tokens_per_second
    lines.append(f"{len(jobs)} runs, {total:.0f} worker-seconds, {total / size.workers / 3600:.1f} h on {size.workers} "
                 f"workers; {len(left)} runs left, {open_seconds / size.workers / 3600:.1f} h")  # fmt: skip
    return lines


def collect(asked: Sequence[Question], size: Size, places: Places, *, source: str, out: Path) -> None:
    """Write `out`/QUESTION.json for every question with all of its finished runs, and `out`/parent.json."""
    make_folder(out)
    jobs, seen = jobs_of(asked, size, source=source), set()
    parent = measure_parent(places, eval_tokens=size.eval_tokens)
    write_atomic(out / "parent.json", _compact({"size": size.name, "eval_tokens": size.eval_tokens, **parent}))
    for question in asked:
        keys: dict[str, list[str]] = {setting.name: [] for setting in question.settings}
        lines = []
        for job in jobs:
            own = [name.split(": ", 1)[1] for name in job.names if name.startswith(f"{question.name}: ")]
            for name in own:
                keys[name].append(job.key)
            path = places.run(job) / "result.json"
            if own and job.key not in seen and path.exists():
                seen.add(job.key)
                lines.append(_compact(json.loads(path.read_bytes())).decode())
        settings = _compact(keys).decode()
        text = f'{{"question":"{question.name}","settings":{settings},"runs":[\n' + ",\n".join(lines) + "\n]}\n"
        write_atomic(out / f"{question.name}.json", text.encode())


def restore(results: Path, places: Places) -> None:
    """Runs that `collect` wrote, and whose folders are not there (another clone), count as done: a key says it all."""
    for key, result in _written(results).items():
        if not (folder := places.folder / "runs" / key).joinpath("result.json").exists():
            make_folder(folder)
            write_atomic(folder / "result.json", _compact(result))


def _written(results: Path) -> dict[str, dict[str, Any]]:
    files = [json.loads(path.read_bytes()) for path in sorted(results.glob("*.json"))]
    return {result["key"]: result for file in files for result in file.get("runs", ())}


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _results(
    jobs: Sequence[Job], places: Places, *, workers: int
) -> Iterator[tuple[Job, dict[str, Any] | PrismoeError | None]]:
    """Each job and its result as it comes; None for those that were done before."""
    todo = []
    for job in jobs:
        if _done(job, places):
            yield job, None
        else:
            todo.append(job)
    if workers < 2:
        for job in todo:
            yield job, _tried(job, places)
        return
    # Ctrl-C reaches the workers too: what they are to do, save and stop, they are told once, by us.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    spawn = multiprocessing.get_context("spawn")
    with _stopped_by_sigterm(), ProcessPoolExecutor(workers, spawn, signal.signal, ignore) as pool:
        rest, running = iter(todo), dict[Future[Any], Job]()
        try:
            while True:
                # No more than are worked on: what waited in a worker's queue would be begun after a stop.
                for job in islice(rest, workers - len(running)):
                    running[pool.submit(_tried, job, places)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _tried(job: Job, places: Places) -> dict[str, Any] | PrismoeError:
    try:
        return run(job, places)
    except InterruptedRun:
        raise
    except PrismoeError as error:
        return error
    except Exception as error:  # noqa: BLE001 - an arm that breaks as nobody thought must not cost the night's others
        return InputError(f"{type(error).__name__}: {error}", where=job.key, needed="a run that ends")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C here."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _done(job: Job, places: Places) -> bool:
    return (places.run(job) / "result.json").exists()


def _last(result: dict[str, Any]) -> float:
    return statistics.fmean(losses[-1] for losses in result["heldout"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, default=Path("studies/parent"))
    parser.add_argument("--corpora", type=Path, default=Path("shared/corpora"))
    parser.add_argument(
        "--out", type=Path, help="run folders (default: runs/study-SIZE, with --repeat runs/study-SIZE-repeated)"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="questions, with commas: " + ", ".join(q.name for q in questions()))
    parser.add_argument("--repeat", action="store_true", help="all runs again; results and page go beside them")
    parser.add_argument("--dry-run", action="store_true", help="say what it will take, write nothing")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    size = SIZES[args.size]
    folder = args.out or Path(f"runs/study-{size.name}" + "-repeated" * args.repeat)
    places = Places(args.parent, folder, args.device)
    shipped = size.name == "small" and not args.repeat
    results, docs = (Path("studies/results"), Path("docs")) if shipped else (folder / "results", folder)
    try:
        asked = _asked(args.only)
        source = check_inputs(args.parent, args.corpora)
        if args.dry_run:
            print("\n".join(forecast(asked, size, places, source=source, known=_written(results))))
            return 0
        restore(results, places)
        try:
            failed = study(asked, size, places, corpora=args.corpora, say=partial(print, flush=True))
        finally:  # stopped: what there is so far
            if any(places.folder.glob("runs/*/result.json")):
                collect(questions(), size, places, source=source, out=results)
                print(write(results, docs))
        if failed:
            raise InputError(f"{len(failed)} runs could not be made", where="study", needed="all", hint=failed[0])
    except PrismoeError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("study: stopped (hint: the same command continues)", file=sys.stderr)
        return InterruptedRun.exit_code
    return 0


def _asked(only: str | None) -> list[Question]:
    every = questions()
    names = [question.name for question in every] if only is None else only.split(",")
    if unknown := sorted({*names} - {question.name for question in every}):
        raise UsageError(f"unknown question {unknown[0]!r}", where="--only", needed=", ".join(q.name for q in every))
    return [question for question in every if question.name in names]


if __name__ == "__main__":
    sys.exit(main())
