"""`show` for mixtures: what prepared domains would give under some weights, and what a training run made of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prismoe.console import Screen, count_text
from prismoe.errors import ResourceError, UsageError
from prismoe.folder import Manifest, write_atomic

__all__ = ["describe_mixture", "describe_trained", "draw_weights", "show_mixture"]


def describe_mixture(
    folder: str | Path,
    *,
    weights: Mapping[str, float] | str,
    steps: int,
    seq_len: int,
    batch_size: int,
    max_epochs: float,
) -> dict[str, Any]:
    """The facts about the domains below `folder` mixed by `weights`: tokens there are, shares and epochs after `steps`.

    `full_at` is the first step that would read a domain more than `max_epochs` times, None where that is after `steps`.

    Raises:
        InputError: no prepared domain there, or domains of different tokenizers.
        UsageError: weights that do not fit the domains.
    """
    from prismoe.data.mixture import Mixture
    from prismoe.reference import find_domains

    mixture = Mixture(
        find_domains(folder), weights=weights, seq_len=seq_len, batch_size=batch_size, max_epochs=max_epochs
    )
    domains = {domain.name: domain for domain in mixture.domains}
    rows = [
        {
            "name": share.name,
            "weight": mixture.weights(0)[share.name],
            "available": domains[share.name].num_tokens,
            "documents": domains[share.name].num_documents,
            "tokens": share.tokens,
            "achieved": share.achieved,
            "epochs": share.epochs,
            "full_at": mixture.full_at(share.name, steps),
        }
        for share in mixture.report(steps)
    ]
    settings = {"steps": steps, "seq_len": seq_len, "batch_size": batch_size, "max_epochs": max_epochs}
    return {"kind": "mixture", "folder": str(folder), **settings, "domains": rows, "history": mixture.history}


def describe_trained(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The same of a finished training folder: requested against achieved, and the history of the weights."""
    result, settings = manifest.config["result"], manifest.config["pretrain"]
    history = result["weight_history"]
    rows = [
        {
            "name": share["name"],
            "weight": history[0]["weights"][share["name"]],
            "last": history[-1]["weights"][share["name"]],
            "requested": share["requested"],
            "tokens": share["tokens"],
            "achieved": share["achieved"],
            "epochs": share["epochs"],
        }
        for share in result["mixture"]
    ]
    kept = {key: settings[key] for key in ("steps", "seq_len", "batch_size", "max_epochs")}
    rule = {"rule": result["rule"], "recommended": result["weights"]}
    return {"kind": "mixture", "folder": str(folder), **kept, **rule, "domains": rows, "history": history}


def show_mixture(screen: Screen, found: Mapping[str, Any]) -> None:
    """What was found, for a person."""
    screen.title(f"mixture {found['folder']}")
    total = found["steps"] * found["seq_len"] * found["batch_size"]
    screen.line(f"{found['steps']:,} steps of {found['batch_size']} × {found['seq_len']}: {count_text(total)} tokens")
    trained = "rule" in found
    heads = ["domain", "weight", *(["at the end", "requested"] if trained else ["tokens there"]), "achieved", "epochs"]
    rows = []
    for row in found["domains"]:
        own = [f"{100 * row[key]:.2f} %" for key in ("last", "requested")] if trained else [f"{row['available']:,}"]
        cells = [row["name"], f"{100 * row['weight']:.2f} %", *own, f"{100 * row['achieved']:.2f} %"]
        cells.append(f"{row['epochs']:.3g}")
        if not trained:
            cells.append("" if row["full_at"] is None else f"{row['full_at']:,}")
        rows.append(cells)
    screen.table(heads if trained else [*heads, f"over {found['max_epochs']:g} epochs at step"], rows)
    if len(found["history"]) > 1:
        screen.title(f"weights over steps, by the rule {found['rule']}")
        names = [row["name"] for row in found["domains"]]
        moves = found["history"] if len(found["history"]) <= 12 else [*found["history"][:6], *found["history"][-6:]]
        body = [[f"{e['step']:,}", *(f"{100 * e['weights'][name]:.2f}" for name in names)] for e in moves]
        screen.table(["step", *names], body)


def draw_weights(found: Mapping[str, Any], path: str | Path) -> None:
    """Draw the weights of `found`, stacked over its steps, to `path` (.png or .svg).

    Raises:
        ResourceError: matplotlib is missing, or `path` cannot be written.
        UsageError: another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"a picture of kind {path.suffix or 'none'!r}", where=str(path), needed=".png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("matplotlib is missing", hint="pip install 'prismoe[report]'") from error
    from prismoe.report.style import COLOURS

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _stack(axes, found["history"], [row["name"] for row in found["domains"]], int(found["steps"]), COLOURS)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=144, metadata={"Date": None} if path.suffix == ".svg" else {})
    write_atomic(path, buffer.getvalue())


def _stack(
    axes: Any, history: Sequence[Mapping[str, Any]], names: Sequence[str], steps: int, colours: Sequence[str]
) -> None:
    kept = [entry for entry in history if entry["step"] < steps] or history[:1]
    edges = [*(entry["step"] for entry in kept), steps]
    below = [0.0] * len(kept)
    for number, name in enumerate(names):
        above = [base + 100 * entry["weights"][name] for base, entry in zip(below, kept, strict=True)]
        colour = colours[number % len(colours)]
        axes.stairs(above, edges, baseline=below, fill=True, color=colour, alpha=0.85, label=name)
        below = above
    axes.set(xlim=(0, steps), ylim=(0, 100), xlabel="step", ylabel="share of tokens, %")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
