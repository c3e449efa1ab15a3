"""`show` for mixtures: what prepared domains would give under some weights, and what a training run made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.console import Screen, count_text
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.folder import MANIFEST, Manifest, write_atomic

if TYPE_CHECKING:
    from prismoe.config import Config
    from prismoe.data.shards import Domain

__all__ = ["SETTINGS", "describe_mixture", "describe_planned", "describe_trained", "draw_weights", "show_mixture"]

SETTINGS = "settings.json"  # what a training folder holds from its first moment on


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
    from prismoe.reference import find_domains

    settings = {"steps": steps, "seq_len": seq_len, "batch_size": batch_size, "max_epochs": max_epochs}
    return {"kind": "mixture", "folder": str(folder), **_mixed(find_domains(folder), weights, settings)}


def describe_planned(config: Config, *, otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture that a run of `config` would begin with: as `describe_mixture`, with the mixing "rule" to come.

    `otherwise` has steps, seq_len, batch_size and max_epochs for a config without a `pretrain` section. Where the
    domains are not prepared, "missing" says in a line for each thing what there is to do.

    Raises:
        InputError: domains of different tokenizers, or damaged.
        UsageError: weights that do not fit the domains.
    """
    from prismoe.data.shards import Domain

    names = list(config.data.domains) if config.data is not None else []
    if config.data is None or config.out is None:
        lacking = "a `data:` section" if config.data is None else "`out:`, the run folder with the prepared domains"
        return {"kind": "mixture", "missing": [lacking]}
    folder = Path(config.out) / "data"
    if left := [name for name in names if not (folder / name / MANIFEST).is_file()]:
        return {"kind": "mixture", "missing": [f"{folder / name} (`prismoe prepare` makes it)" for name in left]}
    settings = dict(otherwise)
    if config.pretrain is not None:
        settings = {key: getattr(config.pretrain, key) for key in settings}
    found = _mixed([Domain.open(folder / name) for name in names], config.data.weights, settings)
    rule = config.pretrain.mixing if config.pretrain is not None else "static"
    return {"kind": "mixture", "folder": str(folder), **found, "rule": rule}


def _mixed(
    domains: Sequence[Domain], weights: Mapping[str, float] | str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    from prismoe.data.mixture import Mixture

    sizes = {key: settings[key] for key in ("seq_len", "batch_size", "max_epochs")}
    mixture, steps = Mixture(domains, weights=weights, **sizes), settings["steps"]
    of_name = {domain.name: domain for domain in mixture.domains}
    rows = [
        {
            "name": share.name,
            "weight": mixture.weights(0)[share.name],
            "available": of_name[share.name].num_tokens,
            "documents": of_name[share.name].num_documents,
            "tokens": share.tokens,
            "achieved": share.achieved,
            "epochs": share.epochs,
            "full_at": mixture.full_at(share.name, steps),
        }
        for share in mixture.report(steps)
    ]
    return {"steps": steps, **sizes, "domains": rows, "history": mixture.history}


def describe_trained(folder: Path) -> dict[str, Any]:
    """What a training run made of its mixture: requested against achieved, and the history of the weights.

    "steps" were taken so far of "planned". In a run that is not finished these are told by its log, and what was
    achieved is None where the domains do not lie in `data` beside `folder`.

    Raises:
        InputError: not a training folder.
    """
    manifest = Manifest.read(folder)
    if manifest is not None:
        result, settings = manifest.config["result"], manifest.config["pretrain"]
        history, steps, shares = result["weight_history"], result["steps"], result["mixture"]
        more = {"recommended": result["weights"]}
    else:
        settings, history, steps, batches = _so_far(folder)
        shares = _shares_so_far(folder, settings, history, batches)
        more = {}
    rows = [
        {
            "name": share["name"],
            "weight": history[0]["weights"][share["name"]],
            "last": history[-1]["weights"][share["name"]],
            **{key: share[key] for key in ("requested", "tokens", "achieved", "epochs")},
        }
        for share in shares
    ]
    kept = {"steps": steps, "planned": settings["steps"]}
    kept |= {key: settings[key] for key in ("seq_len", "batch_size")}
    rule = {"rule": settings["mixing"], **more}
    return {"kind": "mixture", "folder": str(folder), **kept, **rule, "domains": rows, "history": history}


def _so_far(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int, int]:
    """Settings, weight history, steps taken and batches drawn of a run that is not finished, from its log."""
    from prismoe.train.metrics import read_metrics

    try:
        begun = json.loads((folder / SETTINGS).read_bytes())
        settings, history = begun["pretrain"], [{"step": 0, "weights": begun["weights"]}]
        lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"not a training folder ({error!r})", where=str(folder)) from error
    step = passed_over = 0
    for line in lines:
        if line["event"] == "mixing":
            history.append({"step": line["step"], "weights": line["after"]})
        elif line["event"] == "rollback":  # what was moved after that checkpoint is gone, the text is not read again
            history = [entry for entry in history if entry["step"] <= line["to"] + passed_over]
            step, passed_over = line["to"], line["passed_over"]
        elif line["event"] != "eval":
            step = line["step"]
    return settings, history, step, step + passed_over


def _shares_so_far(
    folder: Path, settings: Mapping[str, Any], history: list[dict[str, Any]], batches: int
) -> list[dict[str, Any]]:
    from prismoe.data.mixture import Mixture
    from prismoe.data.shards import Domain

    names, data = sorted(history[0]["weights"]), folder.absolute().parent / "data"
    if not all((data / name / MANIFEST).is_file() for name in names):
        return [{"name": name, **dict.fromkeys(("requested", "tokens", "achieved", "epochs"))} for name in names]
    sizes = {key: settings[key] for key in ("seq_len", "batch_size", "seed")}
    mixture = Mixture([Domain.open(data / name) for name in names], weights=history[0]["weights"], **sizes)
    mixture.restore(history)
    return [asdict(share) for share in mixture.report(batches)]


def show_mixture(screen: Screen, found: Mapping[str, Any]) -> None:
    """What was found, for a person."""
    if "missing" in found:
        for what in found["missing"]:
            screen.line(f"no mixture to draw yet, it needs {what}", style="dim")
        return
    screen.title(f"mixture {found['folder']}")
    trained = "planned" in found
    total = found["steps"] * found["seq_len"] * found["batch_size"]
    steps = f"{found['steps']:,} steps of {found['batch_size']} × {found['seq_len']}: {count_text(total)} tokens"
    unfinished = trained and "recommended" not in found
    screen.line(f"{steps}; not finished, {found['planned']:,} are planned" if unfinished else steps)
    last = "now" if unfinished else "at the end"
    heads = ["domain", "weight", *([last, "requested"] if trained else ["tokens there"]), "achieved", "epochs"]
    rows = []
    for row in found["domains"]:
        own = [_percent(row[key]) for key in ("last", "requested")] if trained else [f"{row['available']:,}"]
        cells = [row["name"], _percent(row["weight"]), *own, _percent(row["achieved"])]
        cells.append("" if row["epochs"] is None else f"{row['epochs']:.3g}")
        if not trained:
            cells.append("" if row["full_at"] is None else f"{row['full_at']:,}")
        rows.append(cells)
    screen.table(heads if trained else [*heads, f"over {found['max_epochs']:g} epochs at step"], rows)
    if not trained and found.get("rule", "static") != "static":
        screen.line(f"these are the first weights: the rule {found['rule']} moves them")
    if len(found["history"]) > 1:
        screen.title(f"weights over steps, by the rule {found['rule']}")
        names = [row["name"] for row in found["domains"]]
        moves = found["history"] if len(found["history"]) <= 12 else [*found["history"][:6], *found["history"][-6:]]
        body = [[f"{e['step']:,}", *(f"{100 * e['weights'][name]:.2f}" for name in names)] for e in moves]
        screen.table(["step", *names], body)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def draw_weights(found: Mapping[str, Any], path: str | Path) -> None:
    """Draw the weights of `found`, stacked over its steps, to `path` (.png or .svg).

    Raises:
        InputError: there is no mixture yet.
        ResourceError: matplotlib is missing, or `path` cannot be written.
        UsageError: another ending.
    """
    path = Path(path)
    if "missing" in found:
        raise InputError("no mixture to draw yet", where=str(path), needed=found["missing"][0])
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"a picture of kind {path.suffix or 'none'!r}", where=str(path), needed=".png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("matplotlib is missing", hint="pip install 'prismoe[report]'") from error
    from prismoe.report.style import COLOURS

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _stack(axes, found["history"], [row["name"] for row in found["domains"]], max(1, int(found["steps"])), COLOURS)
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
