"""Small converted folders: every family and target that `verify` has to hold for, each beside its dense source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.convert import convert
from prismoe.plan import LayerPlan, Plan, RouterDraw, make_plan
from prismoe.verify import Certificate, verify
from tests.tiny import tiny_dense


def sharing_plan(source: Path) -> Plan:
    """Experts that overlap: 40 neurons each, so that some neurons are in several and some in none."""
    partition = make_plan(source, num_experts=4)
    rng = np.random.default_rng(3)
    layers = []
    for _ in partition.layers:
        experts = np.stack([np.sort(rng.choice(96, 40, replace=False)) for _ in range(4)]).astype(np.int32)
        layers.append(LayerPlan(experts, np.empty(0, np.int32), RouterDraw(std=0.3, seed=1), scale=1.5))
    return Plan(tuple(layers), 2, 96, 64, partition.origin)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | Callable[[Path], Plan], str]] = {
    "llama to mixtral": ("llama", {}, {"num_experts": 8}, "mixtral"),
    "llama to mixtral, top-1, scale 1": ("llama", {}, {"num_experts": 4, "top_k": 1, "scale": 1.0}, "mixtral"),
    "llama3 rope, tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"num_experts": 4},
        "mixtral",
    ),
    "mistral with a window of 8": ("mistral", {"sliding_window": 8}, {"num_experts": 4}, "mixtral"),
    "llama with a shared expert": ("llama", {}, {"num_experts": 4, "shared": 32}, "granitemoeshared"),
    "qwen2, biases": ("qwen2", {"tie_word_embeddings": True}, {"num_experts": 4}, "granitemoeshared"),
    "qwen3, odd layers": ("qwen3", {}, {"num_experts": 4, "layers": "odd"}, "qwen3_moe"),
    "llama upcycled": ("llama", {}, {"method": "upcycle", "num_experts": 4, "router_std": 1.0}, "mixtral"),
    "bfloat16": ("llama", {"dtype": "bfloat16"}, {"num_experts": 8}, "mixtral"),
    "sharing": ("llama", {}, sharing_plan, "mixtral"),
}


def converted(tmp: Path, case: str) -> Path:
    """The converted folder of one of CASES, beside its source in `dense`."""
    family, overrides, plan, target = CASES[case]
    source = tiny_dense(tmp / "dense", family, **overrides)
    made = plan(source) if callable(plan) else make_plan(source, **plan)
    convert(source, made, target=target, out=tmp / "moe")
    return tmp / "moe"


def check(folder: Path, **arguments: Any) -> Certificate:
    return verify(folder, **{"source": folder.parent / "dense", **arguments})


def numbers(certificate: Certificate) -> dict[str, float]:
    return {check.name: check.measured for check in certificate.checks}
