"""Router initialisations: one file, one way. Its `rows(layer, plan, *, …)` gives [E, D] rows, or how to draw them.

They are chosen apart from the method, because any of them goes with any split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe import registry
from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw

__all__ = ["Router"]

FROM = "from:"


@dataclass(frozen=True)
class Router:
    """A chosen initialisation with its arguments checked; `others` are arguments that are not its own.

    `auto` keeps the rows that the method made, and draws where it made none.
    """

    name: str
    rows: Callable[..., npt.NDArray[np.float32] | RouterDraw]
    arguments: dict[str, Any]
    others: dict[str, Any]
    given: tuple[str, ...]

    @classmethod
    def choose(cls, name: str, arguments: Mapping[str, Any], *, known: Iterable[str]) -> Router:
        """`name` is a file here, "auto", or "from:FILE"; `known` are the arguments of the method.

        Raises:
            UsageError: no such initialisation, or wrong arguments for it.
        """
        arguments = dict(arguments)
        module = "random" if name == "auto" else name
        if name.startswith(FROM):
            module, arguments["router_file"] = "stored", name.removeprefix(FROM)
        rows = registry.load(__name__, module, where="router").rows
        own = registry.keywords(rows).keys() - set(known)
        given = {key: value for key, value in arguments.items() if key in own}
        others = {key: value for key, value in arguments.items() if key not in own}
        return cls(name, rows, registry.arguments(rows, given, where=f"router {module}"), others, tuple(given))

    def apply(self, layer: LayerView, plan: LayerPlan) -> LayerPlan:
        """`plan` with these router rows. Rows of a virtual group become their mean: they have to be equal.

        Raises:
            UsageError: the initialisation cannot serve this plan, or its rows are all the same.
        """
        if self.name == "auto" and not isinstance(plan.router, RouterDraw):
            if self.given:
                raise UsageError("the method makes its own router rows", where=self.given[0], hint="router=random")
            return plan
        rows = self.rows(layer, plan, **self.arguments)
        if isinstance(rows, RouterDraw):
            return replace(plan, router=rows)
        grouped = rows.reshape(-1, plan.group, layer.hidden_size)
        if len(grouped) > 1 and (grouped == grouped[:1]).all():
            raise UsageError(
                "all router rows coincide: no token could tell the experts apart",
                where=f"layer {layer.index}: router={self.name}",
                hint="copies of one FFN take router=random; prompts must differ",
            )
        mean = np.broadcast_to(grouped.mean(axis=1, keepdims=True), grouped.shape)
        return replace(plan, router=np.ascontiguousarray(mean.reshape(rows.shape), np.float32))
