"""The passes over the text: which layers, forward or backward, in which order, and how a stopped one goes on.

With all layers in memory there is one pass. With a window of w layers, forward statistics take one pass per window,
hidden states waiting on disk in between. The gradient needs the end of the model first: all windows but the last go
forward and leave their output on disk; then, from the last to the first, each window goes forward again, this time
with its graph, takes the gradient that the window above it left on disk, and leaves its own. That is one forward pass
more than without windows, and L/w hidden states of the whole text on disk. The arithmetic is the same, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from prismoe.calibrate.clusters import cluster_sequences
from prismoe.calibrate.embedder import sentence_vectors
from prismoe.calibrate.parts import Parts
from prismoe.calibrate.settings import CalibrateConfig
from prismoe.calibrate.states import States, read_progress, write_progress
from prismoe.calibrate.text import Text
from prismoe.calibrate.watch import Batch, Watch
from prismoe.checkpoint import Checkpoint
from prismoe.errors import NumericalError
from prismoe.progress import Progress
from prismoe.stats.calibration import SCRATCH, SEQUENCES, Sequences, layer_file

__all__ = ["Pass", "Sweep", "passes"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pass:
    """All text through layers `first` to `stop` - 1; forward passes measure nothing."""

    kind: Literal["forward", "measure", "backward"]
    first: int
    stop: int

    def __str__(self) -> str:
        return f"{self.kind} layers {self.first}-{self.stop - 1}"


def passes(config: CalibrateConfig, num_layers: int) -> tuple[Pass, ...]:
    """The passes of a calibration, in order."""
    width = config.layers_at_once or num_layers
    windows = [(first, min(first + width, num_layers)) for first in range(0, num_layers, width)]
    if not config.gradient:
        return tuple(Pass("measure", *window) for window in windows)
    forward = [Pass("forward", *window) for window in windows[:-1]]
    return (*forward, *(Pass("backward", *window) for window in reversed(windows)))


class Sweep:
    """One calibration on its way. `run` does what is left of it."""

    def __init__(
        self, checkpoint: Checkpoint, text: Text, config: CalibrateConfig, *, out: Path, on_progress: Progress
    ) -> None:
        self.text, self.config, self.out, self.on_progress = text, config, out, on_progress
        self.dense, self.source = checkpoint.family, checkpoint.folder
        self.scratch = out / SCRATCH
        self.scratch.mkdir(exist_ok=True)
        self.device = torch.device(config.device)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.parts = Parts(checkpoint, dtype=self.dtype, device=self.device)
        self.passes = passes(config, self.dense.num_layers)
        self.nats = 0.0
        self.num_clusters = len(text.domains) if config.clusters == "domains" else int(config.clusters)
        self.labels_N = np.zeros(len(text), np.int32)
        if config.clusters == "domains":
            self.labels_N = text.domain_ids.astype(np.int32)
        # k-means looks at hidden states in the middle of the model; the first pass that gets there leaves them.
        self.middle = -(-self.dense.num_layers // 2) if config.by_text and config.encoder is None else 0
        self._watching: list[Watch] = []
        self._saved = time.monotonic()
        self._saving = 0.0

    @property
    def cluster_tokens(self) -> npt.NDArray[np.int64]:
        """[C] tokens that have a next one to predict."""
        return np.bincount(self.labels_N, minlength=self.num_clusters) * (self.text.seq_len - 1)

    def _labels(self, vectors_ND: npt.NDArray[np.float32], *, standardise: bool) -> npt.NDArray[np.int32]:
        return cluster_sequences(
            vectors_ND, num_clusters=self.num_clusters, seed=self.config.seed, standardise=standardise
        )

    def run(self) -> None:
        """Go through the passes that are left; the files of the result are in `out` afterwards."""
        step, arrays = read_progress(self._progress_file)
        start = int(step.get("pass", 0))
        if step:
            self.labels_N, self.nats = arrays.pop("labels"), float(step["nats"])
        elif self.config.encoder is not None:
            vectors_ND = sentence_vectors(
                Path(self.config.encoder),
                self.text,
                source=self.source,
                device=self.config.device,
                batch_size=self.config.batch_size,
                on_progress=self.on_progress,
            )
            self.labels_N = self._labels(vectors_ND, standardise=False)
        for index in range(start, len(self.passes)):
            resumed = index == start and bool(step)
            self._run_pass(index, int(step["batches"]) if resumed else 0, arrays if resumed else {})
        Sequences(
            domain_ids=self.text.domain_ids,
            windows=self.text.windows,
            clusters=self.labels_N,
            samples=self.text.samples,
        ).save(self.out / SEQUENCES)

    def _run_pass(self, index: int, done: int, sums: dict[str, Array]) -> None:
        step = self.passes[index]
        bases = self.parts.layers(step.first, step.stop)
        watches = self._watching = self._watches(step, sums, resumed=done > 0)
        files = self._files(step, resumed=done > 0)
        batches = list(self._batches())
        handles = [h for watch, base in zip(watches, bases, strict=False) for h in watch.attach(base.layers[0].mlp)]
        try:
            for number in range(done, len(batches)):
                first, stop = batches[number]
                for watch in watches:
                    watch.batch = self._batch(first, stop)
                (self._backward if step.kind == "backward" else self._forward)(step, bases, files, first, stop)
                self.on_progress(
                    f"calibrate batches: {step}", index * len(batches) + number + 1, len(self.passes) * len(batches)
                )
                if number + 1 < len(batches) and self._due():
                    self._save(index, number + 1, watches, files)
        finally:
            for handle in handles:
                handle.remove()
        self._finish(index, watches, files)

    def _due(self) -> bool:
        """Whether to save now: not so often that saving takes more than a twentieth of the time, unless asked to."""
        wait = self.config.save_seconds and max(self.config.save_seconds, 20 * self._saving)
        return time.monotonic() - self._saved >= wait

    def _forward(self, step: Pass, bases: list[Any], files: dict[str, States], first: int, stop: int) -> None:
        with torch.no_grad():
            hidden_BTD = self._through(step, bases, files, first, self._entering(step, files, first, stop))
        if "hidden out" in files:
            files["hidden out"].write(first, hidden_BTD)

    def _backward(self, step: Pass, bases: list[Any], files: dict[str, States], first: int, stop: int) -> None:
        entering_BTD = self._entering(step, files, first, stop).requires_grad_(step.first > 0)
        hidden_BTD = self._through(step, bases, files, first, entering_BTD)
        if "gradient in" in files:
            gradient_BTD = files["gradient in"].read(first, stop, device=self.device)
        else:
            nats, gradient_BTD = self.parts.loss(hidden_BTD, torch.from_numpy(self.text.ids(first, stop)))
            if not math.isfinite(nats):
                for watch in self._watching:  # one of them may know the layer
                    watch.check()
                hint = "look for damaged weights; if they are sound, calibrate with precision=fp32"
                raise NumericalError("loss is not finite", where="calibrate", hint=hint)
            self.nats += nats
        hidden_BTD.backward(gradient_BTD)  # type: ignore[no-untyped-call]
        if "gradient out" in files:
            assert entering_BTD.grad is not None
            files["gradient out"].write(first, entering_BTD.grad)

    def _entering(self, step: Pass, files: dict[str, States], first: int, stop: int) -> torch.Tensor:
        if step.first:
            return files["hidden in"].read(first, stop, device=self.device)
        return self.parts.embed(torch.from_numpy(self.text.ids(first, stop)))

    def _through(
        self, step: Pass, bases: list[Any], files: dict[str, States], first: int, hidden_BTD: torch.Tensor
    ) -> torch.Tensor:
        for layer, base in zip(range(step.first, step.stop), bases, strict=True):
            hidden_BTD = base(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state
            if "vectors" in files and layer + 1 == self.middle:
                # The first token of a window draws attention whatever it says, and its state is far from all others.
                mean_BD = hidden_BTD.detach()[:, 1:].float().mean(dim=1, keepdim=True)
                files["vectors"].write(first, mean_BD)
        return hidden_BTD

    def _files(self, step: Pass, *, resumed: bool) -> dict[str, States]:
        """Scratch files of a pass: what it reads and what it leaves."""
        names = {"hidden in": f"hidden-{step.first}"} if step.first else {}
        if step.kind == "backward":
            names |= {"gradient in": f"gradient-{step.stop}"} if step.stop < self.dense.num_layers else {}
            names |= {"gradient out": f"gradient-{step.first}"} if step.first else {}
        elif step.stop < self.dense.num_layers:
            names["hidden out"] = f"hidden-{step.stop}"
        if step == next((one for one in self.passes if one.first < self.middle <= one.stop), None):
            names["vectors"] = "vectors"
        return {
            role: States(
                self.scratch / f"{name}.bin",
                shape=(len(self.text), 1 if name == "vectors" else self.text.seq_len, self.dense.hidden_size),
                dtype=torch.float32 if name == "vectors" else self.dtype,
                made=resumed or role.endswith(" in"),
            )
            for role, name in names.items()
        }

    def _watches(self, step: Pass, sums: dict[str, Array], *, resumed: bool) -> list[Watch]:
        if step.kind == "forward":
            return []
        watches = [
            Watch(
                layer,
                num_neurons=self.dense.intermediate_size,
                hidden_size=self.dense.hidden_size,
                num_sequences=len(self.text),
                num_samples=len(self.text.samples),
                config=self.config,
                scratch=self.scratch,
                resumed=resumed,
            )
            for layer in range(step.first, step.stop)
        ]
        for watch in watches if resumed else []:
            watch.sums = {name: sums[f"{watch.layer}.{name}"] for name in watch.sums}
        return watches

    def _batches(self) -> Iterator[tuple[int, int]]:
        size = self.config.batch_size
        for first in range(0, len(self.text), size):
            yield first, min(first + size, len(self.text))

    def _batch(self, first: int, stop: int) -> Batch:
        length = self.text.seq_len
        low, high = np.searchsorted(self.text.samples, (first * length, stop * length)).tolist()
        return Batch(
            sequences=slice(first, stop), rows=self.text.samples[low:high] - first * length, slots=slice(low, high)
        )

    @property
    def _progress_file(self) -> Path:
        return self.scratch / "progress.safetensors"

    def _save(self, index: int, batches: int, watches: list[Watch], files: dict[str, States]) -> None:
        started = time.monotonic()
        for watch in watches:
            watch.check()
            watch.flush()
        for states in files.values():
            states.flush()
        arrays = {f"{watch.layer}.{name}": value for watch in watches for name, value in watch.sums.items()}
        write_progress(
            self._progress_file,
            step={"pass": index, "batches": batches, "nats": self.nats},
            arrays={"labels": self.labels_N, **arrays},
        )
        self._saved = time.monotonic()
        self._saving = self._saved - started

    def _finish(self, index: int, watches: list[Watch], files: dict[str, States]) -> None:
        """Leave the results of a pass, then the record that it is over, then delete what nobody needs any more."""
        for watch in watches:
            watch.check()
        if "vectors" in files:
            vectors_ND = files["vectors"].read(0, len(self.text), device=torch.device("cpu"))[:, 0].numpy()
            self.labels_N = self._labels(vectors_ND, standardise=True)
        for watch in watches:
            # With a gradient the middle of the model is behind us here; without one, labels are not asked for.
            stats = watch.finish(
                num_tokens=self.text.num_tokens, cluster_tokens=self.cluster_tokens, labels_N=self.labels_N
            )
            stats.save(self.out / layer_file(watch.layer))
        self._save(index + 1, 0, [], {role: states for role, states in files.items() if role.endswith(" out")})
        for watch in watches:
            watch.remove()
        for role, states in files.items():
            # What a forward pass has read, the backward pass of the same window reads again.
            if role == "vectors" or (role.endswith(" in") and self.passes[index].kind != "forward"):
                states.remove()
