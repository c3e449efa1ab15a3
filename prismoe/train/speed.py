"""How fast a run is: model FLOPs of a token, the peak of the device, and the share of it that was used (MFU).

FLOPs of a token in training, forward and backward: 6 · (weights of matrix products that the token passes through)
+ 6 · layers · heads · head size · sequence length. The first term counts a router, the shared expert, K of E routed
experts and the output matrix, and no embedding that is only looked up; the second is QKᵀ and its product with V,
halved because attention is causal. Recomputed activations are not counted: MFU is of what the model needs. (Counting
all E experts, or attention without the half, gave published figures 1.9 to 2.3 times too high.)

The peak is the data sheet's for a device of the table. A CPU has none worth the name: there it is what a product of two
matrices was measured to reach in the same process (`device.product_rate`), so MFU is the share of that.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prismoe.errors import UsageError
from prismoe.room import unwritten

__all__ = ["PEAK_TFLOPS", "TIMING", "Timing", "experts_per_token", "flops_per_token", "hardware_peak", "peak_flops"]

TIMING = "timing.jsonl"

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "MI300X": 1307.0,
    "MI250X": 383.0,
}
"""bfloat16 matrix products without sparsity, by the makers' data sheets, in 10¹² a second."""


def peak_flops(name: str) -> float | None:
    """Peak of the device called `name` (as torch or a config says it); None when it is not in the table."""
    found = [known for known in PEAK_TFLOPS if known.lower() in name.lower()]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def hardware_peak(name: str) -> float:
    """`peak_flops` of a name in a config.

    Raises:
        UsageError: it is not in the table.
    """
    peak = peak_flops(name)
    if peak is None:
        raise UsageError(name, where="pretrain.hardware", needed="one of " + ", ".join(PEAK_TFLOPS))
    return peak


def experts_per_token(config: Any) -> tuple[int, float]:
    """Experts that a stock config sends a token to: at most, and on average over layers that may differ; 0 if dense."""
    found = getattr(config, "num_experts_per_tok", 0) or 0
    each = found if isinstance(found, list) else [found]
    return max(each), sum(each) / len(each)


def flops_per_token(model: Any, *, seq_len: int, top_k: float | None = None) -> float:
    """Model FLOPs of one token of training, see above. `model` may be on the meta device or sharded; `top_k` is how
    many experts a token is sent to where that is not what its config says."""
    config = model.config
    if top_k is None:
        _, top_k = experts_per_token(config)
    embedding = model.get_input_embeddings().weight
    products = 0.0
    for parameter in model.parameters():
        if parameter.ndim == 3:  # all experts of a layer
            products += parameter.numel() * top_k / parameter.shape[0]
        elif parameter.ndim == 2 and (parameter is not embedding or config.tie_word_embeddings):
            products += parameter.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    return float(6 * (products + attention))


class Timing:
    """`timing.jsonl`: what the clock says of each step, apart from the log, whose bytes must not depend on it."""

    def __init__(self, path: Path, *, flops: float, world: int, device: Any, muted: bool, bf16: bool = False) -> None:
        self._path = path
        self._file = (Path(os.devnull) if muted else path).open("ab")
        if not muted and path.stat().st_size:  # of a machine that went down, half a line may be left
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._flops, self._world, self._device = flops, world, device
        import torch

        self._peak: float | None = None
        if device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(device))
        elif not muted:
            from prismoe.train.device import product_rate

            self._peak = product_rate(torch.bfloat16 if bf16 else torch.float32)
        self._before = time.perf_counter()

    def begin(self) -> None:
        """A step begins: what lies between two steps is not counted."""
        self._before = time.perf_counter()

    def step(self, step: int, tokens: int) -> dict[str, float]:
        """The step is over; returns what was written."""
        seconds = time.perf_counter() - self._before
        rate = tokens / seconds / self._world
        line = {"step": step, "seconds": round(seconds, 6), "tokens_per_second_device": round(rate, 1)}
        if self._peak is not None:
            line |= {"mfu": round(rate * self._flops / self._peak, 4), "peak_flops": round(self._peak)}
        line["memory_bytes"] = self._memory()
        try:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise unwritten(self._path, error) from error
        return line

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed: one that could not be was told then
            self._file.close()

    def _memory(self) -> int:
        """Most memory the device has held so far; of a CPU process, what it holds at most."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
