"""P10 to P14 and P17: experts, decoding and a training step on one CPU thread, each beside its peers in the same run.

    python benchmarks/train.py                        # everything; a quarter of an hour on a quiet machine
    python benchmarks/train.py --only layer --large   # P10-P12 with the shapes of a 7B model
    python benchmarks/train.py --only decode          # P13
    python benchmarks/train.py --only step            # P14
    python benchmarks/train.py --only loop            # what the training loop costs, and the wait for data
    python benchmarks/train.py --only runtime         # P17

CPU seconds of this process, the least of the repetitions, which go round all sides in turn; what a figure is held
against (the best product of two matrices, reading memory) is measured in the same run. "stock" is transformers with
torch as it comes; "ours" is `experts: sorted` with `fast_matmul` and `keep_memory`, "untuned" without these two.
"""

# Threads are pinned before torch loads.
from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from prismoe.doctor import doctor
from prismoe.train.experts import sorted_experts, use_experts
from prismoe.train.runtime import levers, runtime

SHAPES = {"n=96": (288, 96, 8, 2), "n=176": (1024, 176, 16, 4), "n=688": (4096, 688, 16, 4)}  # D, W, E, K
TOKENS = {"n=96": (512, 4096), "n=176": (512, 2048, 4096), "n=688": (512, 2048)}
Side = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


def stock() -> AbstractContextManager[Any]:
    return runtime()


def tuned() -> AbstractContextManager[Any]:
    return runtime(fast_matmul=True, keep_memory=True)


def least(sides: Mapping[str, Side], times: int) -> dict[str, float]:
    """CPU seconds of each side, the least of `times` rounds; a round runs each twice, the first to settle."""
    best: dict[str, float] = {}
    for _ in range(times):
        for name, (work, settings) in sides.items():
            with settings():
                for turn in range(2):
                    begin = time.process_time()
                    work()
                    spent = time.process_time() - begin
                    if turn:
                        best[name] = min(best.get(name, spent), spent)
    return best


def verdict(value: float, goal: float, *, at_most: bool = False, unit: str = "x") -> str:
    met = value <= goal if at_most else value >= goal
    shown = (f"{100 * value:.0f} %", f"{100 * goal:.0f} %") if unit == "%" else (f"{value:.2f} x", f"{goal:g} x")
    return f"{shown[0]} (goal {'<=' if at_most else '>='} {shown[1]}: {'met' if met else 'MISSED'})"


def best_product(dtype: torch.dtype) -> float:
    """FLOP/s of the best matrix product here."""
    with tuned():
        left, right = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        seconds = least({"product": (lambda: left @ right.t(), tuned)}, 5)["product"]
    return 2 * 1536**3 / seconds


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
        print(f"{_name(dtype)}: best product {peak / 1e9:.0f} GFLOP/s" + (f", {slow:.2f} x MKL's" if slow else ""))
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
    index_TK = torch.rand(tokens, experts).topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k).requires_grad_()
    slopes_TD = torch.randn(tokens, hidden).to(dtype)
    dense = [torch.randn(*size).mul_(hidden**-0.5).to(dtype).requires_grad_() for size in _dense(hidden, width * top_k)]

    def mixture(implementation: str | None) -> Callable[[], None]:
        def work() -> None:
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
            print(f"  {_name(dtype)} {hidden}/{width}/{experts}/{top_k}: us  {shown}  {goal}", flush=True)


def mixtral(size: str) -> Any:
    """A config: 24 M parameters with a vocabulary of 32,000, or what a model of stories has."""
    from transformers import MixtralConfig

    sizes: dict[str, Any] = {"hidden_size": 288, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 32000}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_local_experts": 8, "num_experts_per_tok": 2}
    if size == "stories":
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 2048}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralConfig(**sizes, **heads, max_position_embeddings=512, tie_word_embeddings=False, sliding_window=None)


def step(*, times: int) -> None:
    """P14: 20 steps of the 24 M model, stock and ours side by side from the same weights on the same batches."""
    from transformers import MixtralForCausalLM

    from prismoe.train.scoring import token_losses
    from prismoe.train.settings import PretrainConfig
    from prismoe.train.updates import adamw

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        theirs = MixtralForCausalLM(mixtral("24M"))
        ours = MixtralForCausalLM(mixtral("24M"))
        ours.load_state_dict(theirs.state_dict())
        use_experts(ours)
        config = PretrainConfig(lr=3e-4, weight_decay=0.01)
        optimizers = {
            "stock": torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=config.betas),
            "ours": adamw(ours.parameters(), config),
        }
        spent: dict[str, list[float]] = {"stock": [], "ours": []}
        losses: dict[str, list[float]] = {"stock": [], "ours": []}
        updates: dict[str, list[float]] = {"stock": [], "ours": []}
        draw = torch.Generator().manual_seed(1)
        chain = torch.randint(0, 32000, (32000, 4), generator=draw)
        for _ in range(20):
            ids_BT = _chained(chain, 8, 256, draw)
            for side, model, settings in (("stock", theirs, stock), ("ours", ours, tuned)):
                with settings():
                    begin = time.process_time()
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        if side == "stock":
                            loss = model(input_ids=ids_BT, labels=ids_BT).loss
                        else:
                            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                            loss = token_losses(logits_BTV, ids_BT).mean()
                            del logits_BTV
                    loss.backward()
                    before = time.process_time()
                    optimizers[side].step()
                    updates[side].append(time.process_time() - before)
                    optimizers[side].zero_grad(set_to_none=True)
                    spent[side].append(time.process_time() - begin)
                    losses[side].append(loss.item())
                    del loss
        ratio = min(spent["stock"]) / min(spent["ours"])
        apart = abs(losses["stock"][-1] - losses["ours"][-1]) / losses["stock"][-1]
        tokens = {side: 2048 / min(seconds) for side, seconds in spent.items()}
        print(f"{_name(dtype)} training step, 24 M parameters, 8 x 256 tokens (load {os.getloadavg()[0]:.1f}):")
        for side, seconds in spent.items():
            ms = 1e3 * min(seconds)
            print(f"  {side}: {ms:.0f} ms, of it AdamW {1e3 * min(updates[side]):.1f}; {tokens[side]:.0f} tokens/s")
        print(f"  {verdict(ratio, 1.6)}; loss after 20 steps apart by {apart:.1e} (goal 1e-4 in fp32)")
        moved = 28 * sum(parameter.numel() for parameter in ours.parameters()) / min(updates["ours"])
        copy = _copying()
        print(f"  AdamW moves {moved / 1e9:.1f} GB/s: {verdict(moved / copy, 0.8, unit='%')} of copying", flush=True)


def _copying() -> float:
    """Bytes read and written in a second by a large copy."""
    source, target = torch.randn(24 << 20), torch.randn(24 << 20)
    return 2 * source.nbytes / least({"copy": (lambda: target.copy_(source), stock)}, 5)["copy"]


def _chained(chain: torch.Tensor, rows: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """Something to learn: every id has four successors."""
    ids = [torch.randint(0, len(chain), (rows,), generator=draw)]
    while len(ids) < length:
        ids.append(chain[ids[-1], torch.randint(0, 4, (rows,), generator=draw)])
    return torch.stack(ids, dim=1)


def loop(*, times: int) -> None:
    """The trainer's step and its log against forward, backward and AdamW alone on the same batch."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

    for size, rows, length in (("stories", 16, 256), ("24M", 8, 256)):
        for kind in ("dense", "mixture"):
            torch.manual_seed(0)
            settings = mixtral(size)
            if kind == "mixture":
                model = MixtralForCausalLM(settings)
            else:
                settings.intermediate_size *= settings.num_experts_per_tok
                names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
                wanted = {name: getattr(settings, name) for name in (*names, "num_key_value_heads")}
                model = LlamaForCausalLM(LlamaConfig(**wanted, max_position_embeddings=512))
            with tempfile.TemporaryDirectory() as folder, tuned():
                _loop(f"{size}, {kind}", model.train(), Path(folder), rows=rows, length=length, times=times)


def _loop(name: str, model: Any, folder: Path, *, rows: int, length: int, times: int) -> None:
    from prismoe.data.mixture import Mixture
    from prismoe.data.shards import Domain
    from prismoe.train.engine import Engine
    from prismoe.train.engine.layout import Layout
    from prismoe.train.health import Health
    from prismoe.train.metrics import MetricsLog
    from prismoe.train.routers import attach_policy
    from prismoe.train.routing import watch
    from prismoe.train.scoring import token_losses
    from prismoe.train.settings import PretrainConfig
    from prismoe.train.speed import Timing, flops_per_token
    from prismoe.train.trainer import Trainer
    from prismoe.train.updates import adamw

    use_experts(model)
    domains = [Domain.open(_domain(folder / part, model.config.vocab_size)) for part in ("first", "second")]
    mixture = Mixture(domains, weights="uniform", seq_len=length, batch_size=rows, max_epochs=float("inf"))
    config = PretrainConfig(seq_len=length, batch_size=rows)
    bare_optimizer = adamw(model.parameters(), config)
    batch = mixture.batch(0)
    ids_BT, labels_BT = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)

    def bare() -> None:
        token_losses(model(input_ids=ids_BT, use_cache=False).logits, labels_BT).mean().backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad(set_to_none=True)

    with ExitStack() as stack:
        engine = stack.enter_context(Engine.start(Layout(), device="cpu"))
        routers = stack.enter_context(watch(model))
        policy = attach_policy("switch", routers, arguments={}, all_reduce=engine.sum_with_gradient)
        health = Health(spike=0.0, limit=3, rollbacks=2)
        optimizer = adamw(model.parameters(), config)
        trainer = Trainer(model, config, mixture, routers, policy, optimizer, engine, health)
        log = MetricsLog(folder / "metrics.jsonl", position=0, muted=False)
        flops = flops_per_token(model, seq_len=length)
        timing = Timing(folder / "timing.jsonl", flops=flops, world=1, device=engine.device, muted=False)
        waited: list[float] = []
        read = trainer._batches

        def watched(number: int) -> Any:
            begin = time.process_time()
            found = read(number)
            waited.append(time.process_time() - begin)
            return found

        trainer._batches = watched  # type: ignore[method-assign]
        numbers = iter(range(10**6))

        def whole() -> None:
            number = next(numbers)
            timing.begin()
            line = trainer.step(number)
            timing.step(number + 1, line["tokens"])
            log.write(line)

        best: dict[str, float] = {}
        for turn in range(times + 2):
            for side, work in (("bare", bare), ("loop", whole)):
                begin = time.process_time()
                work()
                spent = time.process_time() - begin
                if turn >= 2:
                    best[side] = min(best.get(side, spent), spent)
        log.close()
        timing.close()
        policy.detach()
    over, wait = best["loop"] / best["bare"] - 1, min(waited) / best["loop"]
    shown = "  ".join(f"{side} {1e3 * seconds:.1f}" for side, seconds in best.items())
    print(f"{name}, {rows} x {length}: ms  {shown}  (load {os.getloadavg()[0]:.1f})")
    print(f"  overhead {100 * over:.1f} % (goal <= 3 %: {'met' if over <= 0.03 else 'MISSED'});", end=" ")
    print(f"data wait {100 * wait:.2f} % (goal <= 2 %: {'met' if wait <= 0.02 else 'MISSED'})", flush=True)


def _domain(folder: Path, vocab_size: int) -> Path:
    import numpy as np

    from prismoe.folder import Manifest, hash_files

    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(3, vocab_size, 1 << 20).astype("<u2")
    splits = {}
    for split, ids in (("train", tokens), ("heldout", tokens[:1024])):
        ids.tofile(folder / f"{split}.tokens")
        np.array([[len(ids), len(ids)]], "<i8").tofile(folder / f"{split}.ends")
        splits[split] = {"num_tokens": len(ids), "num_documents": 1, "num_bytes": len(ids), "num_unknown": 0}
    config = {
        **{"name": folder.name, "vocab_size": vocab_size, "start_token": None, "end_token": 2},
        **{"tokenizer_sha256": "none", "splits": splits},
        "shards": {split: [{"name": split, "counts": counts}] for split, counts in splits.items()},
    }
    files = hash_files(folder, [f"{split}.{part}" for split in splits for part in ("tokens", "ends")])
    Manifest(kind="domain", parents={}, config=config, files=files).write(folder)
    return folder


UNTOUCHED = """
import torch
before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
import prismoe.cli, prismoe.train.pretrain, prismoe.train.loop, prismoe.train.runtime, prismoe.train.experts
after = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
assert before == after, (before, after)
"""


def check_runtime(**_: Any) -> None:
    """P17: importing changes nothing; what is set on request is said, checked and put back."""
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], check=False)
    print(f"importing changes no setting of torch: {'met' if done.returncode == 0 else 'MISSED'}")
    before = torch.get_float32_matmul_precision()
    for lever in levers():
        print(f"  {lever}")
    with tuned() as found:
        print(f"  set on request: {found}")
    print(f"put back: {'met' if torch.get_float32_matmul_precision() == before else 'MISSED'}", flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[..., None]] = {
        "runtime": check_runtime,
        "layer": layer,
        "decode": decode,
        "step": step,
        "loop": loop,
    }
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="the shapes of a 7B model too: 3 GB, several minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{doctor().sections['system']['cpu']}; {versions}; load {os.getloadavg()[0]:.1f}")
    for name, part in parts.items():
        if given.only in (None, name):
            part(times=given.times, **({"large": given.large} if name in ("layer", "decode") else {}))


if __name__ == "__main__":
    main()
