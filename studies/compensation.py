"""Does it pay to add what unselected experts give on average? y = Σ_on E_i(x) + Σ_off mean(E_i | off).

Before any training, with experts summed at full strength (no gates) and regressed rows; beside it the pruned parent
with and without the mean of what was pruned. Text and statistics are those of the study.

python -m studies.compensation --corpora shared/corpora
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prismoe
from prismoe.data.shards import Domain, heldout_windows
from prismoe.layerplan import LayerPlan
from prismoe.progress import quiet
from prismoe.stats.calibration import Calibration
from prismoe.train.device import num_threads
from prismoe.train.model import load_model
from prismoe.train.scoring import score_text
from studies.arms import questions
from studies.design import SEQ_LEN, SIZES, jobs_of
from studies.runner import check_inputs
from studies.text import domains_of, prepare_text
from studies.work import Places, calibration_of

PARENT = Path(__file__).parent / "parent"
Tensor = torch.Tensor


class Mixed(torch.nn.Module):
    """A dense FFN of which a token gets the neurons of its experts; all others give 0, or once measured their mean.

    `owner_F` is the expert of each neuron. Without rows [E, D] expert 0 alone is on.
    """

    def __init__(self, ffn: Any, plan: LayerPlan, num_neurons: int, top_k: int) -> None:
        super().__init__()
        self.ffn, self.top_k, self.num_experts = ffn, top_k, len(plan.experts)
        self.owner_F = torch.full((num_neurons,), self.num_experts)  # of what is pruned: one more, never on
        for expert, neurons in enumerate(plan.experts):
            self.owner_F[torch.from_numpy(neurons.astype(np.int64))] = expert
        self.rows_ED = None if self.num_experts == 1 else torch.from_numpy(np.asarray(plan.router))
        self.means: Tensor | None = None  # [E + 1, D]

    def chosen(self, x: Tensor) -> Tensor:
        """[..., E + 1] 1 where an expert is on."""
        kept = torch.zeros(*x.shape[:-1], self.num_experts + 1)
        if self.rows_ED is None:
            kept[..., 0] = 1.0
            return kept
        return kept.scatter(-1, (x @ self.rows_ED.T).topk(self.top_k).indices, 1.0)

    def hidden(self, x: Tensor) -> Tensor:
        made: Tensor = self.ffn.act_fn(self.ffn.gate_proj(x)) * self.ffn.up_proj(x)
        return made

    def measure(self, x_SD: Tensor) -> None:
        """The mean of each expert's output over the tokens that do not select it."""
        off_SE, h_SF = 1 - self.chosen(x_SD), self.hidden(x_SD)
        mean_EF = (off_SE / off_SE.sum(dim=0).clamp(min=1)).T @ h_SF
        mean_EF *= self.owner_F == torch.arange(self.num_experts + 1)[:, None]
        self.means = self.ffn.down_proj(mean_EF)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.chosen(x)
        y: Tensor = self.ffn.down_proj(self.hidden(x) * kept[..., self.owner_F])
        return y if self.means is None else y + (1 - kept) @ self.means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("shared/corpora"))
    parser.add_argument("--out", type=Path, default=Path("runs/study-small"), help="folder of the study")
    args = parser.parse_args()
    places, size = Places(PARENT, args.out), SIZES["small"]
    jobs = jobs_of(questions(), size, source=check_inputs(PARENT, args.corpora))
    regressed = {job.seed: job for job in jobs if "construction: random, regressed rows 50 %" in job.names}
    prepare_text(
        (), parent=PARENT, corpora=args.corpora, out=places.text, documents=size.heldout_documents, on_progress=quiet
    )
    measured = {
        seed: Calibration.open(folder)
        for seed, job in sorted(regressed.items())
        if (folder := calibration_of(job, places, make=True))
    }
    domains = [Domain.open(path) for path in domains_of("all", places.text)]
    windows = [heldout_windows(domain, seq_len=SEQ_LEN) for domain in domains]
    model = load_model(PARENT)
    layers: Any = model.model.layers
    dense = [layer.mlp for layer in layers]

    def loss() -> float:
        pairs = zip(domains, windows, strict=True)
        found = [score_text(model, *pair, batch_size=16, where="the parent") for pair in pairs]
        return statistics.fmean(each.nats.sum() / each.tokens.sum() for each in found)

    with num_threads(1), torch.no_grad():
        whole = loss()
        print(f"parent {whole:.3f}; below the loss over it, seeds {', '.join(map(str, measured))}")
        for top_k in (4, 2):
            rows: dict[str, list[float]] = {}
            for seed, found in measured.items():
                fixed: dict[str, Any] = {"seed": seed, "calibration": found}
                plans = {
                    "mixture": prismoe.make_plan(PARENT, num_experts=8, top_k=top_k, router="regressed", **fixed),
                    "pruned": prismoe.make_plan(PARENT, method="prune", keep=top_k / 8, **fixed),
                }
                for name, plan in plans.items():
                    for layer, ffn, made in zip(layers, dense, plan.layers, strict=True):
                        assert made is not None
                        layer.mlp = Mixed(ffn, made, plan.num_neurons, top_k)
                    rows.setdefault(name, []).append(loss() - whole)
                    for index, layer in enumerate(layers):
                        layer.mlp.measure(torch.tensor(np.asarray(found.layer(index).need("inputs"), np.float32)))
                    rows.setdefault(f"{name}, means added", []).append(loss() - whole)
            for name, values in rows.items():
                print(f"{top_k} of 8  {name:<24}" + "".join(f"{value:+8.3f}" for value in values))


if __name__ == "__main__":
    main()
