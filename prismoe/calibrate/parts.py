"""The dense model in stock pieces: embedding, layers (as many as are asked for at a time), last norm and head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import optional_tensor
from prismoe.checkpoint.finite import require_finite
from prismoe.errors import InputError
from prismoe.verify.stock import Loading, load_ends, load_layer

__all__ = ["Parts"]

LOGITS = 1 << 25  # logits in memory at a time: 128 MiB, and as much again for their gradient


class Parts:
    """Stock transformers modules with frozen weights in one precision, on one device; layers stay until others come."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._ignored = [name for name in checkpoint.tensors if optional_tensor(checkpoint.family, name)]
        require_finite(checkpoint, [name for name in checkpoint.tensors if ".layers." not in name])
        ends, loading = load_ends(checkpoint, without=self._ignored)
        self._ends = self._settle(ends.model, loading)
        self._factor = ends.factor
        self._layers: dict[int, Any] = {}

    def layers(self, first: int, stop: int) -> list[Any]:
        """Stock one-layer base models of layers `first` to `stop` - 1; `.layers[0].mlp` is the FFN."""
        self._layers = {layer: base for layer, base in self._layers.items() if first <= layer < stop}
        for layer in range(first, stop):
            if layer not in self._layers:
                require_finite(
                    self.checkpoint, [name for name in self.checkpoint.tensors if f".layers.{layer}." in name]
                )
                loaded, loading = load_layer(self.checkpoint, layer, without=self._ignored)
                base = self._settle(loaded.model, loading).model
                base.norm = nn.Identity()
                self._layers[layer] = base
        return [self._layers[layer] for layer in range(first, stop)]

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, D] hidden states before the first layer."""
        with torch.no_grad():
            embedded: torch.Tensor = self._ends.get_input_embeddings()(ids_BT.to(self.device)) * self._factor
        return embedded

    def loss(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Language-model loss in nats, summed over the predicted tokens, and its gradient [B, T, D] by `hidden_BTD`.

        Rows go through norm and head a piece at a time, so that memory does not grow with the vocabulary.
        """
        hidden_ND = hidden_BTD.detach()[:, :-1].flatten(0, 1)
        labels_N = ids_BT[:, 1:].flatten().to(self.device)
        gradient_BTD = torch.zeros_like(hidden_BTD)
        rows = max(1, LOGITS // int(self._ends.config.vocab_size))
        pieces, nats = [], 0.0
        for start in range(0, len(hidden_ND), rows):
            piece_ND = hidden_ND[start : start + rows].requires_grad_()
            # Each row is a sequence of its own here: no attention mask of N by N comes to be.
            logits_NV = self._ends(inputs_embeds=piece_ND[:, None], use_cache=False).logits[:, 0].float()
            loss = F.cross_entropy(logits_NV, labels_N[start : start + rows], reduction="sum")
            (piece_gradient_ND,) = torch.autograd.grad(loss, piece_ND)
            pieces.append(piece_gradient_ND)
            nats += float(loss.detach())
        gradient_BTD[:, :-1] = torch.cat(pieces).view(*hidden_BTD[:, :-1].shape)
        return nats, gradient_BTD

    def _settle(self, model: Any, loading: Loading) -> Any:
        if loading.problems:
            raise InputError(f"stock class does not load it: {loading.problems[0]}", where=str(self.checkpoint.folder))
        model.requires_grad_(False)
        for parameter in model.parameters():  # parameters only: rotary tables stay in float32, as in a stock load
            parameter.data = parameter.data.to(self.dtype)
        return model.to(self.device)
