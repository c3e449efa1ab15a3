"""Commands in real processes that start at once: forked from one that has imported everything already."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

NEEDED = (
    *("torch", "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"),
    *("prismoe.cli", "prismoe.run.stages", "prismoe.verify", "prismoe.train.pretrain", "prismoe.data.prepare"),
)

tqdm.monitor_interval = 0  # it would be a thread

__all__ = ["Finished", "Running", "command", "start", "warm"]


def warm(commands: Sequence[Sequence[str]] = (), *, log: Path | None = None) -> None:
    """Import what the commands need, once, in the process that forks. No thread may be running.

    A forked process runs each of `commands` first and says what it imported late: that is imported here too.
    """
    for name in NEEDED:
        import_module(name)
    for words in commands:
        assert log is not None
        found = log.with_suffix(".modules")
        done = command(words, log=log, after=partial(_tell_modules, found))
        assert done.code == 0, f"{' '.join(words)}: {done.code}\n{done.error[-2000:]}"
        for name in found.read_text().split():
            if name not in sys.modules:
                with contextlib.suppress(ImportError):  # a name that another module made up
                    import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


def _tell_modules(path: Path) -> None:
    path.write_text("\n".join(sys.modules))


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit `code` (minus the signal's number when it was killed), what it printed, its cost."""

    code: int
    out: str
    error: str
    seconds: float
    max_bytes: int
    timed_out: bool = False

    @property
    def last_line(self) -> str:
        return self.error.strip().rpartition("\n")[2]


class Running:
    """A command on its way, in a process group of its own."""

    def __init__(self, pid: int, out: Path, error: Path) -> None:
        self.pid, self._out, self._error, self._begin = pid, out, error, time.monotonic()

    def printed(self) -> str:
        """What it has written to standard error so far."""
        return self._error.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> Finished:
        """Its end; after `timeout` seconds it is killed, with everything that it started."""
        late = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self._begin > timeout:
                late = True
                os.killpg(self.pid, signal.SIGKILL)
                _, status, usage = os.wait4(self.pid, 0)
                break
            time.sleep(0.002)
        seconds = time.monotonic() - self._begin
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # workers that outlived it
        return Finished(
            os.waitstatus_to_exitcode(status),
            self._out.read_text(errors="replace"),
            self.printed(),
            seconds,
            usage.ru_maxrss * 1024,
            late,
        )


def start(
    words: Sequence[str],
    *,
    log: Path,
    before: Callable[[], None] | None = None,
    after: Callable[[], object] | None = None,
    memory: int | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """Fork, and run `prismoe WORDS` in the new process. `before` runs there first and `after` last; `memory` limits its
    address space.

    What it prints goes to `log`.out and `log`.err.
    """
    out, error = log.with_suffix(".out"), log.with_suffix(".err")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(pid, out, error)
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        for number, path in ((1, out), (2, error)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment or {})
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if before is not None:
            before()
        from prismoe.cli import main

        code = main(list(words))
        if after is not None:
            after()
    except BaseException:  # noqa: BLE001  whatever it was must not run on in a copy of the torture
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(words: Sequence[str], *, log: Path, timeout: float = 120, **options: object) -> Finished:
    """`start`, then `wait`."""
    return start(words, log=log, **options).wait(timeout)  # type: ignore[arg-type]
