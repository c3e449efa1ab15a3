"""What a run folder says of itself: `run.json` holds the key, the settings and the receipt of every finished stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prismoe.errors import InputError

__all__ = ["CONFIG", "STAGE_NAMES", "STATE", "read_state"]

STATE, CONFIG = "run.json", "run.yaml"
STAGE_NAMES = (
    "sift",
    "prepare",
    "calibrate",
    "plan",
    "convert",
    "verify",
    "recover",
    "pretrain",
    "eval",
    "trace",
    "report",
)
"""Every stage in the order of what builds on what."""


def read_state(out: Path) -> dict[str, Any]:
    """What `run.json` of a run folder says of each stage; empty when there is none.

    Raises:
        InputError: it is there but not ours.
    """
    path = out / STATE
    try:
        state = json.loads(path.read_bytes())
        assert all({"key", "settings", "seconds", "receipt"} <= record.keys() for record in state.values())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError, AttributeError, AssertionError) as error:
        raise InputError(f"not a readable run state ({error!r})", where=str(path), hint="remove it") from error
    return {name: state[name] for name in STAGE_NAMES if name in state}
