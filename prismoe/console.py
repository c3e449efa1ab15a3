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
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from prismoe.progress import Progress, quiet

__all__ = ["Screen", "bytes_text", "count_text", "seconds_text"]

LOG_WIDTH = 240
READABLE = 16  # columns that text keeps before it goes into a table of its own
LOG_EVERY_S = 10.0  # a log gets a line of progress this often, a terminal ten a second


def count_text(number: float) -> str:
    """12 → "12", 1860 → "1,860", 81600 → "81.6 k", 6738415616 → "6.74 B"."""
    for size, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(number) >= size:
            return f"{number / divisor:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:,.0f}" if abs(number) >= 1000 or float(number).is_integer() else f"{number:.3g}"


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
        # A log has no width: a line is as long as it is.
        self.out = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
        self.err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_WIDTH)

    @property
    def width(self) -> int:
        """Columns that a line of results has."""
        return self.out.width

    def title(self, text: str) -> None:
        """A heading above what follows."""
        if not self.json:
            self._show("")
            self._show(Text(text, style="bold"))

    def line(self, text: str, *, style: str = "") -> None:
        """One line of result; `text` is printed as it is (no markup)."""
        if not self.json:
            self._show(Text(text, style=style))

    def pairs(self, rows: Mapping[str, Any]) -> None:
        """Names and values, the names in one column."""
        if self.json:
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(Text(name), value if isinstance(value, Text) else Text(str(value)))
        self._show(grid)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, justify: str = "") -> None:
        """A table. `justify` has an "l" or "r" for each column; without it all but the first are flush right.

        A head of "group\\nname" shows its group once above the columns that share it. Columns for which the terminal
        has no room follow below in a table of their own, the first column again before them.
        """
        if self.json:
            return
        sides = justify or "l" + "r" * (len(columns) - 1)
        cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
        widths = [
            max(Text(line).cell_len for line in [*head.split("\n"), *(row[index].plain for row in cells)])
            for index, head in enumerate(columns)
        ]
        # Names and numbers are never folded; text is, where the terminal is too narrow.
        whole = [(side == "r" or index == 0) and widths[index] <= self.width for index, side in enumerate(sides)]
        needed = [width if kept else min(width, READABLE) for width, kept in zip(widths, whole, strict=True)]
        for number, part in enumerate(_parts(needed, self.width)):
            if number:
                self._show("")
            table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_header=any(columns))
            for index, head in zip(part, _grouped([columns[index] for index in part]), strict=True):
                table.add_column(
                    Text(head),
                    justify="left" if sides[index] == "l" else "right",
                    no_wrap=whole[index],
                    overflow="fold",
                )
            for row in cells:
                table.add_row(*(row[index] for index in part))
            self._show(table)

    def stage(self, name: str, state: str, text: str, seconds: float) -> None:
        """One finished stage of a longer way."""
        if self.json:
            return
        mark = {"made": ("✓", "green"), "kept": ("=", "dim"), "checked": ("·", "cyan")}[state]
        took = " (finished before)" if state == "kept" else f"  {seconds_text(seconds)}"
        self._show(Text.assemble(mark, " ", (f"{name:<8} ", "bold"), text, (took, "dim")))

    def _show(self, thing: Any) -> None:
        """Print to stdout; a log gets no trailing spaces and no folding."""
        if self.out.is_terminal:
            self.out.print(thing)
            return
        with self.out.capture() as captured:
            self.out.print(thing)
        lines = (line.rstrip() for line in captured.get().splitlines())
        self.out.file.write("".join(f"{line}\n" for line in lines))

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
            # Both on one terminal: one console, so that results appear above the bars.
            with _bars(self.out if self.out.is_terminal else self.err) as report:
                yield report
        else:
            yield _Log(self.err)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns of each table: as many as `room` holds with two spaces between, the first column in all of them."""
    parts = [[0]]
    for index in range(1, len(widths)):
        part = parts[-1]
        if len(part) > 1 and sum(widths[other] for other in part) + 2 * len(part) + widths[index] > room:
            parts.append(part := [0])
        part.append(index)
    return parts


def _grouped(heads: Sequence[str]) -> list[str]:
    """Heads without the groups that the head before them has named."""
    groups = ["", *(head.partition("\n")[0] if "\n" in head else "" for head in heads)]
    return [
        head.removeprefix(group) if group and group == before else head
        for before, group, head in zip(groups[:-1], groups[1:], heads, strict=True)
    ]


@dataclass
class _Meter:
    """Rate and time left of one piece of work, counted from where it was first seen: a resumed run is not fast."""

    began: float
    first: int
    told: float
    last: int

    @classmethod
    def of(cls, meters: dict[str, _Meter], name: str, done: int) -> _Meter:
        """The meter of `name`; a count that falls back is the same work begun again."""
        now = time.monotonic()
        if name not in meters or done < meters[name].last:
            meters[name] = cls(began=now, first=done, told=now, last=done)
        meters[name].last = done
        return meters[name]

    def text(self, name: str, done: int, total: int) -> str:
        """Done of total, rate and time left; work with "bytes" in its name is counted in them."""
        show = bytes_text if "bytes" in name.split() else "{:,}".format
        text = f"{show(done)}/{show(total)}" if total else show(done)
        elapsed, made = time.monotonic() - self.began, done - self.first
        if made and elapsed > 0.5:
            rate = made / elapsed
            per_second = show(rate) if show is bytes_text else count_text(rate) if rate >= 10 else f"{rate:.2g}"
            text += f" · {per_second}/s"
            if done < total:
                text += f" · {seconds_text((total - done) / rate)} left"
        return text


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24, style="bright_black"),
        TextColumn("{task.fields[measure]}", style="cyan", markup=False),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Bars(*columns, console=console, transient=True, redirect_stdout=False) as bars:
        tasks: dict[str, TaskID] = {}
        meters: dict[str, _Meter] = {}

        def report(what: str, done: int, total: int) -> None:
            name, _, detail = what.partition(": ")
            if name not in tasks:
                for finished in [
                    other for other, task in tasks.items() if bars.tasks[bars.task_ids.index(task)].finished
                ]:
                    bars.remove_task(tasks.pop(finished))  # what is done makes room
                tasks[name] = bars.add_task(name, total=total or None, detail="", measure="")
            measure = _Meter.of(meters, name, done).text(name, done, total)
            bars.update(tasks[name], completed=done, total=total or None, detail=detail, measure=measure)

        yield report


class _Log:
    """Plain progress: a line every ten seconds for work that takes long, and one at its end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.meters: dict[str, _Meter] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        name, _, detail = what.partition(": ")
        meter, now = _Meter.of(self.meters, name, done), time.monotonic()
        finished = done == total and total > 0 and meter.told > meter.began
        if now - meter.told < LOG_EVERY_S and not finished:
            return
        meter.told = now
        line = f"{name}  {meter.text(name, done, total)}" + (f"  {detail}" if detail else "")
        self.console.print(Text(line), soft_wrap=True)
