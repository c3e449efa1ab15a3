"""Router policies: what happens to the routers of a stock model while it trains, and nowhere else.

The folder is the registry: `routers/NAME.py` defines `attach(routers, *, …) -> Policy`, and the keyword
arguments of `attach` are the policy's schema. A policy never changes what is saved.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from prismoe.errors import UsageError

if TYPE_CHECKING:
    import torch

    from prismoe.train.routing import Router

__all__ = ["Policy", "arguments_of", "attach_policy", "names"]


class Policy(Protocol):
    """A policy at work. `loss` is differentiable and speaks of the latest forward pass."""

    def loss(self) -> torch.Tensor: ...

    def detach(self) -> None: ...


def names() -> list[str]:
    """All policies, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def arguments_of(name: str, arguments: Mapping[str, Any], *, where: str = "pretrain.router") -> dict[str, Any]:
    """`arguments` completed with the defaults of policy `name`.

    Raises:
        UsageError: unknown policy, unknown argument, or a value of the wrong type.
    """
    if name not in names():
        guess = get_close_matches(name, names(), n=1)
        raise UsageError(
            f"unknown router policy {name!r}",
            where=where,
            needed=f"one of {', '.join(names())}",
            hint=f"did you mean {guess[0]!r}?" if guess else "",
        )
    known = {
        parameter.name: parameter
        for parameter in inspect.signature(_module(name).attach).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    complete = {key: parameter.default for key, parameter in known.items()}
    for key, value in arguments.items():
        if key not in known:
            guess = get_close_matches(key, list(known), n=1)
            raise UsageError(
                f"policy {name!r} has no argument {key!r}",
                where=where,
                needed=f"one of {', '.join(known)}" if known else "no arguments",
                hint=f"did you mean {guess[0]!r}?" if guess else "",
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{key} is {value!r}", where=where, needed="a number")
        complete[key] = type(known[key].default)(value)
    return complete


def attach_policy(name: str, routers: Sequence[Router], *, arguments: Mapping[str, Any]) -> Policy:
    """Put policy `name` on the routers of a model; `arguments` as completed by `arguments_of`."""
    policy: Policy = _module(name).attach(routers, **arguments)
    return policy


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
