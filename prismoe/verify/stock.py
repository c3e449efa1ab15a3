"""Stock transformers models of one layer, or of none, loaded strictly from part of a checkpoint folder.

A one-layer model is the stock class with `num_hidden_layers` 1 and the tensors of layer i renamed to layer 0. Hidden
states go in as `inputs_embeds`, so its vocabulary is cut to one row. A zero-layer model is embedding, last norm and
head at full size. Chained, they are the whole model in the memory of its largest part (bit-exact: a test says so).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError

__all__ = ["Ends", "FFNRun", "Layer", "Loading", "all_experts_on", "load_ends", "load_layer", "load_whole", "quietly"]

LAYERS = "model.layers."  # every source family and every target keeps its layers here


@dataclass(frozen=True)
class Loading:
    """Names that did not find their place; a strict load has none."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        return [
            f"{what} {name}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mismatched", self.mismatched),
            )
            for name in names
        ]


@dataclass(frozen=True)
class FFNRun:
    """One pass through a layer, [T, D] each: what the FFN got and gave, and the hidden state after the layer."""

    input_TD: torch.Tensor
    output_TD: torch.Tensor
    hidden_TD: torch.Tensor


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; the loading info says the same."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _stock_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    try:
        with quietly():
            return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each field's validator has an exception of its own
        raise InputError(
            f"stock transformers cannot read it: {' '.join(str(error).split())[:200]}",
            where=str(checkpoint.folder / "config.json"),
        ) from error


def _tensor(checkpoint: Checkpoint, name: str, *, rows: int | None = None) -> torch.Tensor:
    """A private copy: transformers may keep it as the parameter, and the file's pages are read-only."""
    array = np.array(checkpoint.array(name, rows=rows))
    if checkpoint.tensors[name].dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _load(config: Any, state: dict[str, torch.Tensor], *, layer: int | None) -> tuple[Any, Loading]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    stock_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quietly():
        model, info = stock_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that a mismatch is reported to us instead of thrown without its name
        )
    return model, _loading(info, layer=layer)


def _loading(info: dict[str, Any], *, layer: int | None) -> Loading:
    def names(key: str) -> tuple[str, ...]:
        found = (entry if isinstance(entry, str) else entry[0] for entry in info[key])
        here = (name.replace(f"{LAYERS}0.", f"{LAYERS}{layer}.", 1) if layer is not None else name for name in found)
        return tuple(sorted(here))

    return Loading(
        missing=names("missing_keys"), unexpected=names("unexpected_keys"), mismatched=names("mismatched_keys")
    )


def _outer_names(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if not name.startswith(LAYERS)]


def load_layer(checkpoint: Checkpoint, layer: int, *, without: Sequence[str] = ()) -> tuple[Layer, Loading]:
    """Layer `layer` of `checkpoint` in float32, in the stock class of its config.

    `without` names tensors of the file that the stock class is known to ignore. A missing tensor is left as the class
    draws it: look at the `Loading` before trusting a number.
    """
    config = _stock_config(checkpoint)
    _check_depth(config, checkpoint, layer)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 1.0  # hidden states come in where embeddings do, and have it already
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layer : layer + 1]
    if hasattr(config, "mlp_only_layers"):
        dense = layer in (config.mlp_only_layers or ()) or (layer + 1) % config.decoder_sparse_step != 0
        config.mlp_only_layers, config.decoder_sparse_step = [0] if dense else [], 1
    for first in ("first_k_dense_replace", "moe_layer_start_index"):
        if hasattr(config, first):
            setattr(config, first, int(layer < getattr(config, first)))
    if hasattr(config, "moe_layer_end_index"):
        config.moe_layer_end_index = 0
    if hasattr(config, "mlp_layer_types"):
        config.mlp_layer_types = config.mlp_layer_types[layer : layer + 1]
    if isinstance(getattr(config, "moe_topk", None), list):
        config.moe_topk = config.moe_topk[layer : layer + 1]
    if hasattr(config, "layer_rope_theta"):
        config.layer_rope_theta = config.layer_rope_theta[layer : layer + 1]
    prefix = f"{LAYERS}{layer}."
    state = {
        f"{LAYERS}0.{name.removeprefix(prefix)}": _tensor(checkpoint, name)
        for name in checkpoint.tensors
        if name.startswith(prefix) and name not in without
    }
    for name in _outer_names(checkpoint):
        if name not in without:
            state[name] = _tensor(checkpoint, name, rows=1 if len(checkpoint.tensors[name].shape) == 2 else None)
    model, loading = _load(config, state, layer=layer)
    return Layer(model.eval()), loading


def load_ends(checkpoint: Checkpoint, *, without: Sequence[str] = ()) -> tuple[Ends, Loading]:
    """Embedding, last norm and head of `checkpoint` in float32: the stock model with no layers."""
    config = _stock_config(checkpoint)
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    state = {name: _tensor(checkpoint, name) for name in _outer_names(checkpoint) if name not in without}
    factor = getattr(config, "embedding_multiplier", 1.0)
    if factor != 1.0:
        config.embedding_multiplier = 1.0
    model, loading = _load(config, state, layer=None)
    return Ends(model.eval(), factor), loading


def load_whole(checkpoint: Checkpoint) -> tuple[Any, Loading]:
    """The folder as a user loads it, in float32."""
    from transformers import AutoModelForCausalLM

    with quietly():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return model.eval(), _loading(info, layer=None)


def _check_depth(config: Any, checkpoint: Checkpoint, layer: int) -> None:
    if layer >= config.num_hidden_layers:
        raise InputError(
            f"no layer {layer}", where=str(checkpoint.folder / "config.json"), needed=f"< {config.num_hidden_layers}"
        )


class Ends:
    """The model around the layers: token ids to the first hidden state, the last hidden state to logits."""

    def __init__(self, model: Any, factor: float = 1.0) -> None:
        self.model, self.factor = model, factor

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """[T, D] hidden state before the first layer."""
        caught: list[torch.Tensor] = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            with torch.no_grad():
                self.model.model(input_ids=ids_T[None], use_cache=False)
        finally:
            hook.remove()
        return caught[0][0] * self.factor

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, vocabulary] logits after the last norm."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(inputs_embeds=hidden_TD[None], use_cache=False).logits[0]
        return logits


class Layer:
    """One decoder layer in its stock model, with its FFN (dense, or router and experts) laid open."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.module: nn.Module = model.model.layers[0]

    @property
    def block(self) -> nn.Module:
        """The MLP, or router with experts."""
        found: nn.Module = getattr(self.module, "block_sparse_moe", None) or self.module.mlp  # type: ignore[assignment]
        return found

    @property
    def shared(self) -> nn.Module | None:
        """The shared expert where it stands beside the block (granitemoeshared); one inside the block is part of it."""
        found: nn.Module | None = getattr(self.module, "shared_mlp", None)
        return found

    def run(self, hidden_TD: torch.Tensor) -> FFNRun:
        """The whole layer: attention, norms, FFN, residuals."""
        caught: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: caught.__setitem__(name, output[0])

        parts = {"routed": self.block, "shared": self.shared, "hidden": self.module}
        hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items() if part is not None]
        hooks.append(
            self.block.register_forward_pre_hook(lambda module, inputs: caught.__setitem__("input", inputs[0][0]))
        )
        try:
            with torch.no_grad():
                self.model.model(inputs_embeds=hidden_TD[None], use_cache=False)
        except RuntimeError as error:  # grouped matrix products refuse widths that are not a multiple of 16 bytes
            raise InputError(
                f"the stock class loads it and cannot run it: {str(error).splitlines()[0]}",
                where=type(self.module).__name__,
                hint="convert with pad_to=32",
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        output_TD = caught["routed"] + caught["shared"] if "shared" in caught else caught["routed"]
        return FFNRun(input_TD=caught["input"], output_TD=output_TD, hidden_TD=caught["hidden"])

    def ffn(self, input_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] output of the feed-forward block: routed experts plus the shared one."""
        with torch.no_grad():
            output: torch.Tensor = self.block(input_TD[None])[0]
            return output if self.shared is None else output + self.shared(input_TD[None])[0]

    def route(self, input_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([E, D] router rows, [T, K] experts the stock router keeps)."""
        router, rows = find_router(self.module)
        with torch.no_grad():
            chosen = [part for part in router(input_TD) if not part.is_floating_point()]
        return rows.weight.detach(), chosen[0]


def find_router(layer: nn.Module) -> tuple[Any, Any]:
    """The stock router of a layer, the one module with `top_k` beside a weight, and the module that holds that."""
    found = [
        (module, rows)
        for module in layer.modules()
        if hasattr(module, "top_k")
        for rows in (module, getattr(module, "wg", None))
        if rows is not None and "weight" in rows._parameters
    ]
    if len(found) != 1:
        raise InputError(f"{len(found)} routers in {type(layer).__name__}", needed="one")
    return found[0]


@contextmanager
def all_experts_on(layers: Iterable[nn.Module], factors: Sequence[float]) -> Iterator[None]:
    """Every expert on with gate 1: a zero router keeps all E (gates 1/E) and the routed output is multiplied by its
    factor, which is E/scale where a partition has to equal the dense FFN. The model is as before afterwards.
    """
    undo: list[tuple[Any, Any, nn.Parameter, int, Any]] = []
    try:
        for layer, factor in zip(layers, factors, strict=True):
            router, rows = find_router(layer)
            block = getattr(layer, "block_sparse_moe", None) or layer.mlp
            experts: nn.Module = block.experts  # type: ignore[assignment, union-attr]
            hook = experts.register_forward_hook(lambda module, inputs, output, by=factor: output * by)
            undo.append((router, rows, rows.weight, router.top_k, hook))
            rows.weight = nn.Parameter(torch.zeros_like(rows.weight), requires_grad=False)
            router.top_k = len(rows.weight)
        yield
    finally:
        for router, rows, weight, top_k, hook in undo:
            rows.weight, router.top_k = weight, top_k
            hook.remove()
