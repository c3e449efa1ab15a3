"""Cases of a row on all processor cores: forked workers take them in turns, and what they found comes back as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["CORES", "spread"]

CORES = len(os.sched_getaffinity(0))
T = TypeVar("T")


def spread(
    cases: Sequence[T], check: Callable[[T], str | None], *, late: Callable[[], bool] = lambda: False, workers: int = 0
) -> list[tuple[T, str | None]]:
    """(case, what `check` found) in the order of `cases`; those that `late` left no time for are left out.

    `check` runs in worker number `n` of `workers` (0: one a core), a process whose working folder is `worker-n` below
    this one's: what it needs there it makes itself. A `check` that fails is a finding as well.
    """
    workers = min(workers or CORES, len(cases))
    readers = [_worker(number, cases[number::workers], check, late) for number in range(workers)]
    found: dict[int, str | None] = {}
    for number, (pid, reader) in enumerate(readers):
        with os.fdopen(reader, "rb") as pipe:  # the others wait with full pipes meanwhile, if ever
            lines = pipe.read().splitlines()
        _, status = os.waitpid(pid, 0)
        for place, line in enumerate(lines):
            found[number + place * workers] = json.loads(line)
        if status:
            lost = number + len(lines) * workers
            found[lost] = f"the worker ended with {os.waitstatus_to_exitcode(status)}"
    return [(cases[index], found[index]) for index in sorted(found)]


def _worker(
    number: int, cases: Sequence[T], check: Callable[[T], str | None], late: Callable[[], bool]
) -> tuple[int, int]:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        os.makedirs(f"worker-{number}", exist_ok=True)  # noqa: PTH103
        os.chdir(f"worker-{number}")
        for case in cases:
            if late():
                break
            os.write(writer, json.dumps(_found(check, case)).encode() + b"\n")
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _found(check: Callable[[T], str | None], case: T) -> str | None:
    try:
        return check(case)
    except Exception:  # noqa: BLE001  the other cases go on
        return traceback.format_exc().strip().replace("\n", " | ")[-600:]
