"""Hooks on one stock layer: they see what its FFN gets, holds and gives, add it up, and change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prismoe.calibrate.settings import CalibrateConfig
from prismoe.calibrate.sums import activation_sums, count_pairs, importance_sums
from prismoe.errors import InputError, NumericalError
from prismoe.stats import NeuronStats

__all__ = ["Batch", "Watch"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """What the hooks must know of what goes through: which sequences of the text, and which tokens are sampled.

    Token `rows[i]` of the batch (b·T + t) has its place at `slots.start + i` of the sample.
    """

    sequences: slice
    rows: npt.NDArray[np.int64]
    slots: slice


class Watch:
    """Sums, samples and importance of one layer.

    `sums` is all its state in memory. Sampled vectors and the importance of each sequence ([N, F]: data clusters may
    be known later than it) are written in place to `files`.
    """

    def __init__(
        self,
        layer: int,
        *,
        num_neurons: int,
        hidden_size: int,
        num_sequences: int,
        num_samples: int,
        config: CalibrateConfig,
        scratch: Path,
        resumed: bool,
    ) -> None:
        self.layer, self.num_neurons, self.hidden_size, self.config = layer, num_neurons, hidden_size, config
        self.batch: Batch | None = None
        asked, width = config.quantities, num_neurons
        self.sums: dict[str, Array] = {"output": np.zeros(2)} if "output" in asked else {}
        if "activation" in asked:
            self.sums |= {name: np.zeros(width) for name in ("mean", "mean_abs", "mean_square")}
        if "marks" in asked:
            self.sums["rate"] = np.zeros(width, np.int64)
        if "coactivation" in asked:
            self.sums["coactivation"] = np.zeros((width, width), np.int32)
        float32 = np.dtype(np.float32)
        shapes = {
            "inputs": ((num_samples, hidden_size), float32),
            "marks": ((num_samples, config.marks_per_token), np.dtype(np.int32)),
            "scores": ((num_samples, width), np.dtype(ml_dtypes.bfloat16)),
            "importance": ((num_sequences, width), float32),
        }
        self.files = {
            name: _in_place(scratch / f"{name}-{layer:05d}.bin", shape, dtype, made=resumed)
            for name, (shape, dtype) in shapes.items()
            if name in asked
        }

    def attach(self, mlp: Any) -> list[Any]:
        """Hook the FFN of a stock layer; returns the handles to remove."""
        return [
            mlp.register_forward_pre_hook(self._input),
            mlp.down_proj.register_forward_pre_hook(self._hidden),
            mlp.register_forward_hook(self._output),
        ]

    def check(self) -> None:
        """Refuse to go on with sums that are not finite.

        Raises:
            NumericalError: naming layer and quantity.
        """
        for name, value in self.sums.items():
            if not np.isfinite(value.min()) or not np.isfinite(value.max()):
                raise self._not_finite(name)

    def finish(self, *, num_tokens: int, cluster_tokens: Array, labels_N: Array) -> NeuronStats:
        """The statistics over `num_tokens` tokens, `cluster_tokens` [C] of them predicted in each data cluster."""
        self.check()
        found: dict[str, Any] = {name: values for name, values in self.files.items() if name != "importance"}
        for name in ("mean", "mean_abs", "mean_square", "rate"):
            if name in self.sums:
                found[name] = (self.sums[name] / num_tokens).astype(np.float32)
        if "importance" in self.files:
            total = np.zeros((len(cluster_tokens), self.num_neurons))
            for label, sum_F in zip(labels_N, self.files["importance"], strict=True):
                total[label] += sum_F
            kind = self.config.importance
            total = np.abs(total) if kind == "total" else total**2 if kind == "total_square" else total
            found["importance"] = (total / cluster_tokens[:, None]).astype(np.float32)
        if "coactivation" in self.sums:
            upper = self.sums["coactivation"]
            found["coactivation"] = upper + np.triu(upper, 1).T
        if "output" in self.sums:
            norm, square = self.sums["output"] / num_tokens
            found |= {"output_norm": float(norm), "output_rms": float(np.sqrt(square))}
        return NeuronStats(
            layer=self.layer,
            num_neurons=self.num_neurons,
            hidden_size=self.hidden_size,
            num_tokens=num_tokens,
            **found,
        )

    def flush(self) -> None:
        """Put the files on the disk."""
        for values in self.files.values():
            values.flush()

    def remove(self) -> None:
        """Delete the files."""
        for values in self.files.values():
            Path(str(values.filename)).unlink(missing_ok=True)

    def _not_finite(self, name: str) -> NumericalError:
        hint = "look for damaged weights; if they are sound, calibrate with precision=fp32"
        return NumericalError(f"{name} is not finite", where=f"layer {self.layer}", hint=hint)

    def _input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if "inputs" in self.files:
            self._keep("inputs", args[0].flatten(0, 1))

    def _hidden(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        h_BTF = args[0]
        if self.config.activations:
            sums, marks_BTK = activation_sums(h_BTF.detach(), num_marks=self.config.num_marks)
            self._add(sums, marks_BTK)
        if not self.config.gradient:
            return None
        # The first FFN that the gradient meets needs none below it: cut the graph there and save a layer's backward.
        leaf = h_BTF if h_BTF.requires_grad else h_BTF.detach().requires_grad_()
        kept = leaf.detach()
        leaf.register_hook(lambda g_BTF: self._gradient(kept, g_BTF))  # type: ignore[no-untyped-call]
        return (leaf,)

    def _gradient(self, h_BTF: torch.Tensor, g_BTF: torch.Tensor) -> None:
        batch = self.batch
        assert batch is not None
        if "importance" in self.files:
            sums_BF = importance_sums(h_BTF, g_BTF, kind=self.config.importance)
            if not np.isfinite(sums_BF).all():
                raise self._not_finite("importance")
            self.files["importance"][batch.sequences] = sums_BF
        if "scores" in self.files:
            rows = torch.from_numpy(batch.rows).to(h_BTF.device)
            scores_SF = h_BTF.flatten(0, 1)[rows].float() * g_BTF.flatten(0, 1)[rows].float()
            self.files["scores"][batch.slots] = scores_SF.abs().cpu().numpy().astype(ml_dtypes.bfloat16)

    def _output(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if "output" in self.sums:
            norm_BT = output.detach().float().norm(dim=-1).double()
            self.sums["output"] += (float(norm_BT.sum()), float(norm_BT.square().sum()))

    def _add(self, sums: dict[str, Array], marks_BTK: Array) -> None:
        for name, value in sums.items():
            if name in self.sums:
                self.sums[name] += value
        if not self.config.num_marks:
            return
        marks_NK = marks_BTK.reshape(-1, marks_BTK.shape[-1])
        if "rate" in self.sums:
            self.sums["rate"] += np.bincount(marks_NK.reshape(-1), minlength=self.num_neurons)
        if "coactivation" in self.sums:
            count_pairs(self.sums["coactivation"], marks_NK)
        if "marks" in self.files:
            assert self.batch is not None
            self.files["marks"][self.batch.slots] = marks_NK[self.batch.rows]

    def _keep(self, name: str, values_NX: torch.Tensor) -> None:
        assert self.batch is not None
        rows = torch.from_numpy(self.batch.rows).to(values_NX.device)
        self.files[name][self.batch.slots] = values_NX.detach()[rows].float().cpu().numpy()


def _in_place(path: Path, shape: tuple[int, int], dtype: np.dtype[Any], *, made: bool) -> np.memmap[Any, Any]:
    """A file from the start: memory does not grow with the text, and a stop loses nothing."""
    size = shape[0] * shape[1] * dtype.itemsize
    if made and not (path.is_file() and path.stat().st_size == size):
        needed, hint = f"{size} bytes, as the stopped call left it", "start again with --force"
        raise InputError("scratch file is gone or cut", where=str(path), needed=needed, hint=hint)
    return np.memmap(path, dtype, mode="r+" if made else "w+", shape=shape)
