"""P15 and P16: the experts of a layer and end-to-end training on one CUDA device, beside their limits and peers.

    python benchmarks/gpu.py                         # both
    python benchmarks/gpu.py --only layer            # P15: forward and backward, T = 16384, bfloat16
    python benchmarks/gpu.py --only train --steps 30 # P16: continual pre-training, sequences of 4096

Random data, several input sets that together are larger than the cache, CUDA events, the median of 20; the ceiling is
a product of two 8192 x 8192 matrices measured in the same run. Routing is balanced unless "natural" is said: then the
choices of a random router. Backends that are not installed are said to be missing. Without a CUDA device it says so
and ends with 4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prismoe.train.experts import sorted_experts
from prismoe.train.liger import has_liger, liger_experts
from prismoe.train.speed import flops_per_token, peak_flops

TOKENS, SETS, MEDIAN_OF = 16384, 4, 20


@dataclass(frozen=True)
class Shape:
    """Experts of a layer, and what they should reach: `goal` in 10^12 FLOP/s, forward and backward."""

    hidden: int
    width: int
    experts: int
    top_k: int
    goal: float


SHAPES = {
    "LLaMA-MoE 2/16": Shape(4096, 688, 16, 2, 430.0),
    "LLaMA-MoE 4/16": Shape(4096, 688, 16, 4, 470.0),
    "LLaMA-MoE 2/8": Shape(4096, 1376, 8, 2, 500.0),
    "Llama-3 8x8B top-2": Shape(4096, 14336, 8, 2, 490.0),
}
MODELS = {"4/16": (688, 16, 4), "2/16": (688, 16, 2), "2/8": (1376, 8, 2), "dense": (11008, 1, 1)}
"""LLaMA-2-7B: width, number and choice of its experts; goals of P16 are for the first two."""

GOAL_MFU, GOAL_OF_DENSE, GOAL_OF_PLAIN, GOAL_OF_BEST = 0.42, 0.75, 1.2, 0.97
IMPLEMENTATIONS = {"grouped_mm": "torch", "sonicmoe": "kernels", "deepgemm": "kernels"}
"""Names that transformers dispatches, and the package each needs."""


def layer_flops(shape: Shape, *, tokens: int = TOKENS, backward: bool = True) -> int:
    """Of the matrix products of the experts: gate, up and down, each of them three times with the backward pass."""
    return 6 * tokens * shape.top_k * shape.width * shape.hidden * (3 if backward else 1)


def layer_bytes(shape: Shape) -> int:
    """Of the weights in bfloat16."""
    return 2 * 3 * shape.experts * shape.width * shape.hidden


def mfu(tokens_per_second: float, flops_of_token: float, peak: float) -> float:
    """Share of the peak FLOP/s that a model uses: FLOPs of a token as `prismoe.train.speed` counts them."""
    return tokens_per_second * flops_of_token / peak


def balanced(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """[T, K] choices that load all experts equally, each token's different."""
    return (torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)) % experts


def config_of(model: str, *, layers: int = 32) -> Any:
    """The stock config of LLaMA-2-7B or of a mixture made of it."""
    from transformers import LlamaConfig, MixtralConfig

    width, experts, top_k = MODELS[model]
    shared = {"hidden_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32}
    shared |= {"vocab_size": 32000, "max_position_embeddings": 4096, "intermediate_size": width}
    if experts == 1:
        return LlamaConfig(**shared)
    return MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=None)


def backends() -> dict[str, Callable[..., torch.Tensor] | None]:
    """Forward passes of a module of experts by name; None for what is not installed."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found: dict[str, Callable[..., torch.Tensor] | None] = {"sorted": sorted_experts}
    for name, package in IMPLEMENTATIONS.items():
        here = util.find_spec(package) is not None and name in ALL_EXPERTS_FUNCTIONS
        found[name] = ALL_EXPERTS_FUNCTIONS[name] if here else None
    found["liger"] = liger_experts if has_liger() else None
    found["transformer_engine"] = _transformer_engine() if util.find_spec("transformer_engine") else None
    return found


def _transformer_engine() -> Callable[..., torch.Tensor] | None:
    try:
        from transformer_engine.pytorch import GroupedLinear  # type: ignore[import-not-found]
    except ImportError:
        return None
    made: dict[int, tuple[Any, Any]] = {}

    def forward(self: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        if id(self) not in made:
            width, hidden = self.down_proj.shape[2], self.down_proj.shape[1]
            options = {"bias": False, "params_dtype": x_TD.dtype, "device": x_TD.device}
            first = GroupedLinear(self.num_experts, hidden, 2 * width, **options)
            made[id(self)] = first, GroupedLinear(self.num_experts, width, hidden, **options)
        first, last = made[id(self)]
        expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
        counts = torch.bincount(expert_S, minlength=self.num_experts).tolist()
        token_S = order_S // index_TK.shape[1]
        between_SW = self._apply_gate(first(x_TD.index_select(0, token_S), counts))
        between_SW = between_SW * weights_TK.reshape(-1, 1).index_select(0, order_S).to(between_SW.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_S, last(between_SW, counts))

    return forward


def median_seconds(works: Sequence[Callable[[], Any]]) -> float:
    """Of single calls, each of `works` in turn, by events of the device."""
    for work in works:
        work()
    spans = []
    for number in range(MEDIAN_OF):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        works[number % len(works)]()
        end.record()
        torch.cuda.synchronize()
        spans.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(spans)


def ceiling() -> float:
    """FLOP/s of a product of 8192 x 8192 matrices in bfloat16."""
    pairs = [[torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(SETS)]
    return 2 * 8192**3 / median_seconds([lambda pair=pair: pair[0] @ pair[1] for pair in pairs])  # type: ignore[misc]


def layer(*, tokens: int) -> None:
    """P15."""
    limit = ceiling()
    print(f"product of 8192^3 in bfloat16: {limit / 1e12:.0f} TFLOP/s")
    for name, shape in SHAPES.items():
        module = experts_of(shape, device="cuda")
        for routing in ("balanced", "natural"):
            rates: dict[str, float] = {}
            for backend, forward in backends().items():
                if forward is None:
                    print(f"  {name}, {routing}: {backend} missing")
                    continue
                try:
                    seconds = median_seconds([_pass(module, forward, shape, tokens, routing, s) for s in range(SETS)])
                except (RuntimeError, ImportError, ValueError, NotImplementedError, OSError) as error:
                    print(f"  {name}, {routing}: {backend} failed: {str(error).splitlines()[0][:100]}")
                    continue
                rates[backend] = layer_flops(shape, tokens=tokens) / seconds
                print(f"  {name}, {routing}: {backend} {1e3 * seconds:.2f} ms, {rates[backend] / 1e12:.0f} TFLOP/s")
            if routing == "balanced" and rates:
                _verdicts(shape, rates, limit)
        del module


def _verdicts(shape: Shape, rates: dict[str, float], limit: float) -> None:
    best = max(rates, key=lambda name: rates[name])
    rate = rates[best] / 1e12
    said = "met" if rate >= shape.goal else "MISSED"
    print(f"    best: {best}, {100 * rates[best] / limit:.0f} % of the product; goal {shape.goal:.0f} TFLOP/s: {said}")
    if "grouped_mm" in rates and shape.width < 2048:
        over = rates[best] / rates["grouped_mm"]
        print(f"    over plain grouped_mm {over:.2f} x, goal {GOAL_OF_PLAIN} x: {_said(over, GOAL_OF_PLAIN)}")


def _said(value: float, goal: float) -> str:
    return "met" if value >= goal else "MISSED"


def experts_of(shape: Shape, *, device: str) -> Any:
    """A stock module of experts with random weights in bfloat16."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    names = {"hidden_size": shape.hidden, "intermediate_size": shape.width, "num_local_experts": shape.experts}
    with torch.device(device):
        module = MixtralExperts(SimpleNamespace(**names, hidden_act="silu", _experts_implementation="eager"))
    module = module.to(torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=shape.hidden**-0.5)
    return module


def _pass(
    module: Any, forward: Callable[..., torch.Tensor], shape: Shape, tokens: int, routing: str, seed: int
) -> Callable[[], None]:
    """Forward and backward on data of its own."""
    device = module.down_proj.device
    draw = torch.Generator(device).manual_seed(seed)
    x_TD, slopes_TD = (
        torch.randn(tokens, shape.hidden, generator=draw, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    weights_TK = torch.rand(tokens, shape.top_k, generator=draw, device=device).requires_grad_()
    x_TD.requires_grad_()
    if routing == "balanced":
        index_TK = balanced(tokens, shape.experts, shape.top_k).to(device)
    else:
        rows_ED = torch.randn(shape.experts, shape.hidden, generator=draw, device=device, dtype=torch.bfloat16)
        index_TK = (x_TD.detach() @ rows_ED.t()).topk(shape.top_k).indices

    def work() -> None:
        for leaf in (x_TD, weights_TK, *module.parameters()):
            leaf.grad = None
        forward(module, x_TD, index_TK, weights_TK).backward(slopes_TD)

    return work


def train(*, steps: int, models: Sequence[str], layers: int) -> None:
    """P16: `prismoe pretrain` on random tokens, weights drawn, one device; the median step is what counts."""
    import json

    from transformers.utils import logging as transformers_logging

    from benchmarks.train import domain_folder
    from prismoe.train.pretrain import PretrainConfig, pretrain

    transformers_logging.set_verbosity_error()
    peak = peak_flops(torch.cuda.get_device_name())
    shares: dict[str, float] = {}
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            config = config_of(model, layers=layers)
            config.save_pretrained(folder / "model")
            domain = domain_folder(folder / "random", config.vocab_size)
            settings = PretrainConfig(
                steps=steps,
                warmup_steps=1,
                seq_len=4096,
                batch_size=4,
                micro_batch_size=1,
                init="random",
                precision="bf16",
                recompute=True,
                eval_tokens=4096,
                max_epochs=1e6,
            )
            pretrain(folder / "model", settings, domains=[domain], out=folder / "out")
            lines = [json.loads(line) for line in (folder / "out" / "timing.jsonl").read_text().splitlines()]
        rate = statistics.median(line["tokens_per_second_device"] for line in lines[len(lines) // 3 :])
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            flops = flops_per_token(AutoModelForCausalLM.from_config(config), seq_len=4096)
        shown = f"LLaMA-2-7B {model}, {layers} layers: {rate:.0f} tokens/s"
        if peak is not None:
            shares[model] = mfu(rate, flops, peak)
            shown += f", MFU {100 * shares[model]:.1f} %"
            if model in ("4/16", "2/16"):
                shown += f" (goal {100 * GOAL_MFU:.0f} %: {_said(shares[model], GOAL_MFU)})"
        print(shown, flush=True)
    if "dense" in shares:
        for model in shares.keys() - {"dense"}:
            over = shares[model] / shares["dense"]
            print(
                f"  {model} of the dense parent's MFU: {over:.2f}, goal {GOAL_OF_DENSE}: {_said(over, GOAL_OF_DENSE)}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["layer", "train"])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B shape; fewer fit a smaller device")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["dense", "4/16", "2/16"])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        return 4
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{torch.cuda.get_device_name()}; {versions}; CUDA {torch.version.cuda}; load {os.getloadavg()[0]:.1f}")
    if given.only != "train":
        layer(tokens=given.tokens)
    if given.only != "layer":
        train(steps=given.steps, models=given.models, layers=given.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
