"""A run folder with the receipts of a finished small run and a routing trace as wide as a large model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.routing.likeness import FILE as LIKENESS
from prismoe.routing.likeness import FOLDER, Similarity
from prismoe.routing.record import FILE, RoutingTrace
from tests.runs import copy_of

DOMAINS = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")
BENCHMARKS = ("hellaswag_val", "arc_challenge_test", "gsm8k_test")


def random_trace(
    *, layers: int = 32, experts: int = 16, top_k: int = 4, sample: int = 256, seed: int = 0
) -> RoutingTrace:
    """Routers that choose by a taste of each domain, stronger in deep layers; every count is what its sample says."""
    draw = np.random.default_rng(seed)
    names = DOMAINS + BENCHMARKS
    taste_GLE = draw.normal(size=(len(names), layers, experts)) * np.linspace(0.1, 1.0, layers)[:, None]
    noise_GSLE = draw.gumbel(size=(len(names), sample, layers, experts))
    logits_GSLE = taste_GLE[:, None] + noise_GSLE
    logits_GSLE[:, :, 0, :2] -= 99.0  # dead in the first layer
    experts_GSLK = np.argsort(-logits_GSLE, axis=-1)[..., :top_k]
    chosen_GSLE = np.zeros(logits_GSLE.shape, bool)
    np.put_along_axis(chosen_GSLE, experts_GSLK, True, axis=-1)
    load_GLE = chosen_GSLE.sum(axis=1)
    together = chosen_GSLE.reshape(-1, layers, experts).astype(np.int64)
    return RoutingTrace(
        domains=names,
        kinds=("train",) * len(DOMAINS) + ("benchmark",) * len(BENCHMARKS),
        layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        tokens_G=np.full(len(names), sample),
        load_GLE=load_GLE,
        importance_GLE=load_GLE / top_k,
        coactivation_LEE=np.einsum("nle,nlf->lef", together, together),
        entropy_GL=np.log(experts) * (0.5 + 0.4 * draw.random((len(names), layers))),
        norm_GL=1.0 + draw.random((len(names), layers)),
        sample_tokens_GS=draw.integers(3, 60, (len(names), sample)).astype(np.int32),
        sample_experts_GSLK=experts_GSLK.astype(np.int16),
        sample_weights_GSLK=np.full(experts_GSLK.shape, 1 / top_k, np.float32),
        provenance={},
    )


def task_rows() -> list[dict[str, Any]]:
    """Three tasks of three models, as `evaluate` gives them."""
    rows = []
    for model, gain in (("dense", 0.0), ("step 0", -0.11), ("trained", -0.02)):
        for task, score, chance in (("sciq", 0.61, 0.25), ("arc_challenge", 0.27, 0.25), ("nq_open", 0.12, None)):
            known = {
                "model": model,
                "task": task,
                "metric": "acc",
                "num_fewshot": 0,
                "num_documents": 1000,
                "p_value": 0.01,
            }
            known |= {"score": score + gain, "standard_error": 0.014, "chance": chance, "num_truncated": 0}
            known |= {"above_chance": None if chance is None else score + gain > chance + 0.02}
            known |= {"change": gain, "change_standard_error": 0.01 if gain else 0.0}
            rows.append({**known, "verdict": {0.0: "", -0.11: "significant"}.get(gain, "not")})
    return rows


def wide_run(folder: Path) -> Path:
    """The finished small run with a trace of 32 layers, 16 experts and ten texts, benchmark tasks and likeness."""
    out = copy_of(folder)
    (out / "trace").mkdir(exist_ok=True)
    random_trace().save(out / "trace" / FILE)
    state = json.loads((out / "run.json").read_text())
    state["eval"]["receipt"] |= {"tasks": task_rows(), "findings": ["step 0 does not beat its static control."]}
    (out / "run.json").write_text(json.dumps(state))
    draw = np.random.default_rng(1)
    alike = np.clip(draw.normal(0.3, 0.1, (32, 16, 16)), 0, 0.9)
    alike[:, np.arange(16), np.arange(16)] = 1.0
    cosine = (alike + alike.swapaxes(1, 2)) / 2
    cosine[5, 3, 7] = cosine[5, 7, 3] = 0.9995
    found = Similarity(tuple(range(32)), 16, 8, cosine, alike, draw.random((32, 16)), None, None, {})
    (out / FOLDER).mkdir(exist_ok=True)
    (out / FOLDER / LIKENESS).write_bytes(found.to_bytes())
    return out
