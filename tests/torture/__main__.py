"""`python -m tests.torture [--full] [--minutes N] [--readme] [ROW ...]`: run the rows and print the table.

Fails where one did not hold. With `--minutes`, each row gets its share of them (its `SECONDS`, of all rows' together):
cases that it has no time for are missing in what it tried, and it is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.torture.place import Place

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1")
ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- make torture -->", "<!-- end of torture -->"
SEED = 20261122
MEMORY = Path("/dev/shm")
ROOM = 4 << 30


def scratch() -> str | None:
    """Where the rows work: in memory where there is room, for a disk would only be waited for. (None: as usual.)"""
    return str(MEMORY) if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM else None


def seconds(row: object) -> float:
    """How much of the time a row asks for, on two quiet cores."""
    return float(getattr(row, "SECONDS", 60))


def small_commands(place: Place) -> list[list[str]]:
    """One of each kind that the rows run many times: what they import is imported before."""
    stages = [[verb, str(place.config), "--out", str(place.folder / "run")] for verb in STAGES]
    return [*stages, ["tune", str(place.tuning), "--out", str(place.folder / "tuned")]]


STAGES = ("plan", "convert", "prepare", "pretrain")


def main() -> int:
    names = sorted(path.stem for path in (Path(__file__).parent / "rows").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*names, []], help=", ".join(names))
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--minutes", type=float, default=math.inf, help="how long all rows may take together")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="write the outcomes there as well")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    flags = parser.parse_args()

    from tests.torture.place import Place
    from tests.torture.processes import warm

    found = []
    rows = {name: import_module(f"tests.torture.rows.{name}") for name in flags.rows or names}
    # Time that a row leaves over goes to those after it.
    started = time.monotonic()
    left, deadline = sum(seconds(row) for row in rows.values()), started + 60 * flags.minutes
    with tempfile.TemporaryDirectory(prefix="prismoe-torture-", dir=scratch()) as work:
        ready = Path(work) / "warm"
        ready.mkdir()
        warm(small_commands(Place(ready, full=False, seed=0)), log=ready / "log")
        for name, row in rows.items():
            begin = time.monotonic()
            share = begin + (deadline - begin) * seconds(row) / left
            left -= seconds(row)
            folder = Path(work) / name
            folder.mkdir()
            for outcome in row.run(Place(folder, full=flags.full, seed=flags.seed, deadline=share)):
                found.append({"row": name, **outcome.to_dict()})
                mark = "held" if outcome.met else "NOT MET"
                print(f"{mark:<8} {outcome.held:>6} of {outcome.tried:<6} {outcome.what}", flush=True)
                for fault in outcome.faults:
                    print(f"         {fault}", flush=True)
            print(f"         ({name}: {time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1) + "\n")
    if flags.readme:
        readme = ROOT / "README.md"
        head, rest = readme.read_text().split(BEGIN, 1)
        readme.write_text(
            f"{head}{BEGIN}\n{table(found, minutes=(time.monotonic() - started) / 60)}{END}{rest.split(END, 1)[1]}"
        )
    return 0 if all(row["met"] for row in found) else 1


def table(found: list[dict[str, Any]], *, minutes: float) -> str:
    """The outcomes as Markdown; what was done to several verbs in the same way is one line."""
    same: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        same.setdefault((row["row"], re.sub(r"^`\w+`: ", "", row["what"])), []).append(row)
    lines = ["| what is promised | held | of | goal | `python -m tests.torture` |", "|---|---|---|---|---|"]
    for (name, what), rows in same.items():
        verbs = ", ".join(match[0] for row in rows if (match := re.match(r"`\w+`", row["what"])))
        held, tried, goal = (sum(row[key] for row in rows) for key in ("held", "tried", "goal"))
        shown = f"{held:,}" if all(row["met"] for row in rows) else f"**{held:,}, not met**"
        notes = [row["note"] for row in rows if row["note"]]
        tails = {re.sub(r"^\d+ ", "", note) for note in notes}
        counts = ", ".join(match[0] for note in notes if (match := re.match(r"\d+", note)))
        note = (
            f" ({f'{counts} ' if counts else ''}{tails.pop()})"
            if len(tails) == 1
            else "".join(f" ({n})" for n in notes)
        )
        said = f"{verbs}: {what}" if verbs else what
        lines.append(f"| {said}{note} | {shown} | {tried:,} | {goal:,} | `{name}` |")
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    lines += ["", f"Measured in {minutes:.0f} minutes on {machine}, torch {version('torch').split('+')[0]}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
