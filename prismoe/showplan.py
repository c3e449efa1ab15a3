"""`show PLAN`: what a plan does with the neurons, in words, in numbers and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.console import Screen, bytes_text
from prismoe.errors import ResourceError, UsageError
from prismoe.folder import MANIFEST, write_atomic
from prismoe.progress import Progress, quiet
from prismoe.views import branch_rows, summary

if TYPE_CHECKING:
    from prismoe.plan.anatomy import Anatomy

__all__ = ["describe_plan", "show_plan"]

WIDEST = 16  # columns of a table that people can still read


def describe_plan(
    path: Path,
    *,
    calibration: str | Path | None = None,
    picture: str | Path | None = None,
    draw: bool = False,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """The facts about a plan file. `calibration`: by default the one beside it that was made of the same checkpoint.

    `picture`: where to draw it (.png or .svg). `draw`: without one, beside the plan under its name, unless that is a
    finished folder, which is left as it is, or one that cannot be written. "notes" says what was left out and why.

    Raises:
        InputError: not a plan, or a calibration of another checkpoint.
        ResourceError: matplotlib is missing, or a `picture` that was asked for cannot be written.
        UsageError: a `picture` of another kind.
    """
    from prismoe.plan import Plan, plan_shape
    from prismoe.plan.anatomy import calibration_beside, plan_anatomy
    from prismoe.plan.branches import branch_facts

    if picture is not None and Path(picture).suffix not in (".png", ".svg"):
        raise UsageError(f"{str(picture)!r}", where="--out", needed="a name that ends in .png or .svg")
    plan = Plan.load(path)
    statistics, notes = (calibration, []) if calibration is not None else calibration_beside(path, plan)
    anatomy = plan_anatomy(plan, calibration=statistics, on_progress=on_progress)
    facts: dict[str, Any] = {
        "kind": "plan",
        **asdict(plan.origin),
        **branch_facts(plan),
        "shape": asdict(plan_shape(plan)),
    }
    facts |= {"bytes": path.stat().st_size, "num_neurons": plan.num_neurons, "anatomy": anatomy.to_dict()}
    drawn = _draw(anatomy, path, picture, notes, title=summary("plan", facts)) if draw or picture is not None else None
    return {**facts, "picture": None if drawn is None else str(drawn), "notes": notes}


def _draw(anatomy: Anatomy, path: Path, wanted: str | Path | None, notes: list[str], *, title: str) -> Path | None:
    if not find_spec("matplotlib"):
        missing = "matplotlib is not installed"
        if wanted is not None:
            raise ResourceError(missing, needed="pip install 'prismoe[report]'")
        notes.append(f"no picture: {missing}: pip install 'prismoe[report]'")
        return None
    if wanted is None and (path.parent / MANIFEST).is_file():
        notes.append("no picture: the folder is finished and stays as it is (--out FILE.png draws one)")
        return None
    from prismoe.report.planpicture import picture_bytes

    out = path.with_suffix(".png") if wanted is None else Path(wanted)
    data = picture_bytes(anatomy, out, title=title)
    try:
        write_atomic(out, data)
    except ResourceError as error:
        if wanted is not None:
            raise
        notes.append(f"no picture: {error}")
        return None
    return out


def show_plan(screen: Screen, found: dict[str, Any]) -> None:
    """What `describe_plan` found, for a person."""
    screen.title("plan")
    screen.line(summary("plan", found))
    shape, anatomy = found["shape"], found["anatomy"]
    dense = [layer for layer in range(shape["num_layers"]) if layer not in shape["moe_layers"]]
    screen.pairs(
        {
            "arguments": ", ".join(f"{key}={value}" for key, value in found["arguments"].items()) or "none",
            "layers that stay dense": ", ".join(map(str, dense)) or "none",
            "made for": f"checkpoint {found['source'][:16]}",
            **branch_rows(found),
            "size": bytes_text(found["bytes"]),
        }
    )
    _layers(screen, anatomy)
    _overlap(screen, anatomy, apart="branches" in found)
    if anatomy["covered"] is not None:
        _importance(screen, anatomy)
    if found["picture"] is not None:
        screen.line(f"picture: {found['picture']}")
    for note in found["notes"]:
        screen.line(f"note: {note}", style="dim")


def _layers(screen: Screen, anatomy: dict[str, Any]) -> None:
    """Layers that say the same stand in one row."""
    screen.title(f"who holds the {anatomy['num_neurons']:,} neurons of a layer")
    groups: list[tuple[list[int], list[str]]] = []
    for row in anatomy["layers"]:
        counts = [f"{row[name]:,}" for name in ("width", "shared", "one", "several", "nobody")]
        cells = [*counts, f"{row['scale']:g}", row["router"]]
        if groups and groups[-1][1] == cells:
            groups[-1][0].append(row["layer"])
        else:
            groups.append(([row["layer"]], cells))
    heads = ["layers", "an expert", "shared", "in one expert", "in several", "in none", "scale", "router rows"]
    screen.table(heads, [[_span(layers), *cells] for layers, cells in groups], justify="lrrrrrrl")


def _span(layers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _overlap(screen: Screen, anatomy: dict[str, Any], *, apart: bool) -> None:
    """`apart`: the same neurons, but of checkpoints that were trained apart."""
    overlap, count = anatomy["overlap"], anatomy["num_experts"]
    if count == 1:
        return
    screen.title("overlap of experts")
    if overlap is None:
        screen.line("none: no two experts hold the same neuron (the matrix is the identity)")
    elif anatomy["kind"] == "copies":
        what = "every neuron, as its own checkpoint has it" if apart else "the same neurons (the matrix is all ones)"
        screen.line(f"all of it: every expert holds {what}")
    else:
        pairs = [overlap[one][two] for one in range(count) for two in range(count) if one != two]
        mean, most = 100 * sum(pairs) / len(pairs), 100 * max(pairs)
        screen.line(f"mean {mean:.1f} % of an expert's neurons, at most {most:.1f} %, mean of the layers")
        if count <= WIDEST:
            rows = [[str(expert), *(f"{100 * value:.0f}" for value in row)] for expert, row in enumerate(overlap)]
            screen.table(["", *map(str, range(count))], rows)


def _importance(screen: Screen, anatomy: dict[str, Any]) -> None:
    covered, clusters, top_k = anatomy["covered"], anatomy["clusters"], anatomy["top_k"]
    screen.title("importance covered, % of each data cluster's, mean of the layers")
    any_shared = any(row["shared"] for row in anatomy["layers"])
    rows = {"shared": covered["shared"]} if any_shared else {}
    if anatomy["num_experts"] <= WIDEST:
        rows |= {f"expert {expert}": shares for expert, shares in enumerate(covered["experts"])}
    if any(covered["nobody"]):
        rows["in no expert"] = covered["nobody"]
    rows[f"{'shared + ' if any_shared else ''}best {top_k}"] = covered["best"]
    rows["as many neurons at random"] = covered["size"]
    if len(clusters) <= WIDEST:
        table = [[name, *(f"{100 * share:.1f}" for share in shares)] for name, shares in rows.items()]
        screen.table(["data cluster", *clusters], table)
        return
    table = [
        [name, *(f"{100 * value:.1f}" for value in (min(shares), sum(shares) / len(shares), max(shares)))]
        for name, shares in rows.items()
    ]
    screen.table([f"of {len(clusters)} data clusters", "lowest", "mean", "highest"], table)
