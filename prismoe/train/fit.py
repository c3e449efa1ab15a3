"""Whether a model, prepared domains and the machine fit together: checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain
from prismoe.errors import InputError, UsageError
from prismoe.folder import sha256_file
from prismoe.room import require_room
from prismoe.train.engine.layout import Layout, launched
from prismoe.train.logits import logit_bytes
from prismoe.train.settings import PretrainConfig

__all__ = ["EXPERT_COUNTS", "check_fit", "check_room", "check_teacher", "num_experts"]

# Under one of these names a stock config says how many routed experts a layer has.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def check_fit(checkpoint: Checkpoint, domains: Iterable[Domain], *, seq_len: int) -> None:
    """Sequences fit into the model's positions, ids into its vocabulary, and the tokenizer is the model's own.

    Raises:
        InputError: one of these does not hold, naming the folder that has to change.
    """
    vocab_size, positions = checkpoint.config.get("vocab_size"), checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and seq_len > positions:
        raise InputError(
            f"{positions} positions", where=str(checkpoint.folder / "config.json"), needed=f"seq_len {seq_len} or more"
        )
    tokenizer = checkpoint.folder / "tokenizer.json"
    expected = sha256_file(tokenizer) if tokenizer.is_file() else None
    for domain in domains:
        if isinstance(vocab_size, int) and domain.vocab_size > vocab_size:
            raise InputError(
                f"ids up to {domain.vocab_size - 1}", where=str(domain.folder), needed=f"below vocab_size {vocab_size}"
            )
        if expected not in (None, domain.tokenizer_sha256):
            raise InputError(
                "prepared with another tokenizer than the model's",
                where=str(domain.folder),
                needed=f"that of {checkpoint.folder}",
                hint="prepare it again with the tokenizer of the model",
            )


def check_teacher(
    teacher: Checkpoint,
    model: Mapping[str, Any],
    *,
    config: PretrainConfig,
    tokenizer_sha256: str | None = None,
) -> None:
    """Whether `teacher` can say something of what a `model` (its stock config) reads, in the same words.

    Args:
        tokenizer_sha256: of the tokenizer of the text, where it is known.

    Raises:
        InputError, UsageError: no weights, another vocabulary or tokenizer, too few positions, too large a top.
    """
    own, written = teacher.folder / "tokenizer.json", str(teacher.folder / "config.json")
    if not teacher.has_weights:
        raise InputError("no weights", where=str(teacher.folder), needed="those of a teacher")
    found, vocab_size = teacher.config.get("vocab_size"), model.get("vocab_size")
    if found != vocab_size:
        raise InputError(f"a teacher's vocabulary of {found}", where=written, needed=f"{vocab_size}, the model's")
    positions = teacher.config.get("max_position_embeddings")
    if isinstance(positions, int) and config.seq_len > positions:
        raise InputError(f"a teacher's {positions} positions", where=written, needed=f"seq_len {config.seq_len}")
    if tokenizer_sha256 is not None and own.is_file() and sha256_file(own) != tokenizer_sha256:
        raise InputError("a teacher's other tokenizer", where=str(own), needed="the one of the prepared text")
    if isinstance(vocab_size, int) and config.teacher_top >= vocab_size:
        top, needed = f"{config.teacher_top} of {vocab_size} words", "fewer, or 0 for all"
        raise UsageError(top, where="pretrain.teacher_top", needed=needed)


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer by a model's config.json, 0 for a dense model (one expert is no choice)."""
    found = max(config.get(name) or 0 for name in EXPERT_COUNTS)
    return int(found) if found > 1 else 0


def check_room(
    out: Path,
    config: PretrainConfig,
    layout: Layout,
    model: Mapping[str, Any],
    *,
    num_parameters: int,
    num_taught: int = 0,
    there: int | None,
) -> None:
    """Disk and memory that a run cannot do without; `model` is the stock config.

    Of the disk less what is `there` already; nothing where that is None (see `prismoe.folder.bytes_there`).

    Weights, gradients and two moments in float32, the weights of a teacher (`num_taught`), what the loss takes, and of
    each token what enters each layer; everything else that is kept for the backward pass comes on top.
    Memory is that of one machine, on which all of the processes may be: known only for as many as there are here. It
    is not what a device has. The copy of a save beside training is not in it: without room for that, `Saver` waits.

    Raises:
        ResourceError: there is less, with what there is and what is needed.
    """
    if there is None:
        return
    here = launched()[3]
    tokens = (config.micro_batch_size or config.batch_size // layout.world) * config.seq_len
    checkpoints = config.keep + 1 if config.save_every else 1
    states = 4 * tokens * model.get("hidden_size", 0) * model.get("num_hidden_layers", 0)
    logits = logit_bytes(tokens, model.get("vocab_size", 0), taught=num_taught > 0)
    held = (16 * num_parameters + 4 * num_taught) // layout.shard + logits + states
    require_room(
        out,
        disk_bytes=(12 * checkpoints + 4) * num_parameters + (16 << 20) - there,
        memory_bytes=0 if _on_device(config) else here * held,
        hint="free some space, or a smaller keep",
    )


def _on_device(config: PretrainConfig) -> bool:
    if config.device == "auto":
        import torch

        return bool(torch.cuda.is_available())
    return config.device == "cuda"
