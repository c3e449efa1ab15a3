"""Other tools that make the same mixtures, each in an environment of its own. Nothing of theirs is in this repository.

mergekit-moe: `pip install mergekit==0.1.5` in a virtual environment; its command is what `--peer-mergekit` names.
LLaMA-MoE: a checkout of github.com/pjlab-sys4nlp/llama-moe with a virtual environment `venv` beside or in it, holding
its pins (torch 2.0.1, transformers 4.31.0, deepspeed 0.10.0, debugpy, opencv-python-headless, accelerate 0.21.0,
numpy 1.25.0); the checkout is what `--peer-llama-moe` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What it keeps of a model while it converts: float32 of both models and half-precision copies, measured.
LLAMA_MOE_MEMORY = 8.0


@dataclass(frozen=True)
class Cost:
    """One process from start to exit: wall seconds, CPU seconds and peak anonymous bytes (sampled at 50 Hz)."""

    wall: float
    cpu: float
    anonymous: int
    output: str


class Missing(Exception):
    """A peer is not there, or did not do its work: what is printed instead of a figure."""


def watch(command: list[str], *, environment: dict[str, str] | None = None, first_victim: bool = False) -> Cost:
    """Run `command` and measure it. `first_victim`: should memory run out, the kernel ends this process, not another.

    Raises:
        Missing: it cannot be started or fails; with the last line it wrote.
    """
    started = time.perf_counter()
    try:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if first_victim else None,
            env={**os.environ, **(environment or {})},
        ) as child:
            if first_victim:
                Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
            peak, place = 0, Path(f"/proc/{child.pid}/status")
            os.set_blocking(child.stdout.fileno(), False)  # type: ignore[union-attr]
            text = b""
            while True:
                pid, status, used = os.wait4(child.pid, os.WNOHANG)
                text += child.stdout.read() or b""  # type: ignore[union-attr]
                if pid:
                    child.returncode = os.waitstatus_to_exitcode(status)
                    break
                lines = [line.split() for line in place.read_text().splitlines()]
                peak = max(peak, sum(int(row[1]) * 1024 for row in lines if row[0] in ("RssAnon:", "RssShmem:")))
                time.sleep(0.02)
            wall = time.perf_counter() - started
    except OSError as error:
        raise Missing(f"{command[0]}: {error.strerror}") from error
    output = text.decode(errors="replace")
    if child.returncode:
        last = output.strip().splitlines()[-1:] or [""]
        raise Missing(f"{Path(command[0]).name} ended with {child.returncode}: {last[0][:200]}")
    return Cost(wall, used.ru_utime + used.ru_stime, peak, output)


def sync(folder: Path) -> float:
    """Wall seconds until every file of `folder` is on the disk: part of any conversion that is to survive."""
    started = time.perf_counter()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def mergekit(
    command: Path | None, source: Path, out: Path, *, experts: int, work: Path, branches: Sequence[Path] = ()
) -> Cost:
    """mergekit-moe with drawn router rows, as its defaults have it: `experts` times the same model, or `branches`.

    Raises:
        Missing: no such command, or it failed.
    """
    if command is None:
        raise Missing("peer missing")
    base = _with_tokenizer(source, work)
    models = [_with_tokenizer(branch, work) for branch in branches] or [base] * experts
    config = work / "mergekit.yml"
    lines = [f"base_model: {base}", "gate_mode: random", "dtype: bfloat16", "experts:"]
    config.write_text("\n".join([*lines, *(f"  - source_model: {model}" for model in models)]) + "\n")
    asked = "--i-understand-this-is-not-useful-without-training"
    cost = watch([str(command), str(config), str(out), asked], environment={"HF_HUB_OFFLINE": "1"}, first_victim=True)
    return Cost(cost.wall + sync(out), cost.cpu, cost.anonymous, cost.output)


def _with_tokenizer(source: Path, work: Path) -> Path:
    """A folder of links to `source` with the tokenizer that mergekit-moe wants, whatever it says."""
    twin = work / f"mergekit-{source.name}"
    twin.mkdir(exist_ok=True)
    for path in source.iterdir():
        if not (twin / path.name).exists():
            (twin / path.name).symlink_to(path.resolve())
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (twin / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (twin / "tokenizer_config.json").write_text(json.dumps(names))
    return twin


LABELS = """
import sys, random, torch
folder, layers, neurons, experts = sys.argv[1], *map(int, sys.argv[2:])
for layer in range(layers):
    labels = [expert for expert in range(experts) for _ in range(neurons // experts)]
    random.Random(layer).shuffle(labels)
    torch.save(labels, f"{folder}/layers.{layer}.mlp.gate_proj.weight")
"""


def llama_moe(checkout: Path | None, source: Path, out: Path, *, experts: int, work: Path) -> Cost:
    """LLaMA-MoE's llama_convert on drawn labels, with drawn router rows. Making the labels is not counted.

    Raises:
        Missing: no such checkout, too little memory for it, or it failed.
    """
    if checkout is None:
        raise Missing("peer missing")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if free < LLAMA_MOE_MEMORY * size:
        raise Missing(f"peer missing: it needs about {LLAMA_MOE_MEMORY * size / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    python = next((p for p in (checkout / "venv/bin/python", checkout.parent / "venv/bin/python") if p.exists()), None)
    if python is None:
        raise Missing(f"peer missing: no venv at {checkout}")
    config, labels = json.loads((source / "config.json").read_text()), work / "labels"
    labels.mkdir(exist_ok=True)
    sizes = [str(config[name]) for name in ("num_hidden_layers", "intermediate_size")]
    watch([str(python), "-c", LABELS, str(labels), *sizes, str(experts)])
    options = {"model_path": source, "split_file_path": labels, "select_file_path": "", "save_path": out}
    options |= {"num_experts": experts, "num_selects": 2, "use_random_gate": True}
    command = [str(python), "-m", "smoe.entrypoint.expert_construction.llama_convert"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    cost = watch(command, environment={"PYTHONPATH": str(checkout)}, first_victim=True)
    return Cost(cost.wall + sync(out), cost.cpu, cost.anonymous, cost.output)
