"""AdamW over parameters that may be whole, sharded or held by one process each, and the norm of their gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from prismoe.train.engine import Engine
from prismoe.train.settings import PretrainConfig

__all__ = ["adamw", "norms", "scale_gradients"]


def adamw(parameters: Iterable[torch.nn.Parameter], config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norm gains, biases) do not decay, matrices (embeddings and routers among them) do.

    One fused update takes tensors of one mesh only, so there is a group for each.
    """
    groups: dict[tuple[bool, Any], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.ndim >= 2, getattr(parameter, "device_mesh", None)), []).append(parameter)
    listed = [
        {"params": group, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), group in sorted(groups.items(), key=lambda item: not item[0][0])
    ]
    return torch.optim.AdamW(listed, lr=config.lr, betas=config.betas, fused=True)


def norms(groups: Sequence[Sequence[torch.nn.Parameter]], engine: Engine) -> torch.Tensor:
    """Squared norm of the gradient over the parameters of each group, what this process adds to it, in float64.

    The sum over all processes is the squared norm of the whole: what several of them hold counts once. So it is right
    for any mix of meshes, where torch's own clipping would need one.
    """
    squares = []
    for group in groups:
        held = [(gradient, _copies(gradient, engine)) for p in group if (gradient := p.grad) is not None]
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        local = [_local(gradient) for gradient, _ in held]
        if local:
            each = torch.stack([norm.to(torch.float64) for norm in torch._foreach_norm(local)]).square()
            total = (each / torch.tensor([copies for _, copies in held], dtype=torch.float64, device=each.device)).sum()
        squares.append(total)
    return torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64, device=engine.device)


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Multiply all gradients."""
    torch._foreach_mul_([_local(parameter.grad) for parameter in parameters if parameter.grad is not None], factor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _copies(tensor: torch.Tensor, engine: Engine) -> int:
    """How many processes hold the same part of a tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return engine.world
    copies = engine.world // mesh.size()
    for size, placement in zip(mesh.shape, tensor.placements, strict=True):  # type: ignore[attr-defined]
        copies *= size if placement.is_replicate() else 1
    return int(copies)
