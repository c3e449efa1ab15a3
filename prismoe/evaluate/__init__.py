"""Several models side by side on held-out text of each domain and on benchmark tasks.

Names are loaded when they are first used: what can be told of tasks and their files needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismoe.evaluate.compare import TaskScore
    from prismoe.evaluate.control import Control, static_control
    from prismoe.evaluate.heldout import DomainScore
    from prismoe.evaluate.job import Scores, evaluate

__all__ = ["Control", "DomainScore", "Scores", "TaskScore", "evaluate", "static_control"]

_HOMES = {"TaskScore": "compare", "Control": "control", "static_control": "control", "DomainScore": "heldout"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'job')}"), name)
    return value
