"""What a person should look at in the routers of a run: in a few words while it goes on, in sentences at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ExpertAlarms", "in_short", "warnings_of"]

_MUCH_DROPPED = 0.1
_EVERY = 25  # steps: what begins between two looks is whole in the second one, within 50
_STARVED = 0.01  # of an expert's fair share of the tokens


class ExpertAlarms:
    """Experts that next to no token or most tokens go to, over 25 steps each: one step's idle expert may be chance.

    Starved is less than a hundredth of a fair share, dominant more than halfway from it to all tokens. All of it is
    training state. `shapes` has (experts, experts of a token) for each mixture layer.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self._shapes = list(shapes)
        self._loads = [[0] * experts for experts, _ in shapes]
        self.standing: dict[str, list[dict[str, Any]]] = {"starved": [], "dominant": []}

    def add(self, counts: Sequence[Sequence[int]]) -> None:
        """Count the assignments of one step, by layer and expert."""
        self._loads = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self._loads, counts, strict=True)]

    def judge(self, step: int) -> dict[str, Any] | None:
        """After `step` steps: a line for the log where other experts are in a bad way than at the look before."""
        if step % _EVERY or not any(map(any, self._loads)):
            return None
        found: dict[str, list[dict[str, Any]]] = {"starved": [], "dominant": []}
        for layer, (loads, (experts, top_k)) in enumerate(zip(self._loads, self._shapes, strict=True)):
            for expert, load in enumerate(loads):
                fair = load * experts / sum(loads)
                kind = "starved" if fair < _STARVED else "dominant" if fair > (experts / top_k + 1) / 2 else None
                if kind is not None:
                    found[kind].append({"layer": layer, "expert": expert, "of_fair_share": round(fair, 4)})
        self._loads = [[0] * len(loads) for loads in self._loads]
        before, self.standing = self.standing, found
        return {"event": "alarm", "step": step, **found} if _who(before) != _who(found) else None

    def in_short(self) -> str:
        """For the end of the progress line; empty when all is well."""
        text = " and ".join(f"{kind} {_names(experts)}" for kind, experts in self.standing.items() if experts)
        return f" · ALARM: {text}" if text else ""

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"loads": self._loads, "standing": self.standing}

    def restore(self, state: dict[str, Any]) -> None:
        self._loads, self.standing = state["loads"], state["standing"]


def _who(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[tuple[int, int]]]:
    return [[(one["layer"], one["expert"]) for one in experts] for experts in found.values()]


def _names(experts: Sequence[Mapping[str, Any]]) -> str:
    text = ", ".join(f"expert {one['expert']} of mixture layer {one['layer']}" for one in experts[:3])
    return text + (f" and {len(experts) - 3} more" if len(experts) > 3 else "")


def in_short(line: Mapping[str, Any]) -> str:
    """Alarms of one step's line of the log, for the end of the progress line; empty when all is well."""
    found = [f"{line[key]} {word}" for key, word in (("idle", "idle"), ("dominant", "dominant")) if line.get(key)]
    text = f", {' and '.join(found)} experts" if found else ""
    return text + (f", {line['dropped']:.0%} dropped" if line.get("dropped", 0.0) > _MUCH_DROPPED else "")


def warnings_of(
    router: str | Sequence[str],
    arguments: Mapping[str, Any],
    *,
    last_step: Mapping[str, Any],
    last: Mapping[str, Any],
    alarm: Mapping[str, Any] | None = None,
) -> list[str]:
    """Warnings about the routers from the log's last step, last evaluation and, if there was one, last alarm."""
    found = []
    for kind in ("starved", "dominant"):
        if alarm is not None and alarm[kind]:
            found.append(f"{kind} since step {alarm['step']} or before: {_names(alarm[kind])}")
    policies = {router: arguments} if isinstance(router, str) else {name: arguments[name] for name in router}
    for name, own in policies.items():
        if own.get("coefficient") == 0:
            found.append(f"the balance loss of router policy {name!r} is off (coefficient 0)")
    for key, what in (("idle", "got no token"), ("dominant", "were chosen by most tokens")):
        if last.get(key):
            chosen = [str(number) for number, count in enumerate(last[f"{key}_by_layer"]) if count]
            found.append(f"{last[key]} experts {what} of the held-out text (mixture layers {', '.join(chosen)})")
    prefix = "" if isinstance(router, str) else "bias_balanced."
    if moved := last_step.get(f"{prefix}moved"):
        found.append(f"the saved model routes without the bias: {moved:.1%} of assignments go to other experts")
    prefix = "" if isinstance(router, str) else "dense_mi."
    if unlike := last_step.get(f"{prefix}layers_not_dense"):
        found.append(
            f"{unlike:.0f} mixture layers with all experts on are not the dense layers: "
            "their plan is not known, holds neurons unevenly or changes them, or they have been trained"
        )
    if last_step.get(f"{prefix}share_dense"):
        on = last_step[f"{prefix}experts_on"]
        found.append(f"the run ended with {on:.1f} experts on; the saved model keeps fewer")
    prefix = "" if isinstance(router, str) else "capacity."
    if (dropped := last_step.get(f"{prefix}dropped", 0.0)) > _MUCH_DROPPED:
        found.append(f"{dropped:.0%} of assignments were dropped in the last step: their experts were full")
    return found
