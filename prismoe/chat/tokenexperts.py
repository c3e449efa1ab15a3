"""Which experts each token of an answer went through."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError

if TYPE_CHECKING:
    from prismoe.train.routers import Router

__all__ = ["ExpertRecord", "TokenExperts"]


@dataclass(frozen=True)
class TokenExperts:
    """`chosen[t][l]`: the experts, best first, that token t of an answer went through in the l-th of `layers` when the
    model read it to write the next one. The last token was not read any more: `chosen` is one shorter than `tokens`.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    chosen: tuple[tuple[tuple[int, ...], ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class ExpertRecord:
    """The routers of one model, looked at after each forward pass; use `of`, then `begin`, `add` and `take`."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = routers
        self._chosen: list[tuple[tuple[int, ...], ...]] = []
        self._prompt = True

    @classmethod
    @contextmanager
    def of(cls, model: Any) -> Iterator[ExpertRecord]:
        """A record on `model` while the context is open.

        Raises:
            InputError: it has no router.
            UsageError: a mixture whose class does not declare its routers.
        """
        from prismoe.train.routing import watch

        with watch(model) as routers:
            if not routers:
                raise InputError(
                    "no router in it", where=str(model.config.model_type), needed="a mixture", hint="experts=false"
                )
            yield cls(routers)

    def begin(self) -> None:
        """An answer begins: the next pass reads its prompt."""
        self._chosen, self._prompt = [], True

    def add(self) -> None:
        """Note what the latest pass, over one token of the answer, has chosen."""
        if not self._prompt:
            self._chosen.append(
                tuple(tuple(int(number) for number in router.chosen_TK[-1]) for router in self._routers)
            )
        self._prompt = False

    def take(self, tokens: Sequence[str]) -> TokenExperts:
        """What there is of the answer `tokens`."""
        layers = tuple(int(re.findall(r"\d+", router.name)[0]) for router in self._routers)
        return TokenExperts(tuple(tokens), layers, self._routers[0].num_experts, tuple(self._chosen[: len(tokens)]))
