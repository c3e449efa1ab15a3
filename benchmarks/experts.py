"""P10 to P13: the experts of a layer, and of one token, on one CPU thread, each beside its peers in the same run.

    python benchmarks/experts.py                  # a few minutes
    python benchmarks/experts.py --large          # with the shapes of a 7B model: 3 GB, a quarter of an hour
    python benchmarks/experts.py --only decode    # P13

CPU seconds of this process, the least of the repetitions, which go round all sides in turn; what a figure is held
against (the best product of two matrices, reading memory) is measured in the same run. "eager" and "grouped_mm" are
transformers with torch as it comes; "ours" is `experts: sorted` with `fast_matmul` and `keep_memory`, "untuned"
without these two.
"""

# Threads are pinned before torch loads.
from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
from collections.abc import Callable
from importlib import metadata
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import best_product, dtype_name, least, stock, tuned, verdict
from prismoe.doctor import doctor
from prismoe.train.experts import sorted_experts
from prismoe.train.runtime import levers

SHAPES = {"n=96": (288, 96, 8, 2), "n=176": (1024, 176, 16, 4), "n=688": (4096, 688, 16, 4)}  # D, W, E, K
CHOICES = 50  # routers choose anew in every step, and what is compiled for one number of rows may not serve the next
TOKENS = {"n=96": (512, 4096), "n=176": (512, 2048, 4096), "n=688": (512, 2048)}


def module_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    hidden, width, experts, _ = shape
    names = {"hidden_size": hidden, "intermediate_size": width, "num_local_experts": experts, "hidden_act": "silu"}
    module = MixtralExperts(SimpleNamespace(**names, _experts_implementation="eager")).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=hidden**-0.5)
    return module


def layer(*, times: int, large: bool) -> None:
    """P10 to P12: forward and backward of the experts of a layer."""
    for dtype in (torch.float32, torch.bfloat16):
        peak = best_product(dtype)
        slow = levers()[0].gain if dtype == torch.float32 else 0.0
        print(f"{dtype_name(dtype)}: best product {peak / 1e9:.0f} GFLOP/s" + (f", {slow:.2f} x MKL's" if slow else ""))
        for name, shape in SHAPES.items():
            if large or name != "n=688":
                for tokens in TOKENS[name]:
                    _layer(name, shape, tokens, dtype, peak=peak, mkl_is_slow=slow >= 1.5, times=times)


def _layer(
    name: str,
    shape: tuple[int, int, int, int],
    tokens: int,
    dtype: torch.dtype,
    *,
    peak: float,
    mkl_is_slow: bool,
    times: int,
) -> None:
    hidden, width, experts, top_k = shape
    torch.manual_seed(0)
    module = module_of(shape, dtype)
    x_TD = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    choices = [torch.rand(tokens, experts).topk(top_k).indices for _ in range(CHOICES)]
    weights_TK = torch.rand(tokens, top_k).requires_grad_()
    slopes_TD = torch.randn(tokens, hidden).to(dtype)
    dense = [torch.randn(*size).mul_(hidden**-0.5).to(dtype).requires_grad_() for size in _dense(hidden, width * top_k)]

    def mixture(implementation: str | None) -> Callable[[], None]:
        turns = cycle(choices)

        def work() -> None:
            index_TK = next(turns)
            for leaf in (x_TD, weights_TK, *module.parameters()):
                leaf.grad = None
            if implementation is None:
                out_TD = sorted_experts(module, x_TD, index_TK, weights_TK)
            else:
                module.config._experts_implementation = implementation
                out_TD = module(x_TD, index_TK, weights_TK)
            out_TD.backward(slopes_TD)

        return work

    def ffn() -> None:
        for leaf in (x_TD, *dense):
            leaf.grad = None
        gate, up = F.linear(x_TD, dense[0]).chunk(2, -1)
        F.linear(F.silu(gate) * up, dense[1]).backward(slopes_TD)

    found = least(
        {
            "eager": (mixture("eager"), stock),
            "grouped_mm": (mixture("grouped_mm"), stock),
            "untuned": (mixture(None), stock),
            "ours": (mixture(None), tuned),
            "dense": (ffn, tuned),
        },
        times,
    )
    share = 18 * tokens * top_k * width * hidden / found["ours"] / peak
    peer = min(found["eager"], found["grouped_mm"]) / found["ours"]
    half = dtype == torch.bfloat16
    if half:
        goal_peer = {"n=96": 1.0, "n=176": 1.25 if tokens >= 2048 else 1.15, "n=688": 1.15}[name]
        goal_share = {"n=96": 0.36 if tokens >= 4096 else 0.25, "n=176": 0.6 if tokens >= 2048 else 0.52, "n=688": 0.8}
    else:
        goal_peer = 1.8 if mkl_is_slow else 1.1
        goal_share = {"n=96": 0.48, "n=176": 0.65, "n=688": 0.83}
    goal_dense = {"n=96": 2.7 if half else 1.85, "n=176": 1.85 if half else 1.45, "n=688": 1.15}[name]
    times_ms = "  ".join(f"{side} {1e3 * seconds:.1f}" for side, seconds in found.items())
    print(f"  {hidden}/{width}/{experts}/{top_k} T={tokens}: ms  {times_ms}  (load {os.getloadavg()[0]:.1f})")
    print(
        f"    of the best peer {verdict(peer, goal_peer)}; of the product {verdict(share, goal_share[name], unit='%')}"
    )
    ratio = found["ours"] / found["dense"]
    print(f"    over the dense FFN of equal activated size {verdict(ratio, goal_dense, at_most=True)}", flush=True)


def _dense(hidden: int, width: int) -> list[tuple[int, int]]:
    return [(2 * width, hidden), (hidden, width)]


def decode(*, times: int, large: bool) -> None:
    """P13: one token, other experts each time."""
    memory = torch.randn(96 << 20)
    read = memory.nbytes / least({"read": (memory.sum, stock)}, times)["read"]
    del memory
    print(f"reading memory: {read / 1e9:.1f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            if name == "n=688" and not large:
                continue
            hidden, width, experts, top_k = shape
            module = module_of(shape, dtype)
            x_TD, weights_TK = torch.randn(1, hidden, dtype=dtype), torch.rand(1, top_k)
            choices = [torch.randperm(experts)[:top_k].sort().values[None] for _ in range(20 if large else 200)]

            def each(forward: Callable[..., Any], module: Any, choices: Any, *given: Any) -> Callable[[], None]:
                @torch.no_grad()
                def work() -> None:
                    for index_TK in choices:
                        forward(module, given[0], index_TK, given[1])

                return work

            def library(module: Any, *given: Any) -> Any:
                return module(*given)

            module.config._experts_implementation = "grouped_mm"
            found = least(
                {
                    "grouped_mm": (each(library, module, choices, x_TD, weights_TK), stock),
                    "ours": (each(sorted_experts, module, choices, x_TD, weights_TK), stock),
                },
                times,
            )
            each_us = {side: 1e6 * seconds / len(choices) for side, seconds in found.items()}
            share = 3 * top_k * width * hidden * dtype.itemsize / (each_us["ours"] / 1e6) / read
            if name == "n=688":
                goal = verdict(share, 0.75 if dtype == torch.bfloat16 else 0.55, unit="%") + " of reading"
            else:
                goal = verdict(each_us["grouped_mm"] / each_us["ours"], 1.5) + " of grouped_mm"
            shown = "  ".join(f"{side} {value:.0f}" for side, value in each_us.items())
            print(f"  {dtype_name(dtype)} {hidden}/{width}/{experts}/{top_k}: us  {shown}  {goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["layer", "decode"])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="the shapes of a 7B model too: 3 GB")
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{doctor().sections['system']['cpu']}; {versions}; load {os.getloadavg()[0]:.1f}")
    if given.only != "decode":
        layer(times=given.times, large=given.large)
    if given.only != "layer":
        decode(times=given.times, large=given.large)


if __name__ == "__main__":
    main()
