"""Adapters of low rank (Hu et al. 2021) on a stock mixture, by PEFT: one for each expert and matrix, merged at the end.

Stock classes keep all experts of a layer in one parameter [E, …]; PEFT adapts such a parameter with A and B for each
expert. Merging is checked and not believed: every matrix has to change by what its adapter says, in exactly the experts
whose adapter has moved, and the logits have to be those of model and adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prismoe.errors import NumericalError, UsageError
from prismoe.train.routers import Router
from prismoe.tune.settings import TuneConfig
from prismoe.tune.watch import expert_modules, role_of_module

__all__ = ["Merged", "adapted", "merge"]

_TOLERANCE = 1e-4  # of the spread of the logits; measured 1e-6 in float32


@dataclass(frozen=True)
class Merged:
    """What merging did. Attributes:

    change: for each layer and expert the Frobenius norm of the change over that of the weights, all matrices together.
    unchanged: experts whose weights are what they were; `unchanged_used` of them had tokens in training.
    logits: greatest difference of the logits before and after, over their spread.
    """

    change: list[list[float]]
    unchanged: int
    unchanged_used: int
    logits: float


def adapted(model: Any, config: TuneConfig, routers: Sequence[Router]) -> Any:
    """`model` with adapters of `config`, which alone train; beside them the routers, in full, unless they are frozen.

    Raises:
        UsageError: no matrix of a wanted kind.
    """
    from peft import LoraConfig, get_peft_model

    wanted = {"attention": "attention", "shared": "shared expert"}
    roles = {wanted[target] for target in config.lora_targets if target != "experts"}
    inside = {id(module) for router in routers for module in router.module.modules()}
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and role_of_module(name) in roles and id(module) not in inside | ends
    ]
    parameters = []
    if "experts" in config.lora_targets:
        for name, module in expert_modules(model).items():
            parameters += [f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if not modules and not parameters:
        raise UsageError(
            f"no {' and no '.join(config.lora_targets)} in this model", where="tune.lora_targets", needed="what it has"
        )
    found = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        wrapped = get_peft_model(model, found)
    for router in routers:
        for parameter in router.module.parameters():
            parameter.requires_grad_(config.router_training != "freeze")
    return wrapped


@torch.no_grad()
def merge(model: Any, *, probe_BT: torch.Tensor, load_LE: Sequence[Sequence[int]]) -> tuple[Any, Merged]:
    """The stock model with its adapters added into the weights, and what that changed.

    Args:
        model: as `adapted` gave it.
        probe_BT: ids whose logits are compared.
        load_LE: tokens that each expert had in training, layer by layer.

    Raises:
        NumericalError: an expert did not change as its adapter says, or the logits are others.
    """
    model.eval()
    before_BTV = model(input_ids=probe_BT, use_cache=False).logits.float()
    layers: dict[str, list[torch.Tensor]] = {}
    for name, adapter in _adapters(model):
        stacked = hasattr(adapter, "parameter_name")
        weight = adapter.get_param() if stacked else adapter.get_base_layer().weight
        old, delta = weight.detach().clone(), adapter.get_delta_weight("default").double()
        adapter.merge(safe_merge=True)
        changed = (weight.detach() - old).double()
        error = float((changed - delta).norm() / delta.norm().clamp_min(1e-30))
        if bool(delta.any()) and not error < 1e-2:  # a change near the rounding of the weights is rounded with them
            raise NumericalError(f"merging changed it otherwise than its adapter says ({error:.0e})", where=name)
        if stacked:
            squares_2E = torch.stack([tensor.double().square().sum(dim=(1, 2)) for tensor in (changed, old)]).cpu()
            layers.setdefault(name, []).append(squares_2E)
    change = []
    for squares in layers.values():
        changed_E, old_E = torch.stack(squares).sum(dim=0)
        change.append((changed_E / old_E.clamp_min(1e-30)).sqrt().tolist())
    used = [[count > 0 for count in layer] for layer in load_LE]
    still = [
        was_used
        for row, uses in zip(change, used, strict=False)
        for moved, was_used in zip(row, uses, strict=True)
        if not moved
    ]
    if any(still):
        raise NumericalError(
            f"{sum(still)} experts that had tokens did not change",
            where="merging",
            needed="a change in every expert that was trained",
        )
    stock = model.unload()
    after_BTV = stock(input_ids=probe_BT, use_cache=False).logits.float()
    logits = float((after_BTV - before_BTV).abs().max() / before_BTV.std().clamp_min(1e-30))
    if not logits < _TOLERANCE:
        raise NumericalError(
            f"merged logits are off by {logits:.0e} deviations", where="merging", needed=f"less than {_TOLERANCE:.0e}"
        )
    return stock, Merged(change=change, unchanged=len(still), unchanged_used=sum(still), logits=logits)


def _adapters(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapter with the name of the module that it adapts; those of one module follow each other."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight"):
            stem = ".".join(word for word in name.split(".") if word != "base_layer")
            yield stem.removeprefix("base_model.model."), module


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT asks transformers by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield
