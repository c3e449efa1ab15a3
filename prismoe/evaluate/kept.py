"""Finished pairs of a model and a text or task, one small file each: a stopped evaluation goes on after them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prismoe.folder import write_json_atomic

__all__ = ["Kept"]


class Kept:
    """A folder of results (None: nothing is kept), by everything that decides them."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def find(self, **decides: Any) -> dict[str, Any] | None:
        """What was kept under the same `decides`; a file that is damaged is none."""
        if self.folder is None:
            return None
        try:
            found = json.loads(self._path(decides).read_bytes())
            return dict(found["result"]) if found["decides"] == decides else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, result: dict[str, Any], **decides: Any) -> None:
        """Write `result` (JSON-able)."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path(decides), {"decides": decides, "result": result})

    def _path(self, decides: dict[str, Any]) -> Path:
        assert self.folder is not None
        text = json.dumps(decides, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
