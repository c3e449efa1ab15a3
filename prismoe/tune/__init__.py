"""Instruction tuning: from a mixture to a chat model. Names are loaded when they are first used, torch with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismoe.tune.job import Tuned, tune
    from prismoe.tune.settings import TuneConfig

__all__ = ["TuneConfig", "Tuned", "tune"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "settings" if name == "TuneConfig" else "job"
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value
