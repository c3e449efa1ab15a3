"""Mixing rules, one file each: the file's name is the rule's name.

A rule is `update(weights, losses, reference, **own arguments) -> weights`, pure. `losses` and `reference` are mean
losses per held-out token by domain, language modelling only (never with a router loss in them). What it returns goes
to `Mixture.set_weights` at the step where the losses were measured.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping

from prismoe.errors import UsageError

__all__ = ["Rule", "load_rule", "rule_names"]

Rule = Callable[..., Mapping[str, float]]


def rule_names() -> tuple[str, ...]:
    """Names of the rules that are there, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_rule(name: str) -> Rule:
    """The `update` function of a rule.

    Raises:
        UsageError: there is no rule of that name.
    """
    if name not in rule_names():
        raise UsageError(f"unknown mixing rule {name!r}", needed=f"one of {', '.join(rule_names())}")
    update: Rule = importlib.import_module(f"{__name__}.{name}").update
    return update
