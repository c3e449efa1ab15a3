"""Model cards: README.md in the model folders of a run, where the Hugging Face hub and people look for it.

Everything in a card is read from receipts. A manifest lists the files of a model, and a card is none of them: the
folder stays what its manifest says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from prismoe.console import count_text
from prismoe.folder import MANIFEST, write_atomic
from prismoe.report.page import Findings
from prismoe.state import CONFIG
from prismoe.views import summary

__all__ = ["NAME", "write_cards"]

NAME = "README.md"
MODELS = {"moe": "step 0", "recovered": "recovered", "train/model": "trained"}  # folder of a run: what `eval` calls it
MAX_BYTES = 1 << 20  # of a stranger's card
MARK = re.compile(r"\n<!-- prismoe ([0-9a-f]{16}) -->\n$")


def write_cards(found: Findings) -> list[Path]:
    """Write a card into every finished model folder; one that a person has written or changed is left alone.

    Raises:
        ResourceError: a folder cannot be written.
    """
    written = []
    for folder, model in MODELS.items():
        path = found.folder / folder / NAME
        if not (path.parent / MANIFEST).is_file() or (path.exists() and not _ours(path.read_bytes())):
            continue
        text = _card(found, model)
        write_atomic(path, f"{text}\n<!-- prismoe {_digest(text)} -->\n".encode())
        written.append(path)
    return written


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ours(data: bytes) -> bool:
    """Whether a card is as it was written here."""
    text = data.decode(errors="replace")
    mark = MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def _card(found: Findings, model: str) -> str:
    import jinja2

    receipts = found.receipts
    plan = receipts["plan"]
    parent = _Parent(str(plan["source_name"]))
    title = f"{Path(plan['source_name']).name} as {plan['account']['target']}"
    page = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("prismoe.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    )
    trained = receipts.get("pretrain") if model == "trained" else None
    text = page.render(
        front=_front(found, parent, title, model),
        title=title,
        parent=parent,
        plan=plan,
        plan_line=summary("plan", plan),
        counts=plan["account"],
        count=count_text,
        trained=trained,
        trained_line=summary("pretrain", {**trained, "tokens_per_second": None}) if trained else "",
        prepared=receipts.get("prepare"),
        scores=_rows(receipts, model, "scores"),
        tasks=_rows(receipts, model, "tasks"),
        limits=_limits(found, model, trained),
    )
    return text.strip() + "\n"


class _Parent:
    """What the dense model says of itself: in its folder, or in the hub's cache; no socket is opened."""

    def __init__(self, source: str) -> None:
        from huggingface_hub import try_to_load_from_cache

        folder, card, config = Path(source), "", "{}"
        self.hub: str | None = None
        if folder.is_dir():
            card, config = (_text(folder / name) for name in (NAME, "config.json"))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            cached = try_to_load_from_cache(source, "config.json")
            if isinstance(cached, str):
                self.hub = source
                card, config = (_text(Path(cached).with_name(name)) for name in (NAME, "config.json"))
        self.name = self.hub or folder.name
        self.card = _front_matter(card)
        stated = self.card.get("license") or _json(config).get("license")
        self.license = stated if isinstance(stated, str) else None


def _text(path: Path) -> str:
    return path.read_bytes()[:MAX_BYTES].decode(errors="replace") if path.is_file() else ""


def _json(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(card: str) -> Mapping[str, Any]:
    """The YAML between the two lines of dashes that a card of the hub begins with: texts and lists of them alone."""
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        read = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none, and a nest, are no YAMLError
        return {}
    return {key: value for key, value in read.items() if _texts(value)} if isinstance(read, dict) else {}


def _texts(value: object) -> bool:
    return all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _front(found: Findings, parent: _Parent, title: str, model: str) -> str:
    """The YAML that the hub reads; what is not known is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["task"],
            dataset_args={"num_few_shot": row["num_fewshot"], "num_documents": row["num_documents"]},
            metric_type=row["metric"],
            metric_value=row["score"],
        )
        for row in _rows(found.receipts, model, "tasks")
        if row["num_fewshot"] is not None  # the mean of all tasks is none of them
    ]

    datasets = sorted({f"{a}/{b}" for a, b in re.findall(r"hf://datasets/([\w.-]+)/([\w.-]+)", _config(found))})
    more = {key: parent.card[key] for key in ("license_name", "license_link") if parent.license and key in parent.card}
    data = ModelCardData(
        base_model=parent.hub,
        datasets=datasets or None,
        language=parent.card.get("language"),
        eval_results=results or None,
        library_name="transformers",
        model_name=title if results else None,
        license=parent.license,
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "prismoe", str(found.receipts["plan"]["account"]["target"])],
        **more,
    )
    return str(data.to_yaml())


def _config(found: Findings) -> str:
    return _text(found.folder / CONFIG)


def _rows(receipts: Mapping[str, Any], model: str, kind: str) -> list[dict[str, Any]]:
    """Scores of this model, each with the first model's beside it."""
    rows = receipts.get("eval", {}).get(kind, ())
    what = "domain" if kind == "scores" else "task"
    first = {row[what]: row for row in reversed(rows) if rows and row["model"] == rows[0]["model"]}
    return [{**row, "first": first[row[what]]} for row in rows if row["model"] == model]


def _limits(found: Findings, model: str, trained: Mapping[str, Any] | None) -> list[str]:
    """What a user has to know, from what was and was not measured."""
    receipts, told = found.receipts, list[str]()
    verified = receipts.get("verify")
    if verified is None:
        told.append("The conversion was not verified.")
    else:
        held = "holds" if verified["passed"] else "FAILED: do not use this model"
        told.append(f"Certificate of the conversion: {held} ({summary('verify', verified)}).")
    if trained is None:
        told.append("It was not trained after the conversion: it answers worse than its parent.")
    else:
        share = trained["tokens"] / trained["parameters"]
        told.append(f"Trained on {count_text(trained['tokens'])} tokens after the conversion, {share:.2g} a parameter.")
        told += [f"{text[0].upper()}{text[1:]}." for text in trained["warnings"]]
    scored = receipts.get("eval", {})
    tasks = [row for row in scored.get("tasks", ()) if row["model"] == model]
    chance = [row["task"] for row in tasks if row.get("above_chance") is False]
    if not tasks:
        told.append("No benchmark was run.")
    if chance:
        told.append(f"No better than guessing on {', '.join(chance)}.")
    told += [str(sentence) for sentence in scored.get("findings", ()) if model in str(sentence)]
    if not scored.get("scores"):
        told.append("Held-out loss was not measured.")
    told.append("Not measured: following instructions, safety, bias, and whatever is not in the tables of this card.")
    return told
