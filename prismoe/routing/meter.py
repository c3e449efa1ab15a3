"""Sums of what the routers do in forward passes, kept on the device: their size does not depend on the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismoe.errors import InputError
from prismoe.train.routers import Router
from prismoe.train.routing import watch

__all__ = ["RoutingMeter", "Taken", "metering"]


@dataclass(frozen=True, eq=False)
class Taken:
    """Sums over the tokens of one text, and how many there were; see `RoutingTrace`."""

    tokens: int
    load_LE: npt.NDArray[np.int64]
    importance_LE: npt.NDArray[np.float64]
    coactivation_LEE: npt.NDArray[np.int64]
    entropy_L: npt.NDArray[np.float64]
    norm_L: npt.NDArray[np.float64]


@contextmanager
def metering(model: Any, *, device: torch.device | str = "cpu") -> Iterator[RoutingMeter]:
    """A meter on all routers of `model`, and on the modules that hold them, while the context is open.

    Raises:
        InputError: no router, or routers of different sizes.
        UsageError: a mixture whose class does not declare its routers.
    """
    with watch(model) as routers:
        if not routers:
            raise InputError(
                "no router in it",
                where=str(model.config.model_type),
                needed="a mixture",
                hint="make one with `prismoe run`",
            )
        if len(sizes := {(router.num_experts, router.top_k) for router in routers}) > 1:
            raise InputError(f"routers of {len(sizes)} sizes", where=str(model.config.model_type), needed="one for all")
        meter = RoutingMeter(routers, device=device)
        handles = []
        for index, router in enumerate(routers):
            block = router.name.rpartition(".")[0]
            beside = getattr(model.get_submodule(block.rpartition(".")[0]), "shared_mlp", None)
            parts = [model.get_submodule(block), *([beside] if beside is not None else [])]
            keep = meter.output_hook(index, len(parts))
            handles += [part.register_forward_hook(keep) for part in parts]
        try:
            yield meter
        finally:
            for handle in handles:
                handle.remove()


class RoutingMeter:
    """Use `begin` before a forward pass over [B, T] ids and `add` after it; `take` gives the sums and clears them.

    The first token of each row opens a window: it is context, the same in every domain, and is not counted.
    """

    def __init__(self, routers: Sequence[Router], *, device: torch.device | str) -> None:
        self._routers, self._device = routers, device
        self.num_experts, self.top_k = routers[0].num_experts, routers[0].top_k
        self._length = 0
        self._clear()

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have a router."""
        return tuple(int(re.findall(r"\d+", router.name)[0]) for router in self._routers)

    def _clear(self) -> None:
        count, experts = len(self._routers), self.num_experts

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._tokens = 0
        self._importance_LE = zeros(count, experts, dtype=torch.float64)
        self._coactivation_LEE = zeros(count, experts, experts, dtype=torch.int64)
        self._entropy_L, self._norm_L = (zeros(count, dtype=torch.float64) for _ in range(2))

    def output_hook(self, index: int, num_parts: int) -> Any:
        """A forward hook for the `num_parts` modules whose outputs add up to the MoE output of a layer."""
        parts: list[torch.Tensor] = []

        def hook(module: Any, inputs: Any, output: Any) -> None:
            parts.append(output[0] if isinstance(output, tuple) else output)
            if len(parts) == num_parts:
                whole = parts[0] if num_parts == 1 else parts[0] + parts[1]
                parts.clear()
                rows = whole.reshape(-1, self._length, whole.shape[-1])[:, 1:]
                self._norm_L[index] += torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).sum(
                    dtype=torch.float64
                )

        return hook

    def begin(self, length: int) -> None:
        """The rows of the coming forward pass are of this length."""
        self._length = length

    def _rows(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[L, B, T - 1, …] of what each router said, [B·T, …]."""
        stacked = torch.stack([part.detach() for part in parts])
        return stacked.reshape(len(parts), -1, self._length, stacked.shape[-1])[:, :, 1:]

    def add(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the latest forward pass; gives its chosen experts and their weights, [L, B, T - 1, K]."""
        chosen_LBTK = self._rows([router.chosen_TK for router in self._routers])
        weights_LBTK = self._rows([router.weights_TK for router in self._routers]).float()
        log_LBTE = torch.log_softmax(self._rows([router.logits_TE for router in self._routers]).float(), dim=-1)
        self._entropy_L -= (log_LBTE.exp() * log_LBTE).sum((1, 2, 3), dtype=torch.float64)
        chosen, weights = chosen_LBTK.flatten(1, 2), weights_LBTK.flatten(1, 2)
        marks_LTE = torch.zeros((*chosen.shape[:2], self.num_experts), device=chosen.device)
        self._importance_LE += marks_LTE.scatter(2, chosen, weights).sum(1, dtype=torch.float64)
        marks_LTE.scatter_(2, chosen, 1.0)
        self._coactivation_LEE += (marks_LTE.mT @ marks_LTE).round().long()  # exact below 2^24 tokens a pass
        self._tokens += chosen.shape[1]
        return chosen_LBTK, weights_LBTK

    def take(self) -> Taken:
        """The sums since the last time."""
        together = self._coactivation_LEE.cpu().numpy()
        taken = Taken(
            tokens=self._tokens,
            load_LE=np.diagonal(together, axis1=1, axis2=2).copy(),
            importance_LE=self._importance_LE.cpu().numpy(),
            coactivation_LEE=together,
            entropy_L=self._entropy_L.cpu().numpy(),
            norm_L=self._norm_L.cpu().numpy(),
        )
        self._clear()
        return taken
