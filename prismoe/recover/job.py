"""One recovery, decided and checked before the first layer: mixture, dense parent, text, K, memory and disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.calibrate.text import Text, draw_text
from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import PLAN
from prismoe.data.shards import Domain
from prismoe.errors import InputError, UsageError
from prismoe.folder import MANIFEST, Manifest, bytes_there, sha256_file, versions
from prismoe.plan import Plan
from prismoe.recover.block import layer_keys
from prismoe.recover.settings import RecoverConfig
from prismoe.room import require_room
from prismoe.target import Target
from prismoe.targets import find_target
from prismoe.train.fit import check_fit, num_experts

__all__ = ["KIND", "Job", "prepare"]

KIND = "recover"
LONGEST = 2048  # ids of a window where the config leaves it to us
HELD_SHARE, HELD_MOST = 8, 8192  # an eighth of the text is kept back to measure on, and not more tokens than that
LR_WIDTH = 0.6
"""Learning rate times hidden size: AdamW's best rate for a matrix goes with one over its inputs (Yang et al. 2022,
arXiv 2203.03466); 3e-3 was best of those tried at 192."""
BASE_BYTES = 600 << 20  # interpreter, torch, transformers
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k")
"""Under these names a stock config says how many experts a token has."""
_NOT_IN_THE_RESULT = ("threads",)


@dataclass(frozen=True, eq=False)
class Job:
    """`layers` are those with experts, `top_k` the K of the folder and `learning_k` the one to learn with.

    `rows` are the numbers n·T + t of the tokens to learn from and of those kept back. Sizes in bytes, at most.
    """

    moe: Checkpoint
    dense: Checkpoint
    plan: Plan | None
    target: Target
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    learning_k: int
    text: Text
    config: RecoverConfig
    memory_bytes: int
    disk_bytes: int

    @property
    def by_layer(self) -> bool:
        """Whether the architecture can hold a K for each layer."""
        return bool(self.target.top_k_by_layer)

    @property
    def residual(self) -> float | None:
        """The factor with which a layer adds its FFN's output to the stream; None where it is normed first."""
        family = self.dense.family
        return None if family.block == "post-norm" else float(family.multipliers.get("residual_multiplier", 1.0))

    @property
    def rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        length, held = self.text.seq_len, _held(self.text)
        split = (len(self.text) - held) * length
        return np.arange(split), np.arange(split, len(self.text) * length)

    @property
    def parents(self) -> dict[str, str]:
        texts = {f"domain {domain.name}": sha256_file(domain.folder / MANIFEST) for domain in self.text.domains}
        return {"source": self.dense.fingerprint, "mixture": self.moe.fingerprint, **texts}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: value for name, value in asdict(self.config).items() if name not in _NOT_IN_THE_RESULT}

    @property
    def key(self) -> str:
        weights = np.bincount(self.text.domain_ids).tolist()
        parts = ["recover", self.parents, self.settings, weights, versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _held(text: Text) -> int:
    return max(1, min(len(text) // HELD_SHARE, HELD_MOST // text.seq_len))


def prepare(
    dense: Checkpoint,
    moe: Checkpoint,
    config: RecoverConfig,
    *,
    domains: Iterable[Domain],
    weights: Mapping[str, float] | str,
    out: Path,
    force: bool,
) -> Job:
    """Everything that can be wrong, told before anything is computed; see `recover` for what is raised."""
    for checkpoint in (dense, moe):
        if not checkpoint.has_weights:
            raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
    experts = num_experts(moe.config)
    if not experts:
        hint = "prismoe convert"
        raise InputError("no router in it: a dense model", where=str(moe.folder), needed="a mixture", hint=hint)
    target = find_target(str(moe.config.get("model_type")))
    plan = _check_parent(moe, dense)
    opened = tuple(domains)
    config = _fit(config, dense)
    check_fit(dense, opened, seq_len=config.seq_len)
    text = draw_text(
        opened,
        weights=weights,
        seq_len=config.seq_len,
        max_tokens=config.tokens,
        sample_tokens=0,
        start_token=False,
        seed=config.seed,
    )
    if len(text) < 2:
        raise UsageError(
            f"{len(text)} window of {config.seq_len} tokens",
            where="recover.tokens",
            needed="two: one to learn from and one to measure on",
            hint="more tokens, or a shorter seq_len",
        )
    layers = tuple(n for n in range(dense.family.num_layers) if target.router.format(l=n) in moe.tensors)
    top_k = _top_k(moe, experts)
    learning_k = top_k
    if config.budget is not None:
        if config.budget > experts:
            raise UsageError(f"{config.budget:g}", where="recover.budget", needed=f"at most {experts}, the experts")
        learning_k = int(config.budget + (0.5 if target.top_k_by_layer else 0))
    _check_learns(moe, learning_k)
    job = Job(moe, dense, plan, target, layers, experts, top_k, learning_k, text, config, 0, 0)
    memory_bytes, disk_bytes = _needs(job)
    hint = "fewer tokens, or choose --out; for memory, a smaller batch_size or batch_tokens"
    on_cpu = config.device == "cpu"
    if (there := bytes_there(out, kind=KIND, key=job.key, force=force)) is not None:
        memory = memory_bytes if on_cpu else BASE_BYTES
        require_room(out, disk_bytes=disk_bytes - there, memory_bytes=memory, hint=hint)
    return replace(job, memory_bytes=memory_bytes, disk_bytes=disk_bytes)


def _fit(config: RecoverConfig, dense: Checkpoint) -> RecoverConfig:
    """The settings with what they leave to the model and the machine."""
    import torch

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"no {device} here", where="recover.device", needed="auto or cpu")
    seq_len = config.seq_len or min(LONGEST, dense.family.max_positions)
    if seq_len < 2:
        raise UsageError(f"{seq_len}", where="recover.seq_len", needed="at least 2")
    lr = config.lr or LR_WIDTH / dense.family.hidden_size
    return replace(config, device=device, seq_len=seq_len, lr=lr)


def _check_parent(moe: Checkpoint, dense: Checkpoint) -> Plan | None:
    """That the mixture was made of this dense model; its plan, where it has one."""
    path = moe.folder / PLAN
    plan = Plan.load(path) if path.is_file() else None
    manifest = Manifest.ours(moe.folder)
    made_of = manifest.parents.get("source", "") if manifest is not None and manifest.kind == "convert" else ""
    if plan is not None:
        made_of = made_of or plan.origin.source
        if plan.branches:
            found = f"experts of {len(plan.branches)} checkpoints beside the source"
            raise InputError(found, where=str(moe.folder), needed="one dense FFN to learn from")
    if not made_of or not dense.is_source_of(made_of):
        found = f"was made of another checkpoint ({made_of[:12]}…)" if made_of else "does not say what it was made of"
        raise InputError(
            found,
            where=str(moe.folder),
            needed=f"a mixture of {dense.folder} ({dense.fingerprint[:12]}…)",
            hint="prismoe convert writes one",
        )
    return plan


def _top_k(moe: Checkpoint, experts: int) -> int:
    where = str(moe.folder / "config.json")
    found = {name: moe.config[name] for name in TOP_K if moe.config.get(name) is not None}
    for name, value in found.items():
        if type(value) is not int or not 1 <= value <= experts:
            raise InputError(f"{value!r}", where=f"{where}: {name}", needed=f"one number, 1 to {experts}")
    if not found:
        raise InputError("no number of experts a token", where=where, needed=" or ".join(TOP_K))
    return int(max(found.values()))


def _check_learns(moe: Checkpoint, top_k: int) -> None:
    """That routers with this K have a gradient.

    Raises:
        UsageError: they have none.
    """
    from prismoe.train.model import empty_model
    from prismoe.train.routers import attach_policy
    from prismoe.train.routing import watch

    with watch(empty_model(moe.config, where=str(moe.folder))) as routers:
        for router in routers:
            router.top_k = top_k
        attach_policy("switch", routers, arguments={"coefficient": 0.0})


def _needs(job: Job) -> tuple[int, int]:
    """Memory (the device's and the host's together) and disk, at most, from shapes alone."""
    config, family = job.config, job.dense.family
    d, f, size = family.hidden_size, family.intermediate_size, 2 if config.precision == "bf16" else 4
    tensors = job.moe.tensors

    def numbers(names: Iterable[str]) -> int:
        return sum(int(np.prod(tensors[name].shape)) for name in names if name in tensors)

    def own(layer: int) -> list[str]:
        return [name for name in tensors if name.startswith(f"model.layers.{layer}.")]

    learned = {
        layer: layer_keys(job.target, layer, num_experts=job.num_experts, train=config.train) for layer in job.layers
    }
    widest = max(job.layers, key=lambda layer: numbers(own(layer)))
    dense_layer = 3 * d * f + 2 * d * family.head_dim * (family.num_heads + family.num_kv_heads)
    ends = family.vocab_size * d * (1 if family.tie_embeddings else 2)
    passing = config.batch_size * config.seq_len * (6 * f + 12 * d)
    learning = max(config.batch_tokens, 1024) * job.num_experts * (4 * f // job.num_experts + 4 * d)
    memory = BASE_BYTES + size * (ends + dense_layer + passing) + 4 * (numbers(own(widest)) + learning)
    memory += 16 * numbers(learned[widest])  # gradient, two moments, and the bytes of the layer's file
    # What enters and leaves an FFN; of each stream what enters and leaves a layer, and what a stop would go back to.
    streams = 2 if config.inputs == "mixture" else 1
    waiting = 2 + streams * (3 if len(job.layers) < family.num_layers else 2)
    states = waiting * job.text.num_tokens * d * size
    files = sum(tensors[name].nbytes for keys in learned.values() for name in keys if name in tensors)
    written = sum(info.nbytes for info in tensors.values())
    return memory, states + files + written + (1 << 20)
