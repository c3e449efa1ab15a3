"""What the study is made of: one base recipe, settings that change some of its keys, questions that compare settings.

A run is a setting under one seed. Its key is a hash of everything that decides its result, so that a setting which
several questions have is run once, and a finished run is known again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["BASE", "DENSE", "SEQ_LEN", "SIZES", "Changes", "Job", "Panel", "Question", "Setting", "Size", "jobs_of"]

Changes = dict[str, Any]

SEQ_LEN = 256
PARENT_TOKENS = 61_440_000  # see studies/parent.py

BASE: Mapping[str, Any] = MappingProxyType(
    {
        "text": "all",  # or fluent, no_advertisements: see text.py
        "weights": "proportional",
        "tokens": 1.0,  # times those of the size; "headline" for a share of the parent's; those of `recover` count
        "count_calibration": False,  # whether the text that the plan was measured on counts too
        "evals": 6,  # evenly spread, and one before the first step
        "plan.method": "random",  # no plan.method: the parent itself
        "plan.num_experts": 8,
        "plan.top_k": 4,
        "plan.scale": "paper",
        "plan.router": "random",
        "target": "mixtral",
        "config": None,  # keys of config.json that are changed after conversion
        "recover": None,  # arguments of RecoverConfig
        "pretrain.init": "source",
        "pretrain.router": "switch",
        "pretrain.lr": 1e-3,
        "pretrain.min_lr_ratio": 0.1,
    }
)
"""LLaMA-MoE's construction (a random split, drawn router rows, scale E/K) with half of each FFN active, balanced by the
Switch loss. A key of the form section.name is an argument of `make_plan` or `PretrainConfig`; None takes it away."""

DENSE: Mapping[str, Any] = MappingProxyType({key: None for key in BASE if key.startswith("plan.")})
"""Changes that leave the parent as it is."""


@dataclass(frozen=True)
class Setting:
    """One line of a table: its name, what it changes in `BASE`, and the setting it is compared with.

    `against` is that of the question's first setting where nothing is said, and the line's own name for none.
    """

    name: str
    changes: Mapping[str, Any]
    against: str = ""


@dataclass(frozen=True)
class Panel:
    """Curves against tokens: `metric` is heldout, heldout:DOMAIN, weight:DOMAIN, closed (share of the gap to the
    parent), entropy, idle or busiest. Without `settings` all of the question.
    """

    title: str
    metric: str = "heldout"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """Settings that answer it; `paper` names what it answers to."""

    name: str
    title: str
    paper: str
    about: str
    settings: tuple[Setting, ...]
    panels: tuple[Panel, ...] = (Panel(""),)


@dataclass(frozen=True)
class Size:
    """How much of everything. `tokens` is the budget of a run, `headline` that of the long one as a share of what the
    parent was trained on, `tokens_per_second` what one worker was measured to train of a mixture (for forecasts).
    """

    name: str
    tokens: int
    headline: float
    seeds: tuple[int, ...]
    batch_size: int
    heldout_documents: int  # of each domain, their first characters
    eval_tokens: int  # of each domain while a run trains
    calibration_tokens: int
    workers: int
    tokens_per_second: float
    precision: str = "bf16"
    max_epochs: float = 8.0


SIZES = {
    size.name: size
    for size in (
        Size(
            name="small",
            tokens=147_456,
            headline=0.05,
            seeds=(0, 1, 2),
            batch_size=8,
            heldout_documents=24,
            eval_tokens=2048,
            calibration_tokens=32_768,
            workers=2,
            tokens_per_second=3_600,
        ),
        Size(
            name="large",
            tokens=2_457_600,
            headline=0.1,
            seeds=(0, 1, 2, 3, 4),
            batch_size=32,
            heldout_documents=40,
            eval_tokens=8192,
            calibration_tokens=131_072,
            workers=1,
            tokens_per_second=100_000,
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One run: `spec` is JSON-able and decides the result, `cost` is in tokens of training a mixture."""

    key: str
    seed: int
    spec: Mapping[str, Any]
    cost: float
    names: tuple[str, ...]


def jobs_of(questions: Iterable[Question], size: Size, *, source: str) -> list[Job]:
    """Every run once, those of one seed together. `source` says which parent and text.

    The longest first, so that workers end together; but the headlines, whose recipes are chosen from the others, last.
    """
    found: dict[str, Job] = {}
    for question in questions:
        for setting in question.settings:
            for seed in size.seeds:
                job = _job(setting, size, seed, source, f"{question.name}: {setting.name}")
                names = found[job.key].names if job.key in found else ()
                found[job.key] = Job(job.key, seed, job.spec, job.cost, (*names, *job.names))
    long = max((job.spec["pretrain"]["steps"] for job in found.values()), default=0)
    return sorted(found.values(), key=lambda job: (job.spec["pretrain"]["steps"] > long / 2, job.seed, -job.cost))


def _job(setting: Setting, size: Size, seed: int, source: str, name: str) -> Job:
    keys = {key: value for key, value in {**BASE, **setting.changes}.items() if value is not None}
    a_step = size.batch_size * SEQ_LEN
    factor = keys.pop("tokens")
    tokens = size.headline * PARENT_TOKENS if factor == "headline" else factor * size.tokens
    before = size.calibration_tokens if keys.pop("count_calibration") else 0
    steps = max(2, int((tokens - before - keys.get("recover", {}).get("tokens", 0)) // a_step))
    every = max(1, int(tokens // a_step) // keys.pop("evals"))  # of the whole budget, so that curves have like points
    spec: dict[str, Any] = {"plan": {}, "pretrain": {}, "seed": seed, "source": source, "before": before}
    for key, value in keys.items():
        section, _, field = key.rpartition(".")
        (spec[section] if section else spec)[field] = value
    spec["pretrain"] = {
        "steps": steps,
        "seq_len": SEQ_LEN,
        "batch_size": size.batch_size,
        "warmup_steps": max(1, steps // 20),
        "eval_every": every,
        "eval_tokens": size.eval_tokens,
        "precision": size.precision,
        "max_epochs": size.max_epochs,
        **spec["pretrain"],
    }
    if "mixing" in spec["pretrain"]:
        spec["pretrain"]["mixing_every_tokens"] = every * a_step
    if "anneal" in (arguments := dict(spec["pretrain"].get("arguments", {}))):  # shares of the run
        spec["pretrain"]["arguments"] = arguments | {"anneal": [round(part * steps) for part in arguments["anneal"]]}
    spec |= {"heldout_documents": size.heldout_documents, "calibration_tokens": size.calibration_tokens}
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    measured = (steps // every + 1) * size.eval_tokens + size.heldout_documents * SEQ_LEN  # of each of seven domains
    cost = (steps * a_step + 7 * measured / 3) * _relative_cost(spec) + 2.5 * spec.get("recover", {}).get("tokens", 0)
    return Job(key, seed, spec, cost, (name,))


def _relative_cost(spec: Mapping[str, Any]) -> float:
    """Of one token, against one of a mixture that is cut from the parent."""
    plan, pretrain = spec["plan"], spec["pretrain"]
    taught = 0.5 if "teacher" in pretrain else 0.0
    if not plan or spec["target"] == "dense":
        return 0.65 + taught
    return (1.6 if plan["method"] == "upcycle" else 1.0) + taught
