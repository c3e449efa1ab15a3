"""Tokens planted where programs keep them never come out: not in what is printed, not in any file of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import command

SECONDS = 40
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


def run(place: Place) -> Iterator[Outcome]:
    home = place.fresh("home")
    planted = {name: f"planted-{name.lower()}-5e1f" for name in VARIABLES}
    (home / ".netrc").write_text("machine huggingface.co login me password planted-netrc-5e1f\n")
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("planted-file-5e1f")
    config, out = str(place.config), str(place.folder / "run")
    cases: dict[str, str | None] = {}
    for words in (
        ("run", config, "--out", out),
        ("run", config, "--out", out, "--debug", "--json"),
        ("show", out),
        ("doctor",),
        ("doctor", "--json"),
        ("plan", config, "plan.num_experts=5", "--debug", "--out", str(place.folder / "wrong")),
        ("plan", "no/such-model", "--offline", "--out", str(place.folder / "wrong")),
    ):
        log = place.folder / "log"
        done = command(words, log=log, environment={**planted, "HOME": str(home)}, timeout=200)
        cases[f"printed by {' '.join(words[:1] + words[3:])}"] = _found(done.out + done.error)
    for path in sorted(Path(out).rglob("*")):
        if path.is_file():
            cases[f"written to {path.relative_to(out)}"] = _found(path.read_bytes().decode(errors="replace"))
    yield Outcome.of("planted tokens: in nothing that is printed or written", cases, goal=len(cases))


def _found(text: str) -> str | None:
    at = text.find("planted-")
    return None if at < 0 else f"...{text[max(at - 60, 0) : at + 40]}..."
