"""Many small cases in a forked process with limits: a traceback, a hang, memory without end or a death is a fault.

One process runs case after case, which costs no start; when one kills it, that one is known and the next begins.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prismoe.errors import PrismoeError

__all__ = ["Case", "attempt", "read"]

Case = Callable[[], str | None]
"""None where the promise held, else what was found."""
SECONDS, PATIENCE = 2.0, 60.0  # of processor time a case may take; of a busy machine before it counts as hanging
MEMORY = 1 << 30


class _TooLong(BaseException):
    pass


def read(work: Callable[[], object], names: Sequence[str], *, most: int = 1000) -> str | None:
    """Run a reader: nothing wrong, or one of our errors, each line of it with one of `names`, is what should come."""
    try:
        work()
    except PrismoeError as error:
        lines = str(error).split("\n")
        if any(not any(name in line for name in names) for line in lines):
            return f"does not name the file: {str(error)[:200]!r}"
        if len(lines) > 50 or any(len(line) > most or not line.isprintable() for line in lines):
            return f"not a line for people: {str(error)[:200]!r}"
    except _TooLong:
        return f"more than {SECONDS} s of processor time"
    except BaseException as error:  # noqa: BLE001  whatever escapes is what is looked for
        trace, frames = error.__traceback__, []
        while trace is not None:
            frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        ours = [frame for frame in frames if frame]
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({' < '.join(reversed(ours[-4:]))})"
    return None


def attempt(cases: Sequence[Case]) -> list[str | None]:
    """What each case found."""
    found: list[str | None] = []
    while len(found) < len(cases):
        found += _batch(cases[len(found) :])
    return found


def _batch(cases: Sequence[Case]) -> list[str | None]:
    """Verdicts up to the end, or to the case that ended the process."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            _child(cases, writer)
            os._exit(0)
        finally:
            os._exit(70)
    os.close(writer)
    data, found = b"", []
    late = False
    while True:
        if not select.select([reader], [], [], PATIENCE)[0]:
            late = True
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(reader, 1 << 16)
        if not part:
            break
        *lines, data = (data + part).split(b"\n")
        found += [json.loads(line) for line in lines]
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if len(found) < len(cases):
        found.append(f"hangs: nothing for {PATIENCE:.0f} s" if late else f"the process ended with {status}")
    return found


def _child(cases: Sequence[Case], writer: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # a panic below Python prints before it raises
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def too_long(number: int, frame: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGPROF, too_long)
    for case in cases:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        begin = time.process_time()
        try:
            verdict = case()
        except BaseException as error:  # noqa: BLE001  see `read`
            verdict = f"{type(error).__name__}: {error}"[:200]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - begin
        if verdict is None and seconds > SECONDS:
            verdict = f"{seconds:.1f} s of processor time"
        os.write(writer, json.dumps(verdict).encode() + b"\n")
