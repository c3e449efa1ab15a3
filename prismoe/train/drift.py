"""How far experts have moved from the dense FFN: the cosine of their weights with those they started from.

Conversion makes experts of neurons of the dense FFN, so what a run starts from is the expert as a part of it. He et
al. (2410.07524) watch this cosine: it stays near 1 at a low learning rate, where upcycled experts remain copies, and
falls to 0.6-0.7 at the one that works best. A factor on a whole matrix, such as a folded scale, does not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prismoe.train.routers import AllReduce, Router, identity

__all__ = ["ExpertDrift"]

_KEPT = 1 << 14  # numbers remembered of each matrix of an expert: the cosine's error is below 1/128


class ExpertDrift:
    """Remembers a part of the experts' weights as they are when it is made; `total` adds up over all processes."""

    def __init__(self, model: Any, routers: Sequence[Router], *, total: AllReduce = identity) -> None:
        self._total = total
        self._layers = []
        for router in routers:
            experts = model.get_submodule(f"{router.name.rpartition('.')[0]}.experts")
            matrices = [parameter for parameter in experts.parameters() if parameter.ndim == 3]
            self._layers.append([(matrix, _part(matrix).clone()) for matrix in matrices])

    @torch.no_grad()
    def cosines(self) -> list[float]:
        """Of each layer, over the matrices of all its experts: the mean of their cosines. Every process has to ask."""
        rows = [torch.zeros(2, dtype=torch.float64)]
        for layer in self._layers:
            row = torch.zeros(2, dtype=torch.float64)
            for matrix, before in layer:
                now = _part(matrix).double()
                cosine_E = torch.nn.functional.cosine_similarity(now, before.double(), dim=1)
                row += torch.stack([cosine_E.sum(), torch.tensor(float(len(cosine_E)))]).cpu()
            rows.append(row)
        sums = self._total(torch.stack(rows))[1:]
        return [round(float(cosine / count), 6) for cosine, count in sums]


def _part(matrix: torch.nn.Parameter) -> torch.Tensor:
    """Evenly spread numbers of each expert that this process holds [experts, at most 2·_KEPT]."""
    local = matrix.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    flat = local.flatten(1)  # also of a process that holds none of the rows
    return flat[:, :: max(1, flat.shape[1] // _KEPT)]
