"""What calibration tests share: a small real model with text for it, and the statistics as plain autograd has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.text import Text, draw_text
from prismoe.data.shards import Domain
from prismoe.progress import Progress, quiet
from prismoe.stats.calibration import Calibration
from tests.tiny import tiny_dense
from tests.training import domain_folder

EVERYTHING = ("activation", "importance", "marks", "coactivation", "inputs", "scores", "output")
SMALL: dict[str, Any] = {
    "quantities": EVERYTHING,
    "clusters": 3,
    "seq_len": 24,
    "max_tokens": 24 * 20,
    "sample_tokens": 50,
    "batch_size": 4,
    "marks_per_token": 5,
    "device": "cpu",
    "threads": 1,
}


@dataclass(frozen=True)
class World:
    """A model and three domains of text for it."""

    model: Path
    domains: tuple[Domain, ...]

    def run(self, out: Path, *, on_progress: Progress = quiet, force: bool = False, **settings: Any) -> Calibration:
        config = CalibrateConfig(**{**SMALL, **settings})
        return calibrate(self.model, config, domains=self.domains, out=out, on_progress=on_progress, force=force)

    def text(self, **settings: Any) -> Text:
        config = CalibrateConfig(**{**SMALL, **settings})
        return draw_text(
            self.domains,
            weights=config.weights,
            seq_len=config.seq_len,
            max_tokens=config.max_tokens,
            sample_tokens=config.sample_tokens,
            start_token=config.start_token,
            seed=config.seed,
        )


def make_world(folder: Path, family: str = "llama", **overrides: Any) -> World:
    model = tiny_dense(folder / "model", family, **overrides)
    names = ("arxiv", "books", "github")
    return World(
        model,
        tuple(
            Domain.open(domain_folder(folder / name, tokenizer=model / "tokenizer.json", documents=12, seed=seed))
            for seed, name in enumerate(names)
        ),
    )


@dataclass(frozen=True)
class Reference:
    """What the whole stock model does in float64 (but for its norms: the class computes them in float32).

    [L, N, T, …] of activation, its gradient, FFN input and output.
    """

    h: Any
    g: Any
    x: Any
    y: Any
    middle: Any
    loss: float


def reference(model_folder: Path, text: Text) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    seen: dict[str, list[Any]] = {"h": [], "x": [], "y": [], "hidden": []}

    def keep_hidden(module: Any, args: Any) -> None:
        args[0].retain_grad()
        seen["h"].append(args[0])

    def keep_ends(module: Any, args: Any, output: Any) -> None:
        seen["x"].append(args[0])
        seen["y"].append(output)

    def keep_state(module: Any, args: Any, output: Any) -> None:
        seen["hidden"].append(output)

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep_hidden)
        layer.mlp.register_forward_hook(keep_ends)
        layer.register_forward_hook(keep_state)
    ids = torch.from_numpy(text.ids(0, len(text)))
    logits = model(input_ids=ids, use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    loss = -logp.gather(2, ids[:, 1:, None]).sum()
    loss.backward()
    middle = seen["hidden"][-(-len(model.model.layers) // 2) - 1][:, 1:].mean(dim=1)

    def stack(values: list[Any]) -> Any:
        return np.stack([value.detach().numpy() for value in values])

    gradients = np.stack([h.grad.numpy() for h in seen["h"]])
    predicted = len(text) * (text.seq_len - 1)
    return Reference(
        stack(seen["h"]),
        gradients,
        stack(seen["x"]),
        stack(seen["y"]),
        middle.detach().numpy(),
        loss.item() / predicted,
    )


def close(found: Any, expected: Any, *, limit: float = 2e-5) -> None:
    """Relative to the largest number: float32 sums have no more."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def check_against(found: Calibration, truth: Reference, text: Text, *, marks: int, importance: str = "l1") -> None:
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    clusters = found.sequences().clusters
    predicted = np.bincount(clusters) * (text.seq_len - 1)
    for layer in range(found.num_layers):
        stats = found.layer(layer)
        h, g = truth.h[layer], truth.g[layer]
        flat = h.reshape(-1, h.shape[-1])
        close(stats.mean, flat.mean(0))
        close(stats.mean_abs, np.abs(flat).mean(0))
        close(stats.mean_square, (flat**2).mean(0))
        norms = np.linalg.norm(truth.y[layer], axis=-1)
        assert stats.output_norm == pytest.approx(norms.mean(), rel=1e-5)
        assert stats.output_rms == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-5)
        np.testing.assert_array_equal(stats.cluster_tokens, predicted)
        for c in range(found.num_clusters):
            part = (h * g)[clusters == c].reshape(-1, h.shape[-1])
            expected = {
                "l1": np.abs(part).sum(0),
                "square": (part**2).sum(0),
                "total": np.abs(part.sum(0)),
                "total_square": part.sum(0) ** 2,
            }[importance]
            close(stats.need("importance")[c], expected / predicted[c], limit=5e-5)
        # The marks: numbers that float32 cannot tell apart may change places, so the values are compared.
        order = np.sort(np.argsort(-np.abs(flat), axis=1)[:, :marks], axis=1)
        sampled = text.samples
        close(
            np.take_along_axis(np.abs(flat[sampled]), stats.need("marks"), axis=1).sum(),
            np.take_along_axis(np.abs(flat[sampled]), order[sampled], axis=1).sum(),
        )
        marked = np.zeros(flat.shape)
        np.put_along_axis(marked, order, 1.0, axis=1)
        assert np.abs(stats.need("rate") - marked.mean(0)).max() <= 2 / len(flat)
        assert np.abs(stats.need("coactivation") - marked.T @ marked).max() <= 2
        assert (np.diag(stats.need("coactivation")) == np.rint(stats.need("rate") * np.float64(len(flat)))).all()
        close(stats.inputs, truth.x[layer].reshape(len(flat), -1)[sampled])
        scores = np.abs(h * g).reshape(flat.shape)[sampled]
        assert np.abs(np.asarray(stats.scores, np.float64) - scores).max() <= 2**-8 * scores.max()
        np.testing.assert_array_equal(stats.sample_clusters, clusters[sampled // text.seq_len])
