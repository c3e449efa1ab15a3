"""Fixtures of the whole suite. Threads are pinned before torch loads: two spinning cores are slower than one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(os.environ.get("PRISMOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and corpora beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip(f"real data not present at {SHARED} (set PRISMOE_SHARED)")
    return SHARED
