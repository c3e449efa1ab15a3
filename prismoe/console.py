"""What a person sees: bars and colours in a terminal, plain lines in a log, nothing of either in `--json`.

Results go to stdout, everything that moves or complains goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from prismoe.progress import Progress, quiet

__all__ = ["Screen", "bytes_text", "count_text", "seconds_text"]

LOG_EVERY_S = 10.0  # a log gets a line of progress this often, a terminal ten a second


def count_text(number: float) -> str:
    """12 → "12", 6738415616 → "6.74 B"."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(number) >= size:
            return f"{number / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:.3g}"


def bytes_text(number: float) -> str:
    """Decimal units, as disks and `model.safetensors.index.json` count: 5000000000 → "5.0 GB"."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def seconds_text(seconds: float) -> str:
    """0.5 → "0.5 s", 75 → "1:15", 3700 → "1:01:40"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Screen:
    """Where a command writes. `json=True`: stdout carries exactly one JSON object and stderr only errors."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self.out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())

    def title(self, text: str) -> None:
        """A heading above what follows."""
        if not self.json:
            self.out.print()
            self.out.print(text, style="bold")

    def line(self, text: str, *, style: str = "") -> None:
        """One line of result; `text` is printed as it is (no markup)."""
        if not self.json:
            self.out.print(Text(text, style=style))

    def pairs(self, rows: Mapping[str, Any]) -> None:
        """Names and values, the names in one column."""
        if self.json:
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(Text(name), value if isinstance(value, Text) else Text(str(value)))
        self.out.print(grid)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
        """A table; a column whose cells all begin like numbers is set flush right."""
        if self.json:
            return
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for index, column in enumerate(columns):
            cells = [str(row[index]) for row in rows]
            number = bool(cells) and all(cell[:1] in "0123456789-+–" for cell in cells if cell)
            table.add_column(Text(column), justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        self.out.print(table)

    def note(self, text: str) -> None:
        """A remark about the work, not a result: stderr, and not in `--json`."""
        if not self.json:
            self.err.print(Text(text, style="dim"))

    def warning(self, text: str) -> None:
        """Something a person must not miss; shown in `--json` too (on stderr)."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), text))

    def error(self, text: str) -> None:
        """An error, one line for each problem."""
        for line in text.splitlines() or [""]:
            self.err.print(Text.assemble(("prismoe: ", "bold red"), line), soft_wrap=True)

    def result(self, obj: Mapping[str, Any]) -> None:
        """The one JSON object of `--json`."""
        if self.json:
            sys.stdout.write(json.dumps(obj, ensure_ascii=False, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A `Progress` function: bars in a terminal, a line now and then in a log."""
        if self.json:
            yield quiet
        elif self.err.is_terminal and os.environ.get("TERM") != "dumb":
            with _bars(self.err) as report:
                yield report
        else:
            yield _Log(self.err)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24, style="bright_black"),
        _Rate(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Bars(*columns, console=console, transient=True, expand=False) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            name, _, detail = what.partition(": ")
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total or None, detail=detail)
            bars.update(tasks[name], completed=done, total=total or None, detail=detail)

        yield report


class _Rate(ProgressColumn):
    """Done of total, rate and time left."""

    def render(self, task: Task) -> Text:
        return Text(_measure(int(task.completed), int(task.total or 0), task.elapsed or 0.0), style="cyan")


def _measure(done: int, total: int, elapsed: float) -> str:
    text = f"{done:,}/{total:,}" if total else f"{done:,}"
    if done and elapsed > 0.5:
        rate = done / elapsed
        text += f" · {count_text(rate) if rate >= 10 else format(rate, '.2g')}/s"
        if done < total:
            text += f" · {seconds_text((total - done) / rate)} left"
    return text


class _Log:
    """Plain progress: a line when work of a new name starts to take long, every ten seconds, and at its end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began: dict[str, float] = {}
        self.told: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        name, _, detail = what.partition(": ")
        now = time.monotonic()
        began = self.began.setdefault(name, now)
        finished = done == total and total > 0
        if now - self.told.get(name, began) < LOG_EVERY_S and not (finished and name in self.told):
            return
        self.told[name] = now
        line = f"{name}  {_measure(done, total, now - began)}" + (f"  {detail}" if detail else "")
        self.console.print(Text(line), soft_wrap=True)
