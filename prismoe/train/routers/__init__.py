"""Router policies: what happens to the routers of a stock model while it trains, and nowhere else.

The folder is the registry: `routers/NAME.py` defines `attach(routers, all_reduce, *, …) -> Policy`, and the keyword
arguments of `attach` are the policy's schema. A policy may change routing while the model is in training mode (in
evaluation the stock router speaks), add a loss, and have parameters and state of its own; it never changes what is
saved. Several policies work together when a list of names is given. No torch at import: a config file is checked
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from prismoe import registry
from prismoe.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "AllOn",
    "AllReduce",
    "Change",
    "Moment",
    "Policy",
    "Routed",
    "Router",
    "arguments_of",
    "attach_policy",
    "check_steps",
    "experts_of_run",
    "identity",
]

_T = TypeVar("_T")

AllReduce = Callable[[Any], Any]
"""Tensor to tensor: its sum over all data-parallel ranks, the same on each; the backward pass sums gradients likewise.

The trainer adds, on each rank, `loss()` times the rank's share of the step's tokens, and sums parameter gradients
over ranks: then the gradient is that of one process.
"""


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True, eq=False)
class Moment:
    """What a policy may know of the micro-batch that comes: enough to draw the same numbers under any sharding.

    `token_numbers_T` is the number of each of its tokens in the step's global batch (int64, row by row; they rise from
    one micro-batch of a step to the next), `seq_len` the count of tokens of a row.
    """

    seed: int
    step: int
    token_numbers_T: torch.Tensor
    seq_len: int

    def continues(self, before: Moment | None) -> bool:
        """Whether `before` was an earlier micro-batch of the same step, which may be taken again after a rollback."""
        if before is None or before.step != self.step:
            return False
        return int(self.token_numbers_T[0]) > int(before.token_numbers_T[0])


@dataclass(frozen=True, eq=False)
class Routed:
    """What a stock router returns: raw logits, the weights of the kept experts and their numbers."""

    logits_TE: torch.Tensor
    weights_TK: torch.Tensor
    chosen_TK: torch.Tensor


@dataclass(frozen=True)
class AllOn:
    """The weight under which all experts of a layer together are its dense FFN, or are nearest to it."""

    weight: float
    exact: bool = True


@dataclass(eq=False)
class Router:
    """One stock router while it is watched: what it said in the latest forward pass.

    `logits_TE` are the stock router's raw logits with their graph; `chosen_TK` and `weights_TK` are what the experts
    got. `changes` are called in order, in training mode only. `learns` is false for a router that is meant to stay,
    `estimated` true where its gradient does not come from what the weights depend on. `factor` multiplies the weights
    on their way to the experts, in either mode (see `train.unfold`). `all_on` is known where a plan is.
    """

    name: str
    module: torch.nn.Module
    num_experts: int
    top_k: int
    changes: list[Change] = field(default_factory=list)
    learns: bool = True
    estimated: bool = False
    factor: float = 1.0
    all_on: AllOn | None = None
    _logits: torch.Tensor | None = None
    _latest: Routed | None = None

    @property
    def has_run(self) -> bool:
        """Whether there is a forward pass to speak of."""
        return self._logits is not None

    @property
    def logits_TE(self) -> torch.Tensor:
        assert self._logits is not None, f"{self.name} has not been run"
        return self._logits

    @property
    def chosen_TK(self) -> torch.Tensor:
        return self._routed.chosen_TK

    @property
    def weights_TK(self) -> torch.Tensor:
        return self._routed.weights_TK

    @property
    def _routed(self) -> Routed:
        assert self._latest is not None, f"{self.name} has not been run"
        return self._latest

    def keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        """A forward hook: stock routers return (logits, weights, chosen experts)."""
        self._latest = Routed(*output)
        self._logits = self._latest.logits_TE
        changes = self.changes if module.training else []
        if not changes and self.factor == 1.0:
            return None
        hidden_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
        for change in changes:
            self._latest = change(self, hidden_TD, self._latest)
        return self._latest.logits_TE, self._latest.weights_TK * self.factor, self._latest.chosen_TK

    def forget(self) -> None:
        """Drop the latest forward pass, so that its graph can be freed."""
        self._logits = self._latest = None


Change = Callable[[Router, Any, Routed], Routed]
"""(router, hidden states [T, D], routed) -> routed: what a policy makes of a router's output."""


class Policy:
    """A policy at work on the routers of one model. On its own it does nothing.

    Called in this order: for each micro-batch `begin`, the model's forward pass, `loss`; when all gradients are there
    `metrics` and `before_step`; after the optimizer's step `after_step`; at the end of the run `detach`.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self.routers = routers

    def begin(self, moment: Moment) -> None:
        """Say which micro-batch comes next."""

    def loss(self) -> torch.Tensor:
        """What is added to the mean loss a token: a scalar, already weighted, of the latest forward pass.

        Balance losses are ratios of sums over all ranks, so that it is the same on each.
        """
        import torch

        return torch.zeros((), device=self.routers[0].logits_TE.device if self.routers else None)

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, of the latest micro-batch or of the step. Every process has to ask."""
        return {}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What trains with the model and belongs to the training state, never to the model folder."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What else belongs to the training state: tensors that are filled in place when a run is resumed."""
        return {}

    def before_step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """All gradients of the step are there and not yet clipped: some may be dropped.

        `parameters` are the model's; a parameter whose `grad` is None is neither updated nor decayed.
        """

    def after_step(self) -> None:
        """The optimizer has made its step."""

    def detach(self) -> None:
        """Undo whatever `attach` put on the model."""
        for router in self.routers:
            router.changes.clear()


class _Together(Policy):
    """Several policies as one; names of parameters, state and metrics begin with the policy's."""

    def __init__(self, routers: Sequence[Router], policies: Mapping[str, Policy]) -> None:
        super().__init__(routers)
        self._policies = policies

    def begin(self, moment: Moment) -> None:
        for policy in self._policies.values():
            policy.begin(moment)

    def loss(self) -> torch.Tensor:
        import torch

        return torch.stack([policy.loss() for policy in self._policies.values()]).sum()

    def metrics(self) -> dict[str, float]:
        return self._all(lambda policy: policy.metrics())

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._all(lambda policy: policy.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        return self._all(lambda policy: policy.state())

    def before_step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        for policy in self._policies.values():
            policy.before_step(parameters)

    def after_step(self) -> None:
        for policy in self._policies.values():
            policy.after_step()

    def detach(self) -> None:
        for policy in self._policies.values():
            policy.detach()

    def _all(self, read: Callable[[Policy], dict[str, _T]]) -> dict[str, _T]:
        return {f"{name}.{key}": value for name, one in self._policies.items() for key, value in read(one).items()}


def arguments_of(name: str | Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of policy `name`, checked and completed with its defaults.

    For a list of names, `arguments` holds a mapping for each name that needs any.

    Raises:
        UsageError: unknown policy, unknown arguments, or values of the wrong type.
    """
    if isinstance(name, str):
        attach = registry.load(__name__, name, where="pretrain.router").attach
        return registry.arguments(attach, arguments, where=f"pretrain.router {name}")
    if len(set(name)) < len(name) or not name:
        raise UsageError(f"{list(name)}", where="pretrain.router", needed="one or more different policies")
    if left := sorted(arguments.keys() - set(name)):
        raise UsageError(
            f"arguments for {left[0]!r}",
            where="pretrain.router",
            needed="one of " + ", ".join(name),
            hint="with several policies, each one's arguments are a mapping under its name",
        )
    return {one: arguments_of(one, arguments.get(one, {})) for one in name}


def check_steps(name: str | Sequence[str], arguments: Mapping[str, Any], *, steps: int) -> None:
    """A policy that leaves the model's own routing must have come back to it within the run.

    Raises:
        UsageError: its schedule ends after the last of so many steps.
    """
    for module, own in _modules(name, arguments):
        if hasattr(module, "check_steps"):
            module.check_steps(steps, **own)


def experts_of_run(
    name: str | Sequence[str], arguments: Mapping[str, Any], *, steps: int, num_experts: int, top_k: int
) -> tuple[int, float]:
    """To how many experts a token is sent in a run of so many steps: at most, and on average."""
    found = [(top_k, float(top_k))]
    for module, own in _modules(name, arguments):
        if hasattr(module, "experts_of_run"):
            found.append(module.experts_of_run(steps, num_experts=num_experts, top_k=top_k, **own))
    return max(found)


def _modules(name: str | Sequence[str], arguments: Mapping[str, Any]) -> list[tuple[Any, Mapping[str, Any]]]:
    """Each policy's file and its own arguments."""
    each = {name: arguments} if isinstance(name, str) else {one: arguments.get(one, {}) for one in name}
    return [(registry.load(__name__, one, where="pretrain.router"), own) for one, own in each.items()]


def attach_policy(
    name: str | Sequence[str],
    routers: Sequence[Router],
    *,
    arguments: Mapping[str, Any],
    all_reduce: AllReduce = identity,
) -> Policy:
    """Put policy `name`, or several in that order, on the routers of a model.

    `arguments` as completed by `arguments_of`; `all_reduce` sums over data-parallel ranks.

    Raises:
        UsageError: the policy cannot work on this model, or its routers cannot learn what the text needs.
    """
    if isinstance(name, str):
        module = registry.load(__name__, name, where="pretrain.router")
        policy: Policy = module.attach(routers, all_reduce, **arguments)
    else:
        each = {
            one: registry.load(__name__, one, where="pretrain.router").attach(routers, all_reduce, **arguments[one])
            for one in name
        }
        policy = _Together(routers, each)
    for router in routers:
        _require_gradient(router)
    return policy


def _require_gradient(router: Router) -> None:
    """One kept weight over the sum of kept weights is 1, whatever the logits: text says nothing to such a router."""
    from prismoe.train.weighting import weighting

    if router.learns and not router.estimated and router.top_k == 1 and weighting(router).renormalised:
        raise UsageError(
            "top_k = 1 with renormalised weights: the loss does not depend on its logits",
            where=router.name,
            needed="a router that learns from text",
            hint="convert with top_k 2 or more, or train around it with router=frozen",
        )
