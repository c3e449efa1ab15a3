"""The way through the layers: hidden states of the text go by on disk, and each mixture learns what passes.

In memory is one dense layer, one layer of the mixture with its optimizer, and what a batch takes; on disk, for the
whole text, the hidden states before and after a layer (of the dense model, and of the mixture where that is followed)
and what enters and leaves an FFN. A layer that is done is one file; after a stop the work goes on with the first layer
that has none, from the states before it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from prismoe.calibrate.parts import Parts
from prismoe.calibrate.states import States
from prismoe.checkpoint.tensorfile import read_sealed, sealed_bytes
from prismoe.folder import write_atomic
from prismoe.progress import Progress
from prismoe.recover.block import Block, down_keys, layer_keys
from prismoe.recover.job import Job
from prismoe.recover.learn import Lesson, Measured, learn, measure
from prismoe.strictjson import parse_json

__all__ = ["LayerDone", "recover_layers"]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class LayerDone:
    """A layer that is finished: its file (None where its tensors stay) and what was measured.

    `before` is the relative error of the folder as it was; `measured` of what is in the file.
    """

    layer: int
    file: Path
    learned: bool
    before: float
    measured: Measured

    @classmethod
    def read(cls, layer: int, file: Path) -> LayerDone:
        """From a file that `recover_layers` wrote.

        Raises:
            InputError: it is damaged.
        """
        _, metadata, _ = read_sealed(file, keys={"numbers"})
        numbers = parse_json(metadata["numbers"].encode(), where=str(file))
        measured = Measured(**{name: tuple(values) for name, values in numbers.pop("measured").items()})
        return cls(layer, file, measured=measured, **numbers)


def recover_layers(job: Job, scratch: Path, *, on_progress: Progress) -> list[LayerDone]:
    """Every layer with experts, in order; those that have their file in `scratch` are done."""
    scratch.mkdir(exist_ok=True)
    files = {layer: scratch / f"layer-{layer:05d}.safetensors" for layer in job.layers}
    if not all(file.is_file() for file in files.values()):
        sweep = _Sweep(job, scratch, files, on_progress)
        sweep.run()
    return [LayerDone.read(layer, file) for layer, file in files.items()]


class _Sweep:
    """`hidden` states are the dense model's, `own` ones those that the layers recovered so far give."""

    def __init__(self, job: Job, scratch: Path, files: dict[int, Path], on_progress: Progress) -> None:
        self.job, self.scratch, self.files, self.on_progress = job, scratch, files, on_progress
        self.device = torch.device(job.config.device)
        self.dtype = torch.bfloat16 if job.config.precision == "bf16" else torch.float32
        self.parts = Parts(job.dense, dtype=self.dtype, device=self.device)
        self.streams = ("hidden", "own") if job.config.inputs == "mixture" else ("hidden",)

    def run(self) -> None:
        """The text through the layers, from the first that has no file on."""
        layers = self.job.layers
        done = [layer for layer in layers if self.files[layer].is_file()]
        # A layer's file is written after the states behind it: what a file stands for is whole.
        first = done[-1] + 1 if done else 0
        kept = entering = self._enter(first, made=bool(done))
        for layer in range(first, layers[-1] + 1):
            leaving = self._layer(layer, entering)
            if entering is not kept:
                _remove(entering)
            if layer in self.files:  # a dense layer leaves no file: what is before it is needed for another start
                _remove(kept)
                kept = leaving
            entering = leaving
        _remove(entering)

    def _enter(self, layer: int, *, made: bool) -> dict[str, States]:
        """The streams before `layer`: on disk, or for the first one the embedding."""
        streams = {name: self._states(f"{name}-{layer}", made=made) for name in self.streams}
        for first, stop in [] if made else self._batches():
            embedded_BTD = self.parts.embed(torch.from_numpy(self.job.text.ids(first, stop)))
            for states in streams.values():
                states.write(first, embedded_BTD)
        return streams

    def _layer(self, layer: int, entering: dict[str, States]) -> dict[str, States]:
        """All text through one layer; one with experts learns on the way."""
        leaving = self._leaving(layer)
        if layer not in self.files:
            for name in self.streams:
                self._through(layer, entering[name], leaving[name])
            return leaving
        ends = {name: self._states(name, made=False) for name in ("inputs", "outputs")}
        self._through(layer, entering["hidden"], leaving["hidden"], ends=None if "own" in leaving else ends)
        if "own" in leaving:
            self._through(layer, entering["own"], leaving["own"], ends=ends)
            self._aim(leaving, ends["outputs"])
        changed, numbers, block = self._learn(layer, **ends)
        if "own" in leaving:
            self._through(layer, entering["own"], leaving["own"], block=block)
        for states in leaving.values():
            states.flush()
        self._write(layer, changed, numbers)
        _remove(ends)
        return leaving

    def _leaving(self, layer: int) -> dict[str, States]:
        return {name: self._states(f"{name}-{layer + 1}", made=False) for name in self.streams}

    def _through(
        self,
        layer: int,
        entering: States,
        leaving: States,
        *,
        ends: dict[str, States] | None = None,
        block: Block | None = None,
    ) -> None:
        """A stream through a dense layer; `ends` get what enters and leaves its FFN, or `block` stands in for that."""
        (base,) = self.parts.layers(layer, layer + 1)
        first = 0

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if ends is not None:
                ends["inputs"].write(first, inputs[0])
                ends["outputs"].write(first, output)
            if block is None:
                return None
            return block(inputs[0].flatten(0, 1).float()).view(output.shape).to(output.dtype)

        handle = base.layers[0].mlp.register_forward_hook(hook)
        try:
            with torch.no_grad():
                for first, stop in self._batches():
                    entering_BTD = entering.read(first, stop, device=self.device)
                    leaving.write(first, base(inputs_embeds=entering_BTD, use_cache=False).last_hidden_state)
        finally:
            handle.remove()

    def _aim(self, leaving: dict[str, States], outputs: States) -> None:
        """Of a layer that adds its FFN's output to the stream, ask for the output that leads to the dense stream."""
        if (factor := self.job.residual) is None:
            return
        for first, stop in self._batches():
            dense_BTD, own_BTD, output_BTD = (
                states.read(first, stop, device=self.device).float()
                for states in (leaving["hidden"], leaving["own"], outputs)
            )
            outputs.write(first, (output_BTD + (dense_BTD - own_BTD) / factor).to(self.dtype))

    def _learn(
        self, layer: int, *, inputs: States, outputs: States
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any], Block]:
        """What has changed, what was measured, and the block as the folder will have it."""
        job, total = self.job, len(self.job.layers)
        number = job.layers.index(layer)
        training, held = (Lesson(inputs, outputs, rows, self.device) for rows in job.rows)
        block = self._block(layer)
        before = measure(block, held, top_k=job.top_k)
        start, factor = before, 1.0
        if job.learning_k != job.top_k:  # its own factor, from the text that is learned from
            factor = measure(block, training, top_k=job.top_k).factors[job.learning_k - 1]
            block.multiply(self._down(layer), factor)
            start = measure(block, held, top_k=job.learning_k)

        def on_step(step: int, steps: int, error: float) -> None:
            what = f"recover: layer {layer}, error {error:.3f}"
            self.on_progress(what, number * steps + step, total * steps)

        learn(block, training, job.config, layer=layer, top_k=job.learning_k, on_step=on_step)
        changed = block.round()
        measured = measure(block, held, top_k=job.learning_k)
        learned = measured.errors[job.learning_k - 1] < start.errors[job.learning_k - 1]
        if not learned:  # as an exact copy of the FFN, which cannot
            changed, measured, block = {}, start, self._block(layer, learns=False)
            if factor != 1.0:
                block.multiply(self._down(layer), factor)
                changed = block.round()
                measured = measure(block, held, top_k=job.learning_k)
        block.router.top_k = job.learning_k
        numbers = {"before": before.errors[job.top_k - 1], "learned": learned, "measured": asdict(measured)}
        return changed, numbers, block

    def _block(self, layer: int, *, learns: bool = True) -> Block:
        job = self.job
        keys = layer_keys(job.target, layer, num_experts=job.num_experts, train=job.config.train) if learns else []
        return Block(job.moe, layer, keys, device=self.device)

    def _down(self, layer: int) -> list[str]:
        return down_keys(self.job.target, layer, num_experts=self.job.num_experts)

    def _write(self, layer: int, changed: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        entries = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in changed.items()]
        data = b"".join(_array(tensor).tobytes() for tensor in changed.values())
        write_atomic(self.files[layer], sealed_bytes(entries, data, metadata={"numbers": json.dumps(numbers)}))

    def _states(self, name: str, *, made: bool) -> States:
        shape = (len(self.job.text), self.job.text.seq_len, self.job.dense.family.hidden_size)
        return States(self.scratch / f"{name}.bin", shape=shape, dtype=self.dtype, made=made)

    def _batches(self) -> list[tuple[int, int]]:
        size, count = self.job.config.batch_size, len(self.job.text)
        return [(first, min(first + size, count)) for first in range(0, count, size)]


def _remove(streams: dict[str, States]) -> None:
    for states in streams.values():
        states.remove()


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype is torch.bfloat16:
        found: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return found
    found = tensor.numpy()
    return found
