"""The curves of a run for TensorBoard, where it is installed: the numbers of the log and of the clock, by step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prismoe.errors import ResourceError
from prismoe.room import unwritten

__all__ = ["SCALARS", "Scalars"]

SCALARS = "tensorboard"
_CURVES = {"step": "train", "skipped": "skipped", "eval": "eval", "mixing": "mixing", "timing": "timing"}


class Scalars:
    """`tensorboard/`: a view of `metrics.jsonl` and `timing.jsonl` for people. Nothing reads it, no manifest lists it.

    Its files hold clocks and host names, so their bytes are never compared. Without the package nothing is written.
    """

    def __init__(self, folder: Path, *, muted: bool = False) -> None:
        """A `muted` one, that of every process but one, writes nothing."""
        self._folder = folder
        self._writer: Any = None
        self._on = not muted and find_spec("tensorboard") is not None

    def begin(self, step: int | None) -> None:
        """Go on behind `step` (None: from nothing). Points that an earlier command drew further on are taken back."""
        if not self._on:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        self.close()
        _leave_to_us()
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=0 if step is None else step + 1)
        except OSError as error:
            raise self._failed(error) from error

    def add(self, event: str, line: Mapping[str, Any]) -> None:
        """Every number of `line`, those of nested mappings under their names; lists and text are not curves."""
        if self._writer is None or event not in _CURVES:
            return
        try:
            for name, value in _numbers(line, _CURVES[event]):
                self._writer.add_scalar(name, value, line["step"])
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Make what was drawn durable enough that a killed run has all points up to its checkpoint."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                raise self._failed(error) from error

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                raise self._failed(error) from error

    def _failed(self, error: OSError) -> ResourceError:
        self._writer = None
        return unwritten(self._folder, error)


def _leave_to_us() -> None:
    """What fails in TensorBoard's thread is raised here by the next `add`, `flush` or `close`: no traceback of it."""
    before = threading.excepthook
    if before.__module__ == __name__:
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook


def _numbers(found: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{name}/{key}", value
