"""`--offline` where there is no network: a network namespace of its own, with nothing in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.place import Place

SECONDS = 45
ROOT = Path(__file__).resolve().parents[3]
EMPTY = ("unshare", "--map-root-user", "--net")
ALONE = "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
SHORT = ("pretrain.steps=4", "pretrain.seq_len=64", "pretrain.batch_size=2", "pretrain.warmup_steps=1")
SMALLER = ("pretrain.eval_every=0", "pretrain.eval_tokens=256", "eval.max_tokens=512", "verify.tokens=32")
IMPORTS = """
import importlib, pkgutil, prismoe
names = [found.name for found in pkgutil.walk_packages(prismoe.__path__, 'prismoe.') if '__main__' not in found.name]
for name in names:
    importlib.import_module(name)
"""


def run(place: Place) -> Iterator[Outcome]:
    short = "" if place.full else ", the demo with 4 training steps"
    cases: dict[str, str | None] = {}
    what = f"`prismoe demo --offline` and the import of every module in an empty network namespace{short}"
    refused = _allowed()
    if refused:
        yield Outcome.of(what, {"unshare --map-root-user --net": f"not run: {refused}"}, goal=3)
        return
    cases["the namespace is empty"] = _empty()
    demo = ["-m", "prismoe", "demo", "--offline", "--json", "--out", str(place.folder / "demo")]
    done = _run([*demo, *(() if place.full else (*SHORT, *SMALLER))])
    stages = [one["stage"] for one in json.loads(done.stdout)["stages"]] if done.returncode == 0 else []
    wrong = None if {"convert", "verify", "pretrain", "eval"} <= set(stages) else f"exit {done.returncode}, {stages}"
    cases["the demo"] = wrong and f"{wrong}: {done.stderr[-300:]}"
    done = _run(["-W", "ignore", "-c", IMPORTS])
    cases["every module"] = f"exit {done.returncode}: {done.stderr[-300:]}" if done.returncode else None
    yield Outcome.of(what, cases, goal=3)


def _run(words: list[str], *, alone: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*(EMPTY if alone else ()), sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)


def _allowed() -> str:
    try:
        done = subprocess.run([*EMPTY, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no `unshare` here"
    return done.stderr.strip() or (f"exit {done.returncode}" if done.returncode else "")


def _empty() -> str | None:
    """A listener of this machine is reached from here, and not from in there: not even by the loopback device."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = ["-c", ALONE.format(port=server.getsockname()[1])]
        if _run(connect, alone=False).returncode:
            return "the listener is not reached from outside either"
        done = _run(connect)
    return None if done.returncode and "OSError" in done.stderr else f"reached: exit {done.returncode}"
