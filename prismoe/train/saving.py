"""Checkpoints beside training: the step loop waits for a copy of the state, and a thread writes that.

Nothing of what makes a checkpoint whole depends on when it is written: its manifest comes last, the ones before it are
removed after that, and there is one save at a time. So a process that is killed meanwhile goes on from the one before.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import torch

from prismoe.errors import ResourceError
from prismoe.room import available_memory
from prismoe.train import checkpoints
from prismoe.train.engine import Engine
from prismoe.train.engine.layout import launched

__all__ = ["Saver"]

_COPIES = 2.5  # the copy, the bytes that are written from it, and room to train on


class Saver:
    """Writes the checkpoints of a run into `folder` and keeps the `keep` newest. Every process calls every method."""

    def __init__(self, folder: Path, *, keep: int, engine: Engine) -> None:
        self._folder, self._keep, self._engine = folder, keep, engine
        self._beside = engine.beside()
        self._thread: Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the save under way has gone wrong in this process; `wait` raises what it was."""
        return self._error is not None

    def save(self, tensors: dict[str, torch.Tensor], *, step: int, state: dict[str, Any]) -> None:
        """Save `tensors` and `state` as checkpoint `step`, as they are now; see `checkpoints`.

        Returns when they are copied; where memory does not hold the copy, when they are written.

        Raises:
            ResourceError: no room on the disk, or the save before this one failed.
        """
        self.wait()
        self._engine.at("copying what is saved")
        checkpoints.require_room(self._folder, tensors, self._engine)
        room = available_memory()
        bytes_held = sum(_held(tensor).nbytes for tensor in tensors.values())
        if self._engine.any(room is not None and _COPIES * bytes_held * launched()[3] > room):
            self._write(tensors, step, state)
            self.wait()
            return
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        # A daemon: after an error that leaves other processes behind, nobody waits for them twice.
        self._thread = Thread(target=self._write, args=(copies, step, state), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is whole.

        Raises:
            ResourceError: it failed; the checkpoint before it is whole.
        """
        if self._thread is not None:
            self._engine.at("waiting for the checkpoint")
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def give_up(self) -> ResourceError:
        """What to raise where the save failed in another process."""
        try:
            self.wait()
        except ResourceError as error:
            return error
        return ResourceError("another process could not write the checkpoint", where=str(self._folder))

    def _write(self, tensors: dict[str, torch.Tensor], step: int, state: dict[str, Any]) -> None:
        try:
            checkpoints.save(self._folder, step=step, engine=self._beside, tensors=tensors, state=state)
            if self._engine.first:
                checkpoints.prune(self._folder, keep=self._keep)
        except Exception as error:  # noqa: BLE001 - told by `wait`, in the thread that trains
            self._error = error


def _held(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
