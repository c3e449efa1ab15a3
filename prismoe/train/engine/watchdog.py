"""A rank that stands still is named, with its step and phase, and the run is given up instead of waiting for ever."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prismoe.errors import ResourceError

__all__ = ["Watchdog", "behind"]


class Watchdog:
    """Publishes where this process is and looks at the others when it has stood still for `timeout` seconds.

    The main thread may then be inside a collective that never returns, so nothing can be raised there: the process
    says what it saw and ends with the exit code of a ResourceError.
    """

    def __init__(
        self, store: Any, *, rank: int, world: int, timeout: float, give_up: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout
        self._give_up = give_up or _leave
        self._count, self._step, self._phase = 0, 0, "start"
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, step: int, phase: str) -> None:
        """The main thread has come to `phase` of `step`. Costs nothing: the thread tells the others."""
        self._count, self._step, self._phase, self._since = self._count + 1, step, phase, time.monotonic()

    def start(self) -> None:
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=self._timeout)

    def _publish(self) -> None:
        place = {"count": self._count, "step": self._step, "phase": self._phase, "since": time.time()}
        self._store.set(f"prismoe/rank/{self._rank}", json.dumps(place))

    def _watch(self) -> None:
        while not self._stop.wait(self._timeout / 8):
            with suppress(RuntimeError):  # whoever holds the store is gone
                self._publish()
            if time.monotonic() - self._since <= self._timeout:
                continue
            places, stood = self._asked(), time.monotonic() - self._since
            if stood > self._timeout and not self._stop.is_set():
                now = time.time()
                told = behind(places, me=self._rank, stood=stood, now=now) if places else self._no_store(stood)
                self._give_up(str(told))
                return

    def _asked(self) -> dict[int, dict[str, Any]]:
        """Where all are; empty when the store does not say: that of a process which stands still never does."""
        found: dict[int, dict[str, Any]] = {}

        def ask() -> None:
            with suppress(RuntimeError, ValueError):
                found.update(self._places())

        asking = threading.Thread(target=ask, name="watchdog asks", daemon=True)
        asking.start()
        asking.join(self._timeout / 2)
        return dict(found)

    def _no_store(self, stood: float) -> ResourceError:
        return ResourceError(
            f"rank 0, or the launcher, which keep the places of all, do not answer for {stood:.0f} s",
            where=f"step {self._step}",
            hint=f"seen by rank {self._rank}, which waits in '{self._phase}'; the same command continues",
        )

    def _places(self) -> dict[int, dict[str, Any]]:
        ranks = [rank for rank in range(self._world) if self._store.check([f"prismoe/rank/{rank}"])]
        return {rank: json.loads(self._store.get(f"prismoe/rank/{rank}")) for rank in ranks}


def behind(places: dict[int, dict[str, Any]], *, me: int, stood: float, now: float) -> ResourceError:
    """Which ranks hold up the others: those that are silent, else those that have come least far.

    What a silent one said last is up to an eighth of the timeout old; where the one that looks waits is not.
    """
    silent = [rank for rank, place in places.items() if now - place["since"] > stood / 2]
    least = min(place["count"] for place in places.values())
    late = silent or [rank for rank, place in places.items() if place["count"] == least]
    place, mine = places[late[0]], places[me]
    names = ", ".join(map(str, late[:8])) + (" …" if len(late) > 8 else "")
    return ResourceError(
        f"rank {names} has {'said nothing since' if silent else 'not moved from'} phase '{place['phase']}' "
        f"for {stood:.0f} s",
        where=f"step {place['step']}",
        hint=f"seen by rank {me}, which waits in '{mine['phase']}' of step {mine['step']}; "
        "raise pretrain.timeout if it is only slow",
    )


def _leave(line: str) -> None:
    os.write(2, f"error: {line}\n".encode())
    os._exit(ResourceError.exit_code)
