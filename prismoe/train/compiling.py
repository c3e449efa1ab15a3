"""`pretrain.compile`: layers compiled by torch, the blocks of their mixtures left as they are.

What routes and what watches it (hooks, policies, losses of the whole batch) and experts whose rows depend on the data
would break a graph in many places, or be compiled again for every batch. So of a layer with a mixture its other parts
are compiled one by one: attention, norms, a shared FFN. (A layer around such a break is not compiled at all once its
activations are recomputed.) A dense layer is compiled whole. Layers of one class share their compilations.
"""

from __future__ import annotations

from typing import Any

import torch

from prismoe.errors import UsageError

__all__ = ["compile_layers"]


def compile_layers(model: Any, *, device: torch.device, backend: str = "inductor") -> None:
    """Compile the layers of `model` in place, before it is sharded; names of parameters stay.

    Raises:
        UsageError: nothing can be compiled here, such as without a C++ compiler on a CPU.
    """
    try:
        torch.compile(_trial, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # compilers fail in ways of their own
        raise UsageError(
            f"true, but a sum cannot be compiled ({str(error).strip().partition(chr(10))[0][:160]})",
            where="pretrain.compile",
            needed="a C++ compiler on a CPU, Triton on a device",
            hint="pretrain.compile=false",
        ) from error
    for layer in model.base_model.layers:
        parts = [part for part in layer.children() if not _routes(part)]
        for part in parts if _routes(layer) else [layer]:
            part.compile(backend=backend)


def _routes(module: torch.nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _trial(x_T: torch.Tensor) -> torch.Tensor:
    return x_T + 1
