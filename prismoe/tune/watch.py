"""Who trains: the parameters of a model by role, with the norms of their gradients. A role that stands still is told.

Roles are told by what a parameter is part of, never by a part of its name: "gate" is in the name of routers and of
experts, and code that froze the one by that word froze the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prismoe.errors import NumericalError
from prismoe.train.routers import Router

__all__ = ["EXPERTS", "Role", "Roles", "check_run", "expert_modules", "role_of_module"]

_ZERO = 1e-12  # of the whole gradient: below it is rounding

EXPERTS = ("experts gate", "experts up", "experts down")
SHARED_A = "experts gate and up, A"


@dataclass(frozen=True)
class Role:
    """One row of the receipt's table: numbers of parameters, and the norm of their gradient after the first step."""

    role: str
    parameters: int
    trainable: int
    gradient_norm: float | None


@dataclass(frozen=True, eq=False)
class _Part:
    parameter: torch.nn.Parameter
    name: str
    view: Callable[[torch.Tensor], torch.Tensor]
    is_adapter: bool


def expert_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The modules that hold the stacked matrices of routed experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and "down_proj" in dict(module.named_parameters(recurse=False))
    }


def role_of_module(name: str) -> str:
    """The role of matrices under the module `name` that are no router's, no experts' and no embedding's."""
    words = name.split(".")
    if any("shared" in word for word in words):
        return "shared expert"
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    return "dense FFN" if any(word in ("mlp", "feed_forward") for word in words) else "other"


def check_run(routers: Sequence[Router]) -> None:
    """Refuse a router that the latest forward pass went past: it is watched in vain, its balance loss is nobody's.

    Raises:
        NumericalError: which one.
    """
    if silent := [router.name for router in routers if not router.has_run]:
        raise NumericalError(
            "the forward pass does not run this router", where=silent[0], needed="a router that is watched"
        )


class Roles:
    """The parameters of `model` (with or without adapters) and those of its router policy, sorted by role."""

    def __init__(
        self, model: torch.nn.Module, routers: Sequence[Router], policy_parameters: Sequence[torch.nn.Parameter] = ()
    ) -> None:
        self._parts: dict[str, list[_Part]] = {}
        of_routers = {id(parameter) for router in routers for parameter in router.module.parameters()}
        stacked = {id(p): module for module in expert_modules(model).values() for p in module.parameters(recurse=False)}
        inner: Any = model
        heads = {"head": inner.get_output_embeddings(), "embeddings": inner.get_input_embeddings()}  # tied: the latter
        ends = {id(p): role for role, module in heads.items() if module is not None for p in module.parameters()}
        wrappers = _wrappers(model)
        for name, parameter in model.named_parameters():
            if id(parameter) in of_routers:
                self._add("router", parameter, name)
            elif id(parameter) in stacked:
                self._add_stacked(parameter, name, transposed=bool(stacked[id(parameter)].is_transposed))
            elif id(parameter) in wrappers:
                self._add_adapter(parameter, name, *wrappers[id(parameter)])
            elif id(parameter) in ends:
                self._add(ends[id(parameter)], parameter, name)
            elif ".lora_" in name:
                self._add(role_of_module(name), parameter, name, is_adapter=True)
            elif parameter.ndim < 2 and "norm" in name:
                self._add("norms", parameter, name)
            else:
                self._add(role_of_module(name), parameter, name)
        for number, parameter in enumerate(policy_parameters):
            self._add("router noise", parameter, f"router policy {number}")

    def _add(
        self,
        role: str,
        parameter: torch.nn.Parameter,
        name: str,
        view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        *,
        is_adapter: bool = False,
    ) -> None:
        self._parts.setdefault(role, []).append(_Part(parameter, name, view, is_adapter))

    def _add_stacked(self, parameter: torch.nn.Parameter, name: str, *, transposed: bool) -> None:
        """Stacked experts: `gate_up_proj` holds gate and up one behind the other along the output axis."""
        kind = name.rpartition(".")[2]
        if kind.startswith("gate_up_proj"):
            axis = -1 if transposed or parameter.ndim == 2 else -2
            self._add("experts gate", parameter, name, lambda tensor: tensor.chunk(2, dim=axis)[0])
            self._add("experts up", parameter, name, lambda tensor: tensor.chunk(2, dim=axis)[1])
        else:
            self._add("experts up" if kind.startswith("up_proj") else "experts down", parameter, name)

    def _add_adapter(self, parameter: torch.nn.Parameter, name: str, target: str, side: str) -> None:
        """An adapter of stacked experts: B has the rows of gate and up, and A serves both."""
        if target != "gate_up_proj":
            self._add("experts up" if target == "up_proj" else "experts down", parameter, name, is_adapter=True)
        elif side == "A":
            self._add(SHARED_A, parameter, name, is_adapter=True)
        else:
            self._add("experts gate", parameter, name, lambda tensor: tensor.chunk(2, dim=0)[0], is_adapter=True)
            self._add("experts up", parameter, name, lambda tensor: tensor.chunk(2, dim=0)[1], is_adapter=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def table(self) -> list[Role]:
        """One row for each role; norms are those of the gradients that are there now."""
        rows = []
        for role, parts in self._parts.items():
            total = sum(part.view(part.parameter.detach()).numel() for part in parts)
            trainable = [part for part in parts if part.parameter.requires_grad]
            count = sum(part.view(part.parameter.detach()).numel() for part in trainable)
            rows.append(Role(role, total, count, _norm(trainable) if trainable else None))
        return rows

    def check_trainable(self, wanted: Sequence[str], *, adapted: Sequence[str] = ()) -> None:
        """Before training: every `wanted` role trains in full, every `adapted` one by an adapter, and no other.

        Raises:
            NumericalError: a role does not train as it should, or trains although it should not.
        """
        for role, parts in self._parts.items():
            frozen = [part for part in parts if not part.parameter.requires_grad]
            if role in wanted and frozen:
                raise NumericalError(
                    f"{len(frozen)} of {len(parts)} tensors are frozen, such as {frozen[0].name}",
                    where=role,
                    needed="a role that trains",
                )
            adapters = [part for part in parts if part.is_adapter]
            if role in adapted and (not adapters or any(not part.parameter.requires_grad for part in adapters)):
                raise NumericalError("no adapter that trains", where=role, needed="an adapter on each matrix")
            moving = [part for part in parts if part.parameter.requires_grad]
            if role not in (*wanted, *adapted, SHARED_A) and moving:
                raise NumericalError(f"{moving[0].name} trains", where=role, needed="a role that stays as it is")

    def check_gradients(self, wanted: Sequence[str], *, step: int) -> None:
        """After the first backward pass: every `wanted` role has a gradient, stacked experts in each layer.

        Raises:
            NumericalError: which role has none.
        """
        whole = sum((row.gradient_norm or 0.0) ** 2 for row in self.table()) ** 0.5
        for role in wanted:
            parts = [part for part in self._parts.get(role, ()) if part.parameter.requires_grad]
            # A role as a whole; of experts each matrix by itself, where an adapter begins with a gradient of B alone.
            each = [[part] for part in parts if not part.is_adapter] if role in EXPERTS else []
            for group in [parts, *each]:
                norm = _norm(group)
                if parts and not norm > _ZERO * whole:
                    raise NumericalError(
                        f"the gradient of {group[0].name} is zero ({norm:.0e} of {whole:.0e})",
                        where=f"{role}, step {step}",
                        needed="a role that trains",
                        hint="nothing was written; does the loss reach it?",
                    )


def _wrappers(model: torch.nn.Module) -> dict[int, tuple[str, str]]:
    """Parameters of adapters on stacked experts: id -> (name of the adapted parameter, "A" or "B")."""
    found = {}
    for module in model.modules():
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
            for side in ("A", "B"):
                for parameter in getattr(module, f"lora_{side}").parameters():
                    found[id(parameter)] = (str(module.parameter_name), side)
    return found


@torch.no_grad()
def _norm(parts: Sequence[_Part]) -> float:
    squares = [
        part.view(part.parameter.grad).double().square().sum() for part in parts if part.parameter.grad is not None
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
