"""One run of the study: plan, convert where a folder is needed, train, measure, and one small result."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import prismoe
from prismoe.config.keys import wanted_statistics
from prismoe.config.settings import PlanConfig
from prismoe.data.shards import Domain, heldout_windows
from prismoe.doctor import cpu_name
from prismoe.errors import NumericalError
from prismoe.folder import make_folder, remove_folder, versions, write_json_atomic
from prismoe.progress import Progress, quiet
from prismoe.train.metrics import read_metrics
from studies.design import SEQ_LEN, Job
from studies.text import domains_of

__all__ = ["Places", "calibration_of", "measure_parent", "run"]

RESULT = "result.json"
WORSE = 1.0  # nats a token over the loss before training: diverged


@dataclass(frozen=True)
class Places:
    """Where things lie, and on what device runs train."""

    parent: Path
    folder: Path
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    def run(self, job: Job) -> Path:
        return self.folder / "runs" / job.key


def run(job: Job, places: Places, *, on_progress: Progress = quiet) -> dict[str, Any]:
    """The result of `job`, made now or before. A run that diverges has a result too, which says so.

    Raises:
        PrismoeError: as the stages; InterruptedRun where the same call goes on.
    """
    folder = places.run(job)
    if (folder / RESULT).exists():
        return dict(json.loads((folder / RESULT).read_bytes()))
    make_folder(folder)
    spec, wall, cpu = job.spec, time.monotonic(), time.process_time()
    domains = domains_of(spec["text"], places.text)
    result: dict[str, Any] = {"key": job.key, "seed": job.seed, "diverged": ""}
    try:
        source, made, tokens_before = _start(job, places, domains, on_progress)
        trained = prismoe.pretrain(
            source,
            _config(job, places),
            domains=domains,
            weights=spec["weights"],
            out=folder / "train",
            on_progress=on_progress,
            **made,
        )
        assert trained is not None
        result["documents"] = {
            name: [round(value, 3) for value in losses[0]]
            for name, losses in document_losses(trained.model, domains).items()
        }
        read = trained.steps * spec["pretrain"]["batch_size"] * SEQ_LEN
        result |= {"parameters": trained.parameters, "tokens": tokens_before + read}
        result["tokens_per_second"] = round(trained.tokens_per_second or 0)
        history = trained.weight_history
    except NumericalError as error:
        result |= {"diverged": error.found, "tokens": 0}
        tokens_before, history = 0, []
    result |= _curves(folder / "train" / "metrics.jsonl", job, tokens_before, history)
    losses = _mean(result["heldout"])
    if not result["diverged"] and losses[-1] > losses[0] + WORSE:
        result["diverged"] = f"from {losses[0]:.2f} to {losses[-1]:.2f}"
    result |= {"seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    result |= {"machine": _machine(places.device), "versions": versions()}
    write_json_atomic(folder / RESULT, result)
    for part in folder.iterdir():  # weights: what is known of them is in the result
        if part.is_dir():
            remove_folder(part)
    return result


def measure_parent(places: Places, *, eval_tokens: int) -> dict[str, Any]:
    """The parent's losses on the text that runs are measured on while they train, and document by document."""
    path = places.folder / f"parent-{prismoe.Checkpoint.open(places.parent).fingerprint[:16]}-{eval_tokens}.json"
    if not path.exists():
        domains = domains_of("all", places.text)
        reference = prismoe.reference_loss(places.parent, domains, seq_len=SEQ_LEN, max_tokens=eval_tokens, threads=1)
        found = document_losses(places.parent, domains)
        record: dict[str, Any] = {"heldout": {name: entry.loss for name, entry in reference.losses.items()}}
        record["documents"] = {name: [round(value, 3) for value in nats] for name, (nats, _) in found.items()}
        record["document_tokens"] = {name: tokens for name, (_, tokens) in found.items()}
        write_json_atomic(path, record)
    return dict(json.loads(path.read_bytes()))


def document_losses(model: Path, domains: Iterable[Path]) -> dict[str, tuple[list[float], list[int]]]:
    """Of every held-out document its nats and its tokens, in float32."""
    from prismoe.train.device import num_threads
    from prismoe.train.model import load_model
    from prismoe.train.scoring import score_text

    found = {}
    with num_threads(1):
        loaded = load_model(model)
        for domain in map(Domain.open, domains):
            windows = heldout_windows(domain, seq_len=SEQ_LEN)
            loss = score_text(loaded, domain, windows, batch_size=16, where=f"{model} on {domain.name}")
            found[domain.name] = loss.nats.tolist(), loss.tokens.tolist()
    return found


def calibration_of(job: Job, places: Places, *, make: bool = False) -> Path | None:
    """The folder of the statistics that the plan of `job` reads, None where it reads none; made if asked to."""
    plan, arguments = _split(job.spec["plan"])
    if not plan or not (wanted := wanted_statistics(PlanConfig(**plan, arguments=arguments))):
        return None
    clusters = wanted.get("clusters") or 8
    folder = places.folder / "calibration" / f"{clusters}-{job.seed}"
    if make:
        config = prismoe.CalibrateConfig(
            quantities=("activation", "importance", "marks", "coactivation", "inputs", "scores", "output"),
            clusters=clusters,
            max_tokens=job.spec["calibration_tokens"],
            seq_len=SEQ_LEN,
            seed=job.seed,
            threads=1,
            device=places.device,
        )
        prismoe.calibrate(places.parent, config, domains=domains_of("all", places.text), out=folder)
    return folder


def _start(job: Job, places: Places, domains: list[Path], on_progress: Progress) -> tuple[Path, dict[str, Any], int]:
    """What is trained: a folder, how a mixture is made of it in memory, and the tokens that were spent to get there."""
    spec = job.spec
    if not spec["plan"]:
        return places.parent, {}, spec["before"]
    plan, arguments = _split(spec["plan"])
    made = prismoe.make_plan(places.parent, seed=job.seed, calibration=calibration_of(job, places), **plan, **arguments)
    if spec["target"] != "dense" and not {"config", "recover"} & spec.keys() and spec["pretrain"]["init"] == "source":
        return places.parent, {"plan": made, "target": spec["target"]}, spec["before"]
    folder, tokens = places.run(job) / "mixture", spec["before"]
    prismoe.convert(places.parent, made, target=spec["target"], out=folder)
    if "config" in spec:
        folder = _changed(folder, spec["config"])
    if "recover" in spec:
        config = prismoe.RecoverConfig(**spec["recover"], seq_len=SEQ_LEN, seed=job.seed, threads=1)
        out = places.run(job) / "recovered"
        tokens += prismoe.recover(
            places.parent, folder, config=config, domains=domains, out=out, on_progress=on_progress
        ).tokens
        folder = out
    return folder, {}, tokens


def _split(plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a plan that every plan has, and the method's and router's own."""
    common = ("method", "top_k", "layers", "scale", "router")
    return {k: v for k, v in plan.items() if k in common}, {k: v for k, v in plan.items() if k not in common}


def _changed(folder: Path, keys: Mapping[str, Any]) -> Path:
    """A copy of a converted folder with other keys in config.json, and no manifest: it is not what was written."""
    out = folder.with_name("changed")
    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "prismoe.json"))
    config = json.loads((folder / "config.json").read_bytes())
    write_json_atomic(out / "config.json", config | keys)
    return out


def _config(job: Job, places: Places) -> prismoe.PretrainConfig:
    settings = dict(job.spec["pretrain"])
    if settings.get("reference") == "parent":
        settings["reference"] = measure_parent(places, eval_tokens=settings["eval_tokens"])["heldout"]
    if settings.get("teacher") == "parent":
        settings["teacher"] = str(places.parent)
    # A checkpoint now and then: a machine may go down in the long run.
    settings |= {"seed": job.seed, "device": places.device, "threads": 1, "keep_memory": True, "save_every": 200}
    return prismoe.PretrainConfig(**settings)


def _curves(path: Path, job: Job, tokens_before: int, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every evaluation the tokens until then, losses by domain, what routers do; the training loss thinned."""
    lines = read_metrics(path) if path.exists() else []
    # A run that went back to a checkpoint has evaluated some steps twice.
    evals = list({line["step"]: line for line in lines if line["event"] == "eval"}.values())
    steps = [line for line in lines if line["event"] == "step"]
    a_step = job.spec["pretrain"]["batch_size"] * SEQ_LEN
    found: dict[str, Any] = {
        "curve_tokens": [tokens_before + line["step"] * a_step for line in evals],
        "heldout": {name: [round(line["heldout"][name]["loss"], 4) for line in evals] for name in evals[0]["heldout"]}
        if evals
        else {},
        "training_loss": [round(line["loss"], 3) for line in steps[:: max(1, len(steps) // 30)]],
    }
    if evals and "load" in evals[0]:
        found["entropy"] = [round(sum(line["entropy"]) / len(line["entropy"]), 4) for line in evals]
        found["idle"] = [line["idle"] for line in evals]
        found["busiest"] = [round(max(line["max_over_mean"]), 3) for line in evals]
        found["load"] = [[round(share, 3) for share in layer] for layer in evals[-1]["load"]]
    if len(history) > 1:
        now = [[entry["weights"] for entry in history if entry["step"] <= line["step"]][-1] for line in evals]
        found["weights"] = {name: [round(weights[name], 4) for weights in now] for name in now[0]}
    return found


def _mean(heldout: Mapping[str, list[float]]) -> list[float]:
    """The mean over domains, evaluation by evaluation."""
    return [sum(losses) / len(losses) for losses in zip(*heldout.values(), strict=True)]


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {os.cpu_count()} cores, one thread a run"
