"""`prismoe demo`: the whole way on a parent model and text that need no network. The verbs are the ordinary ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismoe.console import Screen
from prismoe.demo.text import DOMAINS, write_domains
from prismoe.folder import write_atomic, write_json_atomic
from prismoe.progress import Progress

__all__ = ["PARENT", "demo"]

PARENT = Path(__file__).parent / "parent"
"""A dense LLaMA of 1.7 million parameters, trained by this project (`examples/train_parent.py`)."""

PROMPTS = ("def read(self, size", "Return a new ", "The import statement")
_CONFIG = """\
# Written by `prismoe demo`; `prismoe run {here}` does the same.
source: {parent}
out: {out}
seed: 0

plan:
  method: random # LLaMA-MoE's Independent-Random: each neuron goes to one expert, drawn at random
  num_experts: 8
  top_k: 2

convert:
  target: mixtral

data:
  domains:
{domains}
  weights: {{code: 0.65, docstrings: 0.25, reference: 0.10}}

pretrain:
  steps: 300
  seq_len: 256
  batch_size: 16
  lr: 1e-3
  warmup_steps: 30
  eval_every: 100
  eval_tokens: 16384

eval:
  max_tokens: 50000
"""


def demo(
    screen: Screen, *, out: str | Path, overrides: Sequence[str] = (), dry_run: bool = False, force: bool = False
) -> dict[str, Any]:
    """Cut the embedded parent into 8 experts, prove it, train it back, measure it; the receipt of `run` and samples.

    Raises:
        InputError: the running Python carries no library source.
        PrismoeError: whatever a stage raises.
    """
    from prismoe import views
    from prismoe.config import load_config
    from prismoe.run import Done, run

    out = Path(out)
    screen.title("prismoe demo: a dense model becomes a mixture of 8 experts, 2 of them active per token")
    screen.line("The parent: a 1.7 M parameter LLaMA that this project trained on the text every CPython carries.")
    screen.line("")
    out.mkdir(parents=True, exist_ok=True)
    config = load_config(_write_config(out), overrides=overrides)

    def show(done: Done) -> None:
        screen.stage(done.stage, done.state, views.summary(done.stage, done.receipt), done.seconds)

    with screen.progress() as on_progress:
        result = run(config, dry_run=dry_run, force=force, offline=True, on_progress=on_progress, on_stage=show)
        if dry_run:
            return result.to_dict()
        samples = _samples(out, on_progress)
    views.view(screen, "verify", result.of("verify"))
    views.view(screen, "eval", result.of("eval"))
    screen.title("what each writes after a prompt (one seeded draw, temperature 0.7)")
    for prompt in PROMPTS:
        screen.line(f"{prompt}…", style="cyan")
        for _, model, text in (sample for sample in samples if sample[0] == prompt):
            for index, line in enumerate(_few_lines(text)):
                screen.line(f"  {model if index == 0 else '':8} │ {line}", style="dim" if model == "step 0" else "")
    report = (out / "report.html").resolve()
    screen.title("the report")
    screen.line(report.as_uri())
    screen.line(f"The trained mixture is a stock Mixtral folder: {out / 'train' / 'model'}", style="dim")
    return {**result.to_dict(), "samples": samples, "report": str(report)}


def _write_config(out: Path) -> Path:
    """The demo's config beside its text, as a file that a person can read and run again."""
    text = write_domains(out / "text")
    lines = [
        f"    {name}: {{train: {json.dumps(str(text[name][0]))}, heldout: {json.dumps(str(text[name][1]))}}}"
        for name in DOMAINS
    ]
    path = out / "demo.yaml"
    filled = _CONFIG.format(
        here=path, parent=json.dumps(str(PARENT)), out=json.dumps(str(out)), domains="\n".join(lines)
    )
    write_atomic(path, filled.encode())
    return path


def _samples(out: Path, on_progress: Progress) -> list[tuple[str, str, str]]:
    """(prompt, model, continuation), also kept as samples.json."""
    from prismoe.generate import generate

    models = {"dense": PARENT, "step 0": out / "moe", "trained": out / "train" / "model"}
    written: dict[str, list[str]] = {}
    for index, (name, folder) in enumerate(models.items()):
        on_progress("generate", index, len(models))
        written[name] = [sample.text for sample in generate(folder, PROMPTS, max_new_tokens=48, temperature=0.7)]
    rows = [(prompt, name, written[name][index]) for index, prompt in enumerate(PROMPTS) for name in models]
    write_json_atomic(out / "samples.json", [dict(zip(("prompt", "model", "text"), row, strict=True)) for row in rows])
    return rows


def _few_lines(text: str, most: int = 3, width: int = 90) -> list[str]:
    """The first lines with something on them, as they stand."""
    return [line[:width] for line in text.rstrip().splitlines() if line.strip()][:most]
