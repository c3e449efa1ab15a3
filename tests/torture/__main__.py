"""`python -m tests.torture [--full] [--readme] [ROW ...]`: run the rows and print the table.

Fails where one did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- make torture -->", "<!-- end of torture -->"
SEED = 20261122


def main() -> int:
    names = sorted(path.stem for path in (Path(__file__).parent / "rows").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*names, []], help=", ".join(names))
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="write the outcomes there as well")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    flags = parser.parse_args()

    from tests.torture.place import Place
    from tests.torture.processes import warm

    warm()
    found = []
    with tempfile.TemporaryDirectory(prefix="prismoe-torture-") as work:
        for name in flags.rows or names:
            begin = time.monotonic()
            row = import_module(f"tests.torture.rows.{name}")
            folder = Path(work) / name
            folder.mkdir()
            outcomes = list(row.run(Place(folder, full=flags.full, seed=flags.seed)))
            seconds = time.monotonic() - begin
            for outcome in outcomes:
                found.append({"row": name, **outcome.to_dict()})
                mark = "held" if outcome.met else "NOT MET"
                print(f"{mark:<8} {outcome.held:>6} of {outcome.tried:<6} {outcome.what}", flush=True)
                for fault in outcome.faults:
                    print(f"         {fault}", flush=True)
            print(f"         ({name}: {seconds:.0f} s)", file=sys.stderr, flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1) + "\n")
    if flags.readme:
        readme = ROOT / "README.md"
        head, rest = readme.read_text().split(BEGIN, 1)
        readme.write_text(f"{head}{BEGIN}\n{table(found)}{END}{rest.split(END, 1)[1]}")
    return 0 if all(row["met"] for row in found) else 1


def table(found: list[dict[str, object]]) -> str:
    """The outcomes as Markdown."""
    lines = ["| what is promised | held | of | goal | `python -m tests.torture` |", "|---|---|---|---|---|"]
    for row in found:
        held = f"{row['held']}" if row["met"] else f"**{row['held']}, not met**"
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['what']}{note} | {held} | {row['tried']} | {row['goal']} | `{row['row']}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
