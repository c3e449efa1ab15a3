"""Linear router rows in place of a tanh network: ridge regression on its logits, layer by layer, and what that changes.

Hidden states of the calibration text go through the original model, whose layers are computed here from the tensors
(attention by the stock Llama class). Held-out text goes through twice, under the original and under the fitted
routers. In memory: one layer in float32, and the hidden states of all text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, silu

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import DTYPES
from prismoe.errors import NumericalError
from prismoe.importing.llama_moe import EXPERT, LlamaMoe
from prismoe.progress import Progress

__all__ = ["Fit", "fit_routers"]

IdArray = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]
Route = Callable[[torch.Tensor], torch.Tensor]
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class Fit:
    """`rows` [L] of [E, D], rounded as they are stored. Agreement is measured on held-out text, inputs of the original.

    agreement [L]: share of the K chosen experts that both routers choose. same_choice [L]: share of tokens for which
    all K are the same. Losses: nats per token of the held-out text under the original and the fitted routers.
    """

    rows: list[Rows]
    agreement: list[float]
    same_choice: list[float]
    loss_original: float
    loss_fitted: float


@torch.no_grad()
def fit_routers(
    checkpoint: Checkpoint,
    model: LlamaMoe,
    *,
    text: IdArray,
    heldout: IdArray,
    ridge: float,
    on_progress: Progress,
) -> Fit:
    """Fit on `text` [N, T], measure on `heldout` [M, T].

    Minimises ‖X·Wᵀ − Z‖² + λ‖W‖² over the tokens, Z the logits less their mean over the experts (which no softmax
    sees), λ = `ridge` times the mean diagonal of XᵀX.

    Raises:
        NumericalError: a hidden state, a row or a loss is not finite.
    """
    base = _one_layer(model)
    states = {"fit": _embed(checkpoint, text), "original": _embed(checkpoint, heldout)}
    states["fitted"] = states["original"].clone()
    rows, agreement, same = [], [], []
    layers = model.dense.num_layers
    for layer in range(layers):
        on_progress("fit routers: layers", layer, layers)
        block = _load(base, checkpoint, model, layer)
        original = _original_router(checkpoint, model, layer)
        fitting = _Normal(model.dense.hidden_size, model.num_experts)
        states["fit"] = _through(base, block, states["fit"], original, fitting.add)
        dtype = DTYPES[checkpoint.tensors[model.router_keys(layer)[0]].dtype]
        stored = fitting.solve(ridge, where=f"layer {layer}").astype(dtype).astype(np.float32)
        rows.append(stored)
        weight = torch.from_numpy(stored)
        counts = np.zeros(3, np.int64)

        def compare(
            x_TD: torch.Tensor, logits_TE: torch.Tensor, weight: torch.Tensor = weight, counts: Any = counts
        ) -> None:
            chosen, ours = (z.topk(model.top_k).indices for z in (logits_TE, linear(x_TD, weight)))
            common = (chosen[:, :, None] == ours[:, None, :]).any(-1).sum(-1)
            counts[:] += [int(common.sum()), int((common == model.top_k).sum()), len(x_TD)]

        states["original"] = _through(base, block, states["original"], original, compare)
        states["fitted"] = _through(base, block, states["fitted"], lambda x, w=weight: linear(x, w))  # type: ignore[misc]
        agreement.append(float(counts[0] / (counts[2] * model.top_k)))
        same.append(float(counts[1] / counts[2]))
    on_progress("fit routers: layers", layers, layers)
    losses = [_loss(checkpoint, model, states[name], heldout) for name in ("original", "fitted")]
    if not all(map(math.isfinite, losses)):
        raise NumericalError(
            "held-out loss is not finite", where=str(checkpoint.folder), hint="look for damaged weights"
        )
    return Fit(rows, agreement, same, *losses)


class _Normal:
    """Sums of the normal equations, in float64."""

    def __init__(self, hidden: int, experts: int) -> None:
        self.xx_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.xz_DE = torch.zeros(hidden, experts, dtype=torch.float64)

    def add(self, x_TD: torch.Tensor, logits_TE: torch.Tensor) -> None:
        wide = x_TD.double()
        self.xx_DD += wide.T @ wide
        self.xz_DE += wide.T @ (logits_TE - logits_TE.mean(-1, keepdim=True)).double()

    def solve(self, ridge: float, *, where: str) -> npt.NDArray[np.float64]:
        """[E, D] rows."""
        diagonal = self.xx_DD.diagonal()
        damped = self.xx_DD + torch.diag(torch.full_like(diagonal, ridge * float(diagonal.mean())))
        solved, info = torch.linalg.solve_ex(damped, self.xz_DE)
        found: npt.NDArray[np.float64] = solved.T.numpy()
        if int(info) or not np.isfinite(found).all():
            raise NumericalError("router rows are not finite", where=where, hint="more text, or a larger ridge")
        return found


class _Experts(nn.Module):
    """The routed FFN of one layer; `route` gives logits, `watch` sees inputs and logits."""

    def __init__(self, experts: list[tuple[torch.Tensor, ...]], *, top_k: int, scale: float) -> None:
        super().__init__()
        self.experts, self.top_k, self.scale = experts, top_k, scale
        self.route: Route | None = None
        self.watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.route is not None
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = self.route(x_TD)
        if self.watch is not None:
            self.watch(x_TD, logits_TE)
        kept, chosen = logits_TE.topk(self.top_k)
        weights = self.scale * kept.softmax(-1)
        out = torch.zeros_like(x_TD)
        for expert, (gate, up, down) in enumerate(self.experts):
            token, place = torch.nonzero(chosen == expert, as_tuple=True)
            if len(token):
                h = silu(linear(x_TD[token], gate)) * linear(x_TD[token], up)
                out.index_add_(0, token, weights[token, place, None] * linear(h, down))
        return out.view_as(x)


def _one_layer(model: LlamaMoe) -> Any:
    """A stock Llama of one layer without vocabulary, FFN and last norm."""
    from transformers import LlamaConfig, LlamaModel

    dense = model.dense
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=dense.hidden_size,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=dense.num_heads,
        num_key_value_heads=dense.num_kv_heads,
        head_dim=dense.head_dim,
        max_position_embeddings=dense.max_positions,
        rms_norm_eps=dense.rms_eps,
        rope_parameters={**(dense.rope_scaling or {"rope_type": "default"}), "rope_theta": dense.rope_theta},
        attention_bias=dense.qkv_bias,
        pad_token_id=None,
    )
    base = LlamaModel(config).eval()
    base.norm = nn.Identity()
    return base


def _load(base: Any, checkpoint: Checkpoint, model: LlamaMoe, layer: int) -> _Experts:
    """Put layer `layer` into `base`; returns its FFN."""
    prefix, module = f"model.layers.{layer}.", base.layers[0]
    module.mlp = nn.Identity()
    for name, parameter in module.named_parameters():
        parameter.copy_(_tensor(checkpoint, prefix + name))
    parts = ("gate", "up", "down")
    experts = [
        tuple(_tensor(checkpoint, EXPERT.format(l=layer, e=e, part=part)) for part in parts)
        for e in range(model.num_experts)
    ]
    module.mlp = _Experts(experts, top_k=model.top_k, scale=model.scales[layer])
    block: _Experts = module.mlp
    return block


def _original_router(checkpoint: Checkpoint, model: LlamaMoe, layer: int) -> Route:
    first, second = (_tensor(checkpoint, key) for key in model.router_keys(layer))
    return lambda x_TD: linear(torch.tanh(linear(x_TD, first)), second)


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(checkpoint.array(name), np.float32))


def _embed(checkpoint: Checkpoint, ids_NT: IdArray) -> torch.Tensor:
    return torch.from_numpy(checkpoint.array("model.embed_tokens.weight")[ids_NT].astype(np.float32))


def _through(
    base: Any,
    block: _Experts,
    states_NTD: torch.Tensor,
    route: Route,
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """All sequences through the layer, in place."""
    block.route, block.watch = route, watch
    step = max(1, TOKENS_AT_ONCE // states_NTD.shape[1])
    for first in range(0, len(states_NTD), step):
        part = states_NTD[first : first + step]
        part.copy_(base(inputs_embeds=part, use_cache=False).last_hidden_state)
    if not torch.isfinite(states_NTD).all():
        raise NumericalError("hidden states are not finite", where="import", hint="look for damaged weights")
    return states_NTD


def _loss(checkpoint: Checkpoint, model: LlamaMoe, states_NTD: torch.Tensor, ids_NT: IdArray) -> float:
    """Mean nats of every token but the first of each sequence."""
    head = "model.embed_tokens.weight" if model.dense.tie_embeddings else "lm_head.weight"
    gain, weight = _tensor(checkpoint, "model.norm.weight"), _tensor(checkpoint, head)
    total = 0.0
    for state_TD, ids_T in zip(states_NTD, torch.from_numpy(ids_NT), strict=True):
        root = torch.rsqrt(state_TD.pow(2).mean(-1, keepdim=True) + model.dense.rms_eps)
        logits_TV = linear(gain * (state_TD * root), weight)
        total += float(cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum").double())
    return float(total / (len(ids_NT) * (ids_NT.shape[1] - 1)))
