"""The mixture of one stock layer, with gradients: what it holds by its names in the folder, and how it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.finite import require_finite
from prismoe.errors import InputError
from prismoe.target import Slot, Target
from prismoe.train.experts import use_experts
from prismoe.train.weights import Place, places, stored
from prismoe.verify.stock import find_router, load_layer

__all__ = ["Block", "down_keys", "layer_keys"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
Layers = "model.layers.{l}."


def layer_keys(target: Target, layer: int, *, num_experts: int, train: str) -> list[str]:
    """The tensors of the folder that learn in one layer; of a shared expert that is not there, too."""
    keys = [target.router.format(l=layer)]
    if train == "router+experts":
        keys += _slots(target.experts, layer, num_experts) + _slots(target.shared, layer, num_experts)
    return keys


def down_keys(target: Target, layer: int, *, num_experts: int) -> list[str]:
    """The down matrices of the routed experts: what a factor of their output is folded into."""
    return _slots([slot for slot in target.experts if slot.parts == ("down",)], layer, num_experts)


def _slots(slots: Sequence[Slot], layer: int, num_experts: int) -> list[str]:
    return [
        slot.key.format(l=layer, e=expert)
        for slot in slots
        for expert in range(num_experts if "{e}" in slot.key else 1)
    ]


class Block:
    """Router and experts of layer `layer` of a mixture's folder, in float32, in the stock class.

    `keys` are the tensors of the folder that learn; their parameters have gradients and no others.
    """

    def __init__(self, moe: Checkpoint, layer: int, keys: Sequence[str], *, device: torch.device) -> None:
        own = Layers.format(l=layer)
        require_finite(moe, [name for name in moe.tensors if name.startswith(own)])
        self.layer, loading = load_layer(moe, layer)
        if loading.problems:
            raise InputError(f"stock class does not load it: {loading.problems[0]}", where=str(moe.folder))
        self.model: Any = self.layer.model.to(device).requires_grad_(False)
        use_experts(self.model, device=device)
        self.router, _ = find_router(self.layer.module)
        self._experts: nn.Module = self.layer.block.experts  # type: ignore[assignment]
        here = {key.replace(Layers.format(l=0), own, 1): place for key, place in places(self.model).items()}
        self._places: dict[str, Place] = here
        self._dtypes = {key: moe.tensors[key].dtype for key in here if key in moe.tensors}
        self.keys = [key for key in keys if key in self._dtypes]
        self.changed = dict.fromkeys(self.keys)
        tensors = stored(self.model)
        self.parameters = [tensors[name] for name in dict.fromkeys(here[key].name for key in self.keys)]
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def num_experts(self) -> int:
        return int(self.router.num_experts)

    def __call__(self, input_SD: torch.Tensor) -> torch.Tensor:
        """[S, D] what the routed experts and the shared one add up to."""
        output: torch.Tensor = self.layer.block(input_SD[None])[0]
        return output if self.layer.shared is None else output + self.layer.shared(input_SD[None])[0]

    def parts(self, input_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, D] each: what the routed experts give, and all that is added to it."""
        caught: list[torch.Tensor] = []
        hook = self._experts.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            whole_SD = self(input_SD)
        finally:
            hook.remove()
        routed_SD = caught[0].reshape(whole_SD.shape)
        return routed_SD, whole_SD - routed_SD

    @contextmanager
    def giving(self, top_k: int) -> Iterator[None]:
        """Within it, a token has `top_k` experts."""
        before, self.router.top_k = self.router.top_k, top_k
        try:
            yield
        finally:
            self.router.top_k = before

    @torch.no_grad()
    def multiply(self, keys: Sequence[str], factor: float) -> None:
        """Fold a factor into tensors of the folder."""
        for key in keys:
            self._view(key).mul_(factor)
        self.changed |= dict.fromkeys(keys)

    @torch.no_grad()
    def round(self) -> dict[str, torch.Tensor]:
        """What has changed, by name, in the dtypes of the folder; from here on it computes with just that."""
        found = {}
        for key in self.changed:
            view = self._view(key)
            found[key] = view.to(_DTYPES[self._dtypes[key]])
            view.copy_(found[key])
        return {key: value.contiguous().cpu() for key, value in found.items()}

    def _view(self, key: str) -> torch.Tensor:
        place = self._places[key]
        return place.of(stored(self.model)[place.name].detach())
