"""A signal becomes a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from prismoe.errors import InterruptedRun

__all__ = ["StopRequest", "stop_on_signal"]


@dataclass
class StopRequest:
    """Set by a signal; the loop looks at it between steps and between windows of evaluation."""

    signal_name: str = ""

    def after(self, what: str, *, where: str) -> None:
        """Answer a request that came too late for the loop.

        Raises:
            InterruptedRun: there was one.
        """
        if self.signal_name:
            raise InterruptedRun(
                f"stopped by {self.signal_name} after {what}", where=where, hint="the same command continues"
            )


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM become a request while the context is open; a second one acts as it did before."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can have handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
