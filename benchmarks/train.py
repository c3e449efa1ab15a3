"""P14 and P17: a training step on one CPU thread beside the stock one, and what the training loop costs.

    python benchmarks/train.py                   # everything; some minutes
    python benchmarks/train.py --only step       # P14
    python benchmarks/train.py --only loop       # over forward, backward and AdamW alone, and the wait for data
    python benchmarks/train.py --only save       # how long training stands still for a checkpoint
    python benchmarks/train.py --only head       # memory and time of the loss, whole and in parts
    python benchmarks/train.py --only runtime    # P17

CPU seconds of this process, the least of the repetitions, which go round all sides in turn. "stock" is transformers
and torch as they come; "ours" is `experts: sorted` with `fast_matmul` and `keep_memory`. (P10 to P13: experts.py.)
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
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import copying, domain_folder, dtype_name, stock, tuned, verdict
from prismoe.doctor import doctor
from prismoe.train.experts import use_experts
from prismoe.train.runtime import levers


def mixtral(size: str) -> Any:
    """A config: 24 M parameters with a vocabulary of 32,000, or what a model of stories has."""
    from transformers import MixtralConfig

    sizes: dict[str, Any] = {"hidden_size": 288, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 32000}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_local_experts": 8, "num_experts_per_tok": 2}
    if size == "stories":
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 2048}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralConfig(**sizes, **heads, max_position_embeddings=512, tie_word_embeddings=False, sliding_window=None)


def step(times: int) -> None:
    """P14: some steps of the 24 M model, stock and ours side by side from the same weights on the same batches."""
    from transformers import MixtralForCausalLM

    from prismoe.train.head import text_loss
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
        for _ in range(times):
            ids_BT = _chained(chain, 8, 256, draw)
            for side, model, settings in (("stock", theirs, stock), ("ours", ours, tuned)):
                with settings():
                    begin = time.process_time()
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        if side == "stock":
                            loss = model(input_ids=ids_BT, labels=ids_BT).loss
                        else:  # as the trainer does it: here for 512 tokens at a time
                            loss, _ = text_loss(model, ids_BT, ids_BT, num_tokens=8 * 255)
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
        print(f"{dtype_name(dtype)} training step, 24 M parameters, 8 x 256 tokens (load {os.getloadavg()[0]:.1f}):")
        for side, seconds in spent.items():
            ms = 1e3 * min(seconds)
            print(f"  {side}: {ms:.0f} ms, of it AdamW {1e3 * min(updates[side]):.1f}; {tokens[side]:.0f} tokens/s")
        print(f"  {verdict(ratio, 1.6)}; loss after {times} steps apart by {apart:.1e} (goal 1e-4 in fp32)")
        moved = 28 * sum(parameter.numel() for parameter in ours.parameters()) / min(updates["ours"])
        copy = copying()
        print(f"  AdamW moves {moved / 1e9:.1f} GB/s: {verdict(moved / copy, 0.8, unit='%')} of copying", flush=True)


def _chained(chain: torch.Tensor, rows: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """Something to learn: every id has four successors."""
    ids = [torch.randint(0, len(chain), (rows,), generator=draw)]
    while len(ids) < length:
        ids.append(chain[ids[-1], torch.randint(0, 4, (rows,), generator=draw)])
    return torch.stack(ids, dim=1)


def loop(times: int) -> None:
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
    from prismoe.train.head import token_losses
    from prismoe.train.health import Health
    from prismoe.train.metrics import MetricsLog
    from prismoe.train.routers import attach_policy
    from prismoe.train.routing import watch
    from prismoe.train.settings import PretrainConfig
    from prismoe.train.speed import Timing, flops_per_token
    from prismoe.train.trainer import Trainer
    from prismoe.train.updates import adamw

    use_experts(model)
    domains = [Domain.open(domain_folder(folder / part, model.config.vocab_size)) for part in ("first", "second")]
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


def save(times: int) -> None:
    """A checkpoint of the 24 M model: until it is whole, and until training goes on. Wall time, the least and most."""
    from transformers import MixtralForCausalLM

    from prismoe.train import checkpoints
    from prismoe.train.engine import Engine
    from prismoe.train.engine.layout import Layout
    from prismoe.train.routers import Policy
    from prismoe.train.saving import Saver
    from prismoe.train.settings import PretrainConfig
    from prismoe.train.updates import adamw

    model = MixtralForCausalLM(mixtral("24M"))
    optimizer = adamw(model.parameters(), PretrainConfig())
    found: dict[str, list[float]] = {"written": [], "copied": []}
    with tempfile.TemporaryDirectory() as folder, Engine.start(Layout(), device="cpu") as engine:
        tensors = checkpoints.tensors_of(model, Policy([]), optimizer)
        saver = Saver(Path(folder) / "beside", keep=1, engine=engine)
        for number in range(min(times, 8)):
            begin = time.perf_counter()
            checkpoints.save(Path(folder) / "waiting", step=number, engine=engine, tensors=tensors, state={})
            checkpoints.prune(Path(folder) / "waiting", keep=1)
            found["written"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            saver.save(tensors, step=number, state={})
            found["copied"].append(time.perf_counter() - begin)
            saver.wait()
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"a checkpoint of {size / 1e6:.0f} MB (load {os.getloadavg()[0]:.1f}):", end=" ")
    shown = (f"{side} after {1e3 * min(each):.0f} - {1e3 * max(each):.0f} ms" for side, each in found.items())
    print(", ".join(shown), f"; {min(found['written']) / min(found['copied']):.1f} x", flush=True)


HEAD = """
import re, sys, time
from pathlib import Path
import torch
from prismoe.train import logits
from prismoe.train.head import head_factor, text_loss
from prismoe.train.runtime import runtime
from transformers import LlamaConfig, LlamaForCausalLM
vocab, hidden, tokens, largest = map(int, sys.argv[1:])
logits.LARGEST = largest
sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": vocab}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False))
ids = torch.randint(0, vocab, (8, tokens // 8))
head_factor(model)
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
with runtime(fast_matmul=True):
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = most(), time.process_time()
    text_loss(model, ids, ids, num_tokens=tokens)[0].backward()
    print((most() - before) / 1e3, time.process_time() - begin)
"""


def head(_: int) -> None:
    """One pass of a model that is all output matrix, each in a process of its own: most memory beyond the weights."""
    for vocab, hidden in ((32_000, 512), (128_256, 512)):
        found = {}
        for side, largest in (("whole", 1 << 40), ("in parts", 1 << 25)):
            command = [sys.executable, "-c", HEAD, str(vocab), str(hidden), "2048", str(largest)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found[side] = tuple(map(float, said))
        shown = ", ".join(f"{side} {memory:.0f} MB and {1e3 * s:.0f} ms" for side, (memory, s) in found.items())
        print(f"loss of 2048 tokens, {vocab} words of {hidden} (load {os.getloadavg()[0]:.1f}): {shown}", flush=True)


UNTOUCHED = """
import torch
before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
import prismoe.cli, prismoe.train.pretrain, prismoe.train.loop, prismoe.train.runtime, prismoe.train.experts
after = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
assert before == after, (before, after)
"""


def check_runtime(_: int) -> None:
    """P17: importing changes nothing; what is set on request is said, checked and put back."""
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], check=False)
    print(f"importing changes no setting of torch: {'met' if done.returncode == 0 else 'MISSED'}")
    before = torch.get_float32_matmul_precision()
    for lever in levers():
        print(f"  {lever}")
    with tuned() as found:
        print(f"  set on request: {found}")
    print(f"put back: {'met' if torch.get_float32_matmul_precision() == before else 'MISSED'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[int], None]] = {
        "runtime": check_runtime,
        "step": step,
        "loop": loop,
        "save": save,
        "head": head,
    }
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--times", type=int, default=20, help="steps of each side")
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{doctor().sections['system']['cpu']}; {versions}; load {os.getloadavg()[0]:.1f}")
    for name, part in parts.items():
        if given.only in (None, name):
            part(given.times)


if __name__ == "__main__":
    main()
