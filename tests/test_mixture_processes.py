"""Several real processes read one mixture in one global order, whatever their number and wherever they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mixture_reader import BATCH, losses, open_mixing, row_hashes
from tests.test_mixture import numbered

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mixture") / "domains"
    for name, size in (("arxiv", 700), ("books", 1203), ("c4", 5000)):
        numbered(base / name, size)
    return base


def start(folder: Path, out: Path, rules: str, world: int, *, steps: int = STEPS) -> subprocess.Popen[bytes]:
    """`world` processes, which are a session of their own."""
    command = [sys.executable, "-m", "tests.mixture_reader", str(folder), str(out), rules, str(world), str(steps)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def global_order(out: Path, world: int) -> dict[int, list[str]]:
    """Rows of every step that all ranks have read, rank after rank; a step read twice must have been the same."""
    rows: dict[int, list[str]] = {}
    for rank in range(world):
        of_rank: dict[int, list[str]] = {}
        for line in (out / f"rank-{rank}-of-{world}").read_text().split("\n")[:-1]:
            step, found = json.loads(line)
            assert of_rank.setdefault(step, found) == found
        for step, found in of_rank.items():
            rows.setdefault(step, []).extend(found)
    return {step: found for step, found in rows.items() if len(found) == BATCH}


def expected(folder: Path, rule: str) -> dict[int, list[str]]:
    mixing = open_mixing(folder, rule)
    found = {}
    for step in range(STEPS):
        mixing.update(step, losses(mixing.mixture.names, step))
        found[step] = row_hashes(mixing, step, rank=0, world=1)
    assert len(mixing.mixture.history) == (1 if rule == "static" else 6)
    return found


def test_one_two_and_four_processes_read_the_same_batches(folder: Path, tmp_path: Path) -> None:
    whole = {rule: expected(folder, rule) for rule in ("static", "sheared")}  # this process is the one
    assert whole["static"] != whole["sheared"]
    for world in (2, 4):
        assert start(folder, tmp_path, "static,sheared", world).wait(60) == 0
        for rule, batches in whole.items():
            assert len({tuple(rows) for rows in batches.values()}) == STEPS
            assert global_order(tmp_path / rule, world) == batches


def test_killed_anywhere_and_gone_on_with_another_number_of_processes(folder: Path, tmp_path: Path) -> None:
    """SIGKILL while the weights have moved already; then 4 processes instead of 2 go on from the state on disk."""
    whole, out = expected(folder, "sheared"), tmp_path / "sheared"
    processes = start(folder, tmp_path, "sheared", 2, steps=10**6)
    logs = [out / f"rank-{rank}-of-2" for rank in range(2)]
    try:
        while not all(log.is_file() and log.read_bytes().count(b"\n") >= 18 for log in logs):
            time.sleep(0.01)
            assert processes.poll() is None
    finally:
        os.killpg(processes.pid, signal.SIGKILL)
    assert processes.wait(60) == -signal.SIGKILL
    state = json.loads((out / "state.json").read_bytes())
    if state["step"] > STEPS:  # a slow machine: go back to a state that the short run knows
        state = {"step": 15, "history": [entry for entry in state["history"] if entry["step"] <= 15]}
    (out / "resume.json").write_text(json.dumps(state))
    assert len(state["history"]) > 2
    before = {step: rows for step, rows in global_order(out, 2).items() if step < STEPS}
    assert start(folder, tmp_path, "sheared", 4).wait(60) == 0
    after = global_order(out, 4)
    assert before == {step: whole[step] for step in before}
    assert after == {step: whole[step] for step in range(state["step"], STEPS)}
