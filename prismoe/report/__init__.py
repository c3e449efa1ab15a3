"""`write_report`: a run folder as one HTML page that needs nothing else: no script, no network, figures inside.

Every part appears as soon as its stage is finished, so a report can be written at any time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prismoe.console import bytes_text, count_text, seconds_text
from prismoe.doctor import doctor
from prismoe.errors import InputError, ResourceError
from prismoe.folder import versions, write_atomic
from prismoe.state import read_state
from prismoe.train.metrics import read_metrics
from prismoe.views import summary

__all__ = ["can_report", "write_report"]

NAME, PLAN = "report.html", "plan.safetensors"  # the page, and what it reads of the run besides receipts and log


@dataclass(frozen=True)
class Table:
    """`left` are the columns of text; the first column is the head of its row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = ()
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """An `<svg>` element and what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    figures_first: bool = False
    code: str = ""
    links: Sequence[tuple[str, str]] = ()  # words, and a place beside the page


def can_report() -> bool:
    """Whether the packages of `prismoe[report]` are there."""
    return all(find_spec(name) for name in ("jinja2", "matplotlib"))


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder from what its finished stages left there.

    Raises:
        InputError: not a run folder.
        ResourceError: jinja2 or matplotlib is not installed, or the folder cannot be written.
    """
    folder = Path(run_folder)
    if not can_report():
        raise ResourceError("jinja2 or matplotlib is not installed", needed="pip install 'prismoe[report]'")
    state = read_state(folder)
    if "plan" not in state:
        raise InputError("no finished plan", where=str(folder), needed="a run folder", hint="prismoe run CONFIG")
    import jinja2

    receipts = {name: record["receipt"] for name, record in state.items()}
    seconds = {name: float(record["seconds"]) for name, record in state.items()}
    makers = (_scores, _training, _plan, _certificate, _data)
    sections = [section for make in makers if (section := make(receipts, folder)) is not None]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        files("prismoe.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    text = page.render(
        title=f"{Path(receipts['plan']['source_name']).name} as {receipts['plan']['account']['target']}",
        subtitle=summary("plan", receipts["plan"]),
        numbers=_numbers(receipts),
        sections=[*sections, *_provenance(receipts, seconds, folder)],
    )
    path = folder / NAME
    write_atomic(path, text.encode())
    return path


def _numbers(receipts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The boxes at the top: what a reader in a hurry wants."""
    counts = receipts["plan"]["account"]
    found = [
        _number(
            "parameters", count_text(counts["total_parameters"]), f"dense {count_text(counts['dense_parameters'])}"
        ),
        _number("active per token", count_text(counts["active_parameters"])),
        _number("FFN active", f"{counts['ffn_active_percent']:.1f} %"),
        _number(
            "FLOPs per token",
            count_text(counts["flops_per_token"]),
            f"dense {count_text(counts['dense_flops_per_token'])}",
        ),
    ]
    if "verify" in receipts:
        passed = receipts["verify"]["passed"]
        count = len(receipts["verify"]["checks"])
        found.append(
            _number("certificate", "holds" if passed else "FAILED", f"{count} checks", "good" if passed else "bad")
        )
    if "pretrain" in receipts:
        found.append(_number("trained on", count_text(receipts["pretrain"]["tokens"]), "tokens"))
    if "eval" in receipts:
        scores = receipts["eval"]["scores"]
        means = []
        for model in receipts["eval"]["models"]:
            values = [row["bits_per_byte"] for row in scores if row["model"] == model]
            means.append((model, sum(values) / len(values)))
        found += [_number(f"bits/byte, {model}", f"{mean:.3f}", "mean of domains") for model, mean in means]
    return found


def _dense(count: int) -> str:
    return f"dense {count_text(count)}"


def _number(name: str, value: str, more: str = "", state: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "more": more, "state": state}


def _scores(receipts: Mapping[str, Any], folder: Path) -> Section | None:
    if "eval" not in receipts:
        return None
    from prismoe.report import figures

    receipt = receipts["eval"]
    models = list(receipt["models"])
    table = {(row["domain"], row["model"]): row for row in receipt["scores"]}
    domains = list(receipt["domains"])
    perplexity = [[name, *(f"{table[name, model]['perplexity']:,.2f}" for model in models)] for name in domains]
    bits = [[name, *(f"{table[name, model]['bits_per_byte']:.3f}" for model in models)] for name in domains]
    change = [[name, *(_change(table[name, model]) for model in models[1:])] for name in domains]
    tables = [Table(["domain", *models], perplexity, caption="perplexity per token")]
    tables.append(Table(["domain", *models], bits, caption="bits per byte of text"))
    if len(models) > 1:
        caption = f"loss minus that of {models[0]}, nats per token ± standard error of the paired difference"
        tables.append(Table(["domain", *models[1:]], change, caption=caption))
    text = f"{summary('eval', receipt)} in windows of {receipt['seq_len']}, the same for every model."
    picture = Figure(
        "Bits per byte of every model on the held-out text of every domain", _svg("scores", figures.scores(receipt))
    )
    return Section("scores", "Held-out scores", [text], tables, [picture], figures_first=True)


def _change(row: Mapping[str, Any]) -> str:
    error = row["change_standard_error"]  # None where one document was scored
    return f"{row['change']:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def _training(receipts: Mapping[str, Any], folder: Path) -> Section | None:
    log = folder / "train" / "metrics.jsonl"
    lines = read_metrics(log) if log.is_file() else []  # a stopped run has a log but no receipt yet
    steps = [line for line in lines if line["event"] == "step"]
    evals = [line for line in lines if line["event"] == "eval"]
    if not steps or not evals:
        return None
    from prismoe.report import figures

    pictures = [
        Figure("Training loss (language modelling only)", _svg("training_loss", figures.training_loss(steps))),
        Figure("Held-out loss by domain", _svg("heldout_loss", figures.heldout_loss(evals))),
    ]
    if "load" in evals[0]:
        pictures.append(
            Figure("Load of every expert on held-out text (1 is balanced)", _svg("load", figures.load(evals)))
        )
        pictures.append(
            Figure("Busiest expert of the worst layer (1 is balanced)", _svg("balance", figures.balance(steps)))
        )
    if "pretrain" not in receipts:
        return Section("training", "Training", [f"Not finished: {len(steps)} steps so far."], [], pictures, True)
    receipt = receipts["pretrain"]
    rows = [
        [
            share["name"],
            f"{100 * share['requested']:.1f} %",
            f"{100 * share['achieved']:.1f} %",
            count_text(share["tokens"]),
            f"{share['epochs']:.2f}",
        ]
        for share in receipt["mixture"]
    ]
    mix = Table(["domain", "requested", "achieved", "tokens", "epochs"], rows, caption="what was trained on")
    texts = [summary("pretrain", receipt) + ".", *(f"Warning: {text}." for text in receipt["warnings"])]
    return Section("training", "Training", texts, [mix], pictures, figures_first=True)


def _plan(receipts: Mapping[str, Any], folder: Path) -> Section:
    receipt, counts = receipts["plan"], receipts["plan"]["account"]
    names = {
        "parameters": ("dense_parameters", "total_parameters"),
        "active per token": ("dense_parameters", "active_parameters"),
        "FLOPs per token, forward": ("dense_flops_per_token", "flops_per_token"),
    }
    rows = [[name, *(f"{counts[key]:,}" for key in pair)] for name, pair in names.items()]
    rows.append(["FFN active", "100 %", f"{counts['ffn_active_percent']:.1f} %"])
    rows.append(["zero parameters that pad widths", "", f"{counts['padding_parameters']:,}"])
    rows.append(["on disk", "", bytes_text(counts["disk_bytes"])])
    rows.append(["scale of the routed output", "", ", ".join(f"{scale:g}" for scale in receipt["shape"]["scales"])])
    verdicts = [[name, "yes", ""] for name in counts["accepted_by"]]
    for name, objections in counts["objections"].items():
        reasons = "; ".join(f"{row['field']} is {row['found']}, needs {row['needed']}" for row in objections)
        verdicts.append([name, "no", reasons])
    return Section(
        "plan",
        "Plan",
        [summary("plan", receipt) + ".", *counts["notes"]],
        [
            Table(["", "dense", counts["target"]], rows),
            Table(["target", "can hold it", "what stands in the way"], verdicts, left=(1, 2)),
        ],
        _plan_figures(folder),
    )


def _plan_figures(folder: Path) -> list[Figure]:
    from prismoe.plan import Plan
    from prismoe.plan.anatomy import calibration_beside, plan_anatomy
    from prismoe.report.planpicture import panel_svgs

    path = folder / PLAN
    if not path.is_file():  # the receipt is enough for the rest of the page
        return []
    plan = Plan.load(path)
    panels = panel_svgs(plan_anatomy(plan, calibration=calibration_beside(path, plan)[0]))
    return [Figure(caption, _svg(f"plan-{index}", text)) for index, (caption, text) in enumerate(panels)]


def _certificate(receipts: Mapping[str, Any], folder: Path) -> Section | None:
    if "verify" not in receipts:
        return None
    from prismoe.report import figures

    receipt = receipts["verify"]
    rows = [
        [
            row["name"],
            "holds" if row["passed"] else "FAILED",
            _small(row["measured"]),
            "" if row["limit"] is None else _small(row["limit"]),
            row["meaning"],
            row["where"],
        ]
        for row in receipt["checks"]
    ]
    text = f"{summary('verify', receipt)}. Stock transformers classes, remote code off; {receipt['input']}."
    picture = Figure(
        "Size of the mixture's FFN output by layer (1 is the dense model's)",
        _svg("norm_ratios", figures.norm_ratios(receipt["layers"])),
    )
    table = Table(["check", "", "measured", "limit", "what", "worst at"], rows, left=(1, 4, 5))
    return Section("certificate", "Certificate", [text], [table], [picture])


def _data(receipts: Mapping[str, Any], folder: Path) -> Section | None:
    if "prepare" not in receipts:
        return None
    rows = []
    for row in receipts["prepare"]["domains"]:
        for split in ("train", "heldout"):
            counts = row["splits"][split]
            cells = [f"{counts[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes")]
            rows.append([row["name"], split, *cells, f"{counts['num_bytes'] / max(counts['num_tokens'], 1):.2f}"])
    heads = ["domain", "split", "documents", "tokens", "bytes", "bytes per token"]
    texts = [summary(name, receipts[name]) + "." for name in ("sift", "prepare") if name in receipts]
    audit = "sift/audit.html"
    links = [("What was dropped, and documents to read", audit)] if (folder / audit).is_file() else []
    return Section("data", "Data", texts, [Table(heads, rows, left=(1,))], links=links)


def _provenance(receipts: Mapping[str, Any], seconds: Mapping[str, float], folder: Path) -> list[Section]:
    """Enough to make the run again, and to see whether one has the same bytes."""
    stages = [
        [name, seconds_text(seconds[name]), summary(name, receipts[name])] for name in receipts if name != "report"
    ]
    machine = doctor().sections["system"]
    facts = [
        [name, value] for name, value in {**versions(), **{k: v for k, v in machine.items() if k != "python"}}.items()
    ]
    config = folder / "run.yaml"
    found = [
        Section("stages", "Stages", [], [Table(["stage", "time", ""], stages, left=(2,))]),
        Section("machine", "Versions and machine", [], [Table(["", ""], facts, left=(1,))]),
        Section("config", "Configuration", code=config.read_text(encoding="utf-8") if config.is_file() else ""),
    ]
    if "convert" in receipts:
        rows = [[name, f"{row['bytes']:,}", row["sha256"]] for name, row in receipts["convert"]["files"].items()]
        table = Table(["file", "bytes", "sha256"], rows, left=(2,))
        found.append(Section("files", "Files of the converted model", [], [table]))
    return found


def _small(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.1e}" if number else "0"


def _svg(name: str, text: str) -> str:
    """Make the ids of one drawing its own, since a page holds several."""
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
