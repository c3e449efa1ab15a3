"""Memory and disk of a calibration, estimated from shapes and compared with what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prismoe.calibrate.settings import CalibrateConfig
from prismoe.calibrate.text import Text
from prismoe.checkpoint.family import DenseConfig
from prismoe.room import require_room

__all__ = ["Needs", "check_needs"]

BASE_BYTES = 600 << 20  # interpreter, torch, transformers
HEAD_BYTES = 3 << 27  # logits of one piece, their softmax and gradient


@dataclass(frozen=True)
class Needs:
    """What a job takes at most, in bytes. Memory is the device's and the host's together."""

    memory_bytes: int
    disk_bytes: int


def estimate(dense: DenseConfig, text: Text, config: CalibrateConfig) -> Needs:
    """From shapes alone; activations are counted per token as the stock classes keep them for a backward pass."""
    d, f, size = dense.hidden_size, dense.intermediate_size, 2 if config.precision == "bf16" else 4
    layers = min(config.layers_at_once or dense.num_layers, dense.num_layers)
    heads = (dense.num_heads + 2 * dense.num_kv_heads) * dense.head_dim
    weights = layers * (3 * d * f + d * heads + dense.num_heads * dense.head_dim * d)
    weights += dense.vocab_size * d * (1 if dense.tie_embeddings else 2)
    clusters = len(text.domains) if config.clusters == "domains" else int(config.clusters)
    importance = 4 * f * ("importance" in config.quantities)
    sums = 32 * f + 4 * f * f * ("coactivation" in config.quantities)
    batch = config.batch_size * config.seq_len
    per_token = (6 * f + 8 * d + 3 * heads) * (layers if config.gradient else 1)
    row = {"inputs": 4 * d, "marks": 4 * config.marks_per_token, "scores": 2 * f}
    samples = len(text.samples) * sum(width for name, width in row.items() if name in config.quantities)
    files = dense.num_layers * (samples + sums + clusters * importance)
    windows = -(-dense.num_layers // layers)
    waiting = (windows if config.gradient else 2) * (windows > 1)
    scratch = layers * (samples + sums + len(text) * importance) + waiting * text.num_tokens * d * size
    return Needs(
        # A layer's statistics are in memory once more while its file is written.
        memory_bytes=BASE_BYTES + HEAD_BYTES + weights * size + layers * sums + samples + batch * per_token * size,
        disk_bytes=files + scratch,
    )


def check_needs(dense: DenseConfig, text: Text, config: CalibrateConfig, *, out: Path, there: int | None) -> Needs:
    """The estimate, when it fits beside what is `there` already (see `prismoe.folder.bytes_there`).

    Raises:
        ResourceError: the disk of `out` or (on a CPU) the memory is too small.
    """
    needs = estimate(dense, text, config)
    if there is None:
        return needs
    require_room(
        out,
        disk_bytes=needs.disk_bytes - there,
        memory_bytes=needs.memory_bytes if config.device == "cpu" else BASE_BYTES,
        hint="a smaller batch_size, max_tokens or sample_tokens; for memory, fewer layers_at_once",
    )
    return needs
