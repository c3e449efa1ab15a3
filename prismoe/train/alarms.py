"""What a person should look at in the routers of a run: in a few words while it goes on, in sentences at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["in_short", "warnings_of"]

_MUCH_DROPPED = 0.1


def in_short(line: Mapping[str, Any]) -> str:
    """Alarms of one step's line of the log, for the end of the progress line; empty when all is well."""
    found = [f"{line[key]} {word}" for key, word in (("idle", "idle"), ("dominant", "dominant")) if line.get(key)]
    text = f", {' and '.join(found)} experts" if found else ""
    return text + (f", {line['dropped']:.0%} dropped" if line.get("dropped", 0.0) > _MUCH_DROPPED else "")


def warnings_of(
    router: str | Sequence[str], arguments: Mapping[str, Any], *, last_step: Mapping[str, Any], last: Mapping[str, Any]
) -> list[str]:
    """Warnings about the routers from the log's last step and last evaluation."""
    found = []
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
    prefix = "" if isinstance(router, str) else "capacity."
    if (dropped := last_step.get(f"{prefix}dropped", 0.0)) > _MUCH_DROPPED:
        found.append(f"{dropped:.0%} of assignments were dropped in the last step: their experts were full")
    return found
