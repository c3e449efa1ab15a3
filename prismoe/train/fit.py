"""Whether a model and prepared domains belong together: checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain
from prismoe.errors import InputError
from prismoe.folder import sha256_file

__all__ = ["EXPERT_COUNTS", "check_fit", "num_experts"]

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


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer by a model's config.json, 0 for a dense model (one expert is no choice)."""
    found = max(config.get(name) or 0 for name in EXPERT_COUNTS)
    return int(found) if found > 1 else 0
