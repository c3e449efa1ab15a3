"""The attacks with a name: each is refused by the command that meets it, in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.torture.attacks import Attack, named, pickles, templates
from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import command

SECONDS = 60
MEMORY = 6 << 30  # of address space, of which torch maps most
RESIDENT = 1 << 30  # more than the process that it was forked from


def run(place: Place) -> Iterator[Outcome]:
    place.command("plan", str(place.config), "--out", str(place.folder / "plan"))
    canary = place.folder / "canary"
    positions = pickles(place.folder / "plan" / "plan.safetensors", canary)
    for what, attacks in {
        "named attacks: refused in one line that names the file": named(canary),
        "chat-template bombs: the same, within the limits of their process": templates(),
        "a canary pickle in place of each file: the same, and it never runs": positions,
    }.items():
        yield Outcome.of(what, _met(place, attacks, canary), goal=len(attacks))


def _met(place: Place, attacks: Mapping[str, Attack], canary: Path) -> dict[str, str | None]:
    """What each attack found; those that there is no time for are left out."""
    cases: dict[str, str | None] = {}
    for name, attack in attacks.items():
        if place.late:
            break
        folder = place.fresh("attack", like=place.config.parent)
        config = folder / "run.yaml"
        config.write_text((folder / "config.yaml").read_text().replace(str(place.config.parent), str(folder)))
        words = attack(folder)
        done = command((*words, "--out", str(folder / "out")), log=place.folder / "log", memory=MEMORY, timeout=60)
        lines = [line for line in done.error.splitlines() if line.startswith("prismoe: ")]
        cases[name] = None
        if canary.exists():
            cases[name] = "THE CANARY RAN"
        elif done.code not in (2, 3, 4) or "Traceback" in done.error:
            cases[name] = f"exit {done.code}: {done.last_line[:200]}"
        elif len(lines) != 1 or str(folder) not in lines[0] or not lines[0].isprintable():
            cases[name] = f"names no file: {done.last_line[:200]}"
        elif done.max_bytes > RESIDENT + _resident():
            cases[name] = f"{done.max_bytes >> 20} MiB of memory"
    return cases


def _resident() -> int:
    """Bytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024
