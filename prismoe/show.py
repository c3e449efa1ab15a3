"""`show`: what a folder or file is, whatever stage it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prismoe.console import Screen, bytes_text, count_text
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest
from prismoe.progress import Progress, quiet
from prismoe.state import STATE, read_state
from prismoe.views import branch_rows, summary, view

__all__ = ["describe", "show", "show_comparison"]


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")


def describe(
    subject: str | Path,
    *,
    calibration: str | Path | None = None,
    picture: str | Path | None = None,
    draw: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """The facts about a run folder, plan, domain, calibration, config, or model (folder or hub name), with its `kind`;
    JSON-able. `calibration`, `picture` and `draw` are for plans: see `describe_plan`.

    Raises:
        InputError: none of these, or damaged.
        UsageError: `calibration` or `picture` for something else than a plan.
    """
    path = Path(subject)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        from prismoe.config import load_config

        return {"kind": "config", "config": load_config(path).to_dict()}
    if path.is_file():
        from prismoe.showplan import describe_plan

        return describe_plan(path, calibration=calibration, picture=picture, draw=draw, on_progress=on_progress)
    if calibration is not None or picture is not None:
        raise UsageError("is not a plan file", where=str(path), needed="one, for calibration=FOLDER or --out PICTURE")
    if (path / STATE).is_file():
        state = read_state(path)
        stages = {name: {"seconds": record["seconds"], "receipt": record["receipt"]} for name, record in state.items()}
        return {"kind": "run", "folder": str(path), "stages": stages}
    manifest = Manifest.read(path) if path.is_dir() else None
    if manifest is not None and manifest.kind == "domain":
        from prismoe.data.shards import Domain

        domain = Domain.open(path)
        splits = {split: asdict(counts) for split, counts in domain.splits.items()}
        facts = {"name": domain.name, "vocab_size": domain.vocab_size, "splits": splits}
        return {"kind": "domain", "folder": str(path), **facts}
    if manifest is not None and manifest.kind == "sift":
        from prismoe.data.sift import Sifted

        return {"kind": "sift", **Sifted.read(path).to_dict()}
    if manifest is not None and manifest.kind == "calibrate":
        from prismoe.stats.calibration import Calibration

        return {"kind": "calibration", **Calibration.open(path).to_dict()}
    if path.is_dir() and not (path / "config.json").is_file():
        found = f"a finished '{manifest.kind}' folder" if manifest else "nothing that prismoe knows"
        raise InputError(found, where=str(path), needed="a run folder, a model, a plan, a domain or a config")
    return _model(subject, manifest, offline=offline)


def _model(subject: str | Path, manifest: Manifest | None, *, offline: bool) -> dict[str, Any]:
    """A checkpoint of any architecture: what its config and its tensor headers say; no weight is read."""
    from prismoe.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(subject, offline=offline)
    config = checkpoint.config
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    experts, active = config.get("num_local_experts", config.get("num_experts")), config.get("num_experts_per_tok")
    facts: dict[str, Any] = {
        "kind": "model",
        "folder": str(checkpoint.folder),
        "model_type": config.get("model_type"),
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "tensors": len(sizes),
        "parameters": sum(sizes.values()),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "fingerprint": checkpoint.fingerprint,
        **{key: config.get(key) for key in SIZES},
    }
    if isinstance(experts, int) and isinstance(active, int) and experts > 0:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        # One tensor per expert, or all experts of a layer in one [E, rows, columns].
        fused = [name for name, shape in shapes.items() if len(shape) == 3 and shape[0] == experts]
        routed = sum(size for name, size in sizes.items() if re.search(r"\.experts\.\d+\.", name) or name in fused)
        facts |= {"num_experts": experts, "top_k": active}
        facts["active_parameters"] = facts["parameters"] - routed * (experts - active) // experts
    if manifest is not None:
        facts["made_by"] = {"kind": manifest.kind, "parents": manifest.parents, "versions": manifest.versions}
        if "branch 1" in manifest.parents:
            from prismoe.convert.job import PLAN
            from prismoe.plan import Plan
            from prismoe.plan.branches import branch_facts

            facts |= branch_facts(Plan.load(checkpoint.folder / PLAN))
        from prismoe.verify.certificate import Certificate

        certificate = Certificate.read(checkpoint.folder)
        facts["certificate"] = None if certificate is None else certificate.to_dict()
    return facts


def show(screen: Screen, found: dict[str, Any]) -> None:
    """What `describe` found, for a person."""
    _SHOWN[found["kind"]](screen, found)


def show_comparison(screen: Screen, found: dict[str, Any]) -> None:
    """What `compare_plans` found, for a person."""
    screen.title("two plans")
    screen.pairs({"first": found["plans"][0], "second": found["plans"][1]})
    if not found["same_source"]:
        screen.warning("they were made for different checkpoints")
    rows = [
        [name, *("none" if value is None else str(value) for value in both)] for name, both in found["settings"].items()
    ]
    if rows:
        screen.table(["setting", "first", "second"], rows, justify="lll")

    def text(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{100 * value:.1f} %" if unit else f"{value:g}"

    screen.table(
        ["layer", "same place", "by chance", "same shared", "scales", "router"],
        [
            [
                str(row["layer"]),
                *(text(row[name], "%") for name in ("same", "chance", "shared")),
                " / ".join(text(scale) or "dense" for scale in row["scales"]),
                row["router"] or "",
            ]
            for row in found["layers"]
        ],
    )


def _show_run(screen: Screen, found: dict[str, Any]) -> None:
    screen.title(f"run {found['folder']}")
    for name, stage in found["stages"].items():
        screen.stage(name, "made", summary(name, stage["receipt"]), stage["seconds"])
    for name in ("calibrate", "plan", "verify", "pretrain", "eval"):
        if name in found["stages"]:
            view(screen, name, found["stages"][name]["receipt"])


def _show_plan(screen: Screen, found: dict[str, Any]) -> None:
    from prismoe.showplan import show_plan

    show_plan(screen, found)


def _show_domain(screen: Screen, found: dict[str, Any]) -> None:
    screen.title(f"domain {found['name']}")
    rows = []
    for split, counts in found["splits"].items():
        numbers = [f"{counts[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes")]
        rows.append([split, *numbers, f"{counts['num_bytes'] / max(counts['num_tokens'], 1):.2f}"])
    screen.table(["split", "documents", "tokens", "bytes", "bytes/token"], rows)


def _show_sifted(screen: Screen, found: dict[str, Any]) -> None:
    screen.title(f"sifted text {found['out']}")
    screen.line(summary("sift", found))
    view(screen, "sift", found)


def _show_model(screen: Screen, found: dict[str, Any]) -> None:
    screen.title(f"{found['model_type']} {found['folder']}")
    rows = {"parameters": f"{count_text(found['parameters'])} in {found['tensors']} tensors"}
    if "num_experts" in found:
        rows["experts"] = f"{found['num_experts']}, top-{found['top_k']}"
        rows["active per token"] = count_text(found["active_parameters"])
    rows["layers, hidden, FFN"] = f"{found['num_hidden_layers']}, {found['hidden_size']}, {found['intermediate_size']}"
    rows["vocabulary, positions"] = f"{found['vocab_size']}, {found['max_position_embeddings']}"
    rows["on disk"] = f"{bytes_text(found['bytes'])}, {' '.join(found['dtypes']) or 'no weights'}"
    rows["fingerprint"] = found["fingerprint"][:16]
    if "made_by" in found:
        rows["made by"] = f"prismoe {found['made_by']['kind']}"
    rows |= branch_rows(found)
    screen.pairs(rows)
    if found.get("certificate"):
        view(screen, "verify", found["certificate"])


def _show_config(screen: Screen, found: dict[str, Any]) -> None:
    import yaml

    for line in yaml.safe_dump(found["config"], sort_keys=False).splitlines():
        screen.line(line)


_SHOWN: dict[str, Callable[[Screen, dict[str, Any]], None]] = {
    "run": _show_run,
    "plan": _show_plan,
    "domain": _show_domain,
    "sift": _show_sifted,
    "calibration": lambda screen, found: view(screen, "calibrate", found),
    "model": _show_model,
    "config": _show_config,
}
