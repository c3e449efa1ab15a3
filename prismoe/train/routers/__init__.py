"""Router policies: what happens to the routers of a stock model while it trains, and nowhere else.

The folder is the registry: `routers/NAME.py` defines `attach(routers, *, …) -> Policy`, and the keyword
arguments of `attach` are the policy's schema. A policy never changes what is saved. No torch at import: a
config file is checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prismoe import registry

if TYPE_CHECKING:
    import torch

__all__ = ["Policy", "Router", "arguments_of", "attach_policy"]


@dataclass(eq=False)
class Router:
    """One stock router while it is watched: what it said in the latest forward pass.

    `logits_TE` are the raw logits with their graph, `chosen_TK` the experts that were used.
    """

    name: str
    module: torch.nn.Module
    num_experts: int
    top_k: int
    _logits: torch.Tensor | None = None
    _chosen: torch.Tensor | None = None

    @property
    def logits_TE(self) -> torch.Tensor:
        assert self._logits is not None, f"{self.name} has not been run"
        return self._logits

    @property
    def chosen_TK(self) -> torch.Tensor:
        assert self._chosen is not None, f"{self.name} has not been run"
        return self._chosen

    def keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook: stock routers return (logits, weights, chosen experts)."""
        self._logits, _, self._chosen = output

    def forget(self) -> None:
        """Drop the latest forward pass, so that its graph can be freed."""
        self._logits = self._chosen = None


class Policy(Protocol):
    """A policy at work. `loss` is differentiable and speaks of the latest forward pass."""

    def loss(self) -> torch.Tensor: ...

    def detach(self) -> None:
        """Undo whatever `attach` put on the model."""


def arguments_of(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of policy `name`, checked and completed with its defaults.

    Raises:
        UsageError: unknown policy, unknown arguments, or values of the wrong type.
    """
    attach = registry.load(__name__, name, where="pretrain.router").attach
    return registry.arguments(attach, arguments, where=f"pretrain.router {name}")


def attach_policy(name: str, routers: Sequence[Router], *, arguments: Mapping[str, Any]) -> Policy:
    """Put policy `name` on the routers of a model; `arguments` as completed by `arguments_of`."""
    policy: Policy = registry.load(__name__, name, where="pretrain.router").attach(routers, **arguments)
    return policy
