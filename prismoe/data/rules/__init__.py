"""Mixing rules: one file, one rule. Its `update(weights, losses, reference, *, …) -> weights` is pure.

`losses` and `reference` are mean losses a held-out token by domain, language modelling only (never with a router loss
in them); the keyword arguments of `update` are the rule's schema. A rule may also say in `result(updates)` which
weights the run as a whole recommends; otherwise it is the latest ones. `Mixing` is a rule at work on one mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prismoe import registry
from prismoe.errors import InputError, NumericalError, PrismoeError, UsageError

if TYPE_CHECKING:
    from prismoe.data.mixture import Mixture

__all__ = ["STATIC", "Mixing"]

STATIC = "static"  # the one rule that needs no reference and never moves a weight


class Mixing:
    """A rule that looks at held-out losses every `interval_tokens` and moves the weights of `mixture`.

    It keeps nothing of its own: the weights in force are the newest of `mixture.history`, which is in every training
    checkpoint, so that a resumed run moves them to the same bits. Several ranks must be given the same losses.

    Args:
        mixture: whose weights are moved; its first weights are the prior of the first update.
        rule: a file of this folder; `static` never moves anything.
        arguments: the rule's own, checked and completed with its defaults.
        reference: loss a token by domain that the rule compares with; not needed by `static`.
        interval_tokens: how often, in tokens of training over all ranks, rounded down to whole steps. 2.5e9 in
            LLaMA-MoE (arXiv 2406.16554, section 4.2).
        warnings: what a person should know of the reference, kept for the receipt.

    Raises:
        UsageError: an unknown rule or argument, no reference, an interval smaller than a step.
        InputError: a reference that misses a domain or is not finite.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        rule: str = STATIC,
        arguments: Mapping[str, Any] | None = None,
        reference: Mapping[str, float] | None = None,
        interval_tokens: int = 2_500_000_000,
        warnings: Sequence[str] = (),
    ) -> None:
        self.mixture, self.rule, self.warnings = mixture, rule, tuple(warnings)
        self._module = registry.load(__name__, rule, where="pretrain.mixing")
        self.arguments = registry.arguments(self._module.update, arguments or {}, where=f"pretrain.mixing {rule}")
        self.reference = {} if rule == STATIC else _checked(reference, mixture.names, rule=rule)
        tokens_per_step = mixture.batch_size * mixture.seq_len
        self.interval = interval_tokens // tokens_per_step
        if rule != STATIC and self.interval < 1:
            raise UsageError(
                f"{interval_tokens} tokens, less than a step of {tokens_per_step}",
                where="pretrain.mixing_every_tokens",
                needed="one step or more",
            )

    def due(self, step: int) -> bool:
        """Whether held-out losses are wanted before `step` is trained."""
        return self.rule != STATIC and step > 0 and step % self.interval == 0

    def update(self, step: int, losses: Mapping[str, float]) -> dict[str, Any] | None:
        """Draw from `step` on with the weights that follow from `losses`; returns a line for the log, None if not due.

        Raises:
            NumericalError: a loss is not finite.
        """
        if not self.due(step):
            return None
        if wrong := sorted(name for name in self.mixture.names if not abs(losses[name]) < float("inf")):
            raise NumericalError(f"held-out loss is {losses[wrong[0]]}", where=f"domain {wrong[0]}, step {step}")
        before = self.mixture.history[-1]["weights"]
        after = dict(self._module.update(before, losses, self.reference, **self.arguments))
        try:
            self.mixture.set_weights(step, after)
        except PrismoeError as error:
            raise type(error)(
                error.found, where=f"mixing rule {self.rule}, step {step}: {error.where}", needed=error.needed
            ) from error
        excess = {name: losses[name] - self.reference[name] for name in self.mixture.names}
        return {"event": "mixing", "step": step, "before": before, "after": after, "excess": excess}

    def result(self) -> dict[str, float]:
        """The weights that the rule recommends for another run: the latest ones, or what the rule makes of them all."""
        history = [entry["weights"] for entry in self.mixture.history]
        if len(history) > 1 and hasattr(self._module, "result"):
            recommended: dict[str, float] = self._module.result(history[1:])
            return recommended
        return dict(history[-1])


def _checked(reference: Mapping[str, float] | None, names: tuple[str, ...], *, rule: str) -> dict[str, float]:
    if reference is None:
        raise UsageError(
            f"{rule} without reference losses",
            where="pretrain.reference",
            needed="a loss for each domain",
            hint="measure them with `prismoe reference-loss MODEL DATA --out reference.json`",
        )
    if missing := sorted(set(names) - set(reference)):
        raise InputError(
            f"no reference loss for {', '.join(missing)}",
            where="pretrain.reference",
            needed="one for each domain of the mixture",
        )
    for name in names:
        if not 0 <= float(reference[name]) < float("inf"):
            raise InputError(
                f"{reference[name]}", where=f"pretrain.reference {name}", needed="a finite loss in nats a token"
            )
    return {name: float(reference[name]) for name in names}
