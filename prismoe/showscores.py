"""Scores as a person wants to read them: perplexities, the table of benchmarks, its words, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from prismoe.console import Screen, count_text

__all__ = ["scores_line", "show_scores"]

Receipt = Mapping[str, Any]
GROUPS = ("perplexity", "bits/byte")


def scores_line(receipt: Receipt) -> str:
    """What was measured, in one line."""
    models = list(receipt["models"])
    if receipt.get("state") == "dry run":
        return f"{', '.join(models)}: {_planned(receipt)}"
    parts = []
    if tokens := sum(row["scored_tokens"] for row in receipt["scores"] if row["model"] == models[0]):
        parts.append(f"{count_text(tokens)} held-out tokens")
    if tasks := receipt.get("benchmarks"):
        documents = sum(row["num_documents"] for row in tasks.values())
        parts.append(f"{count_text(documents)} documents of {len(tasks)} task{'s' * (len(tasks) > 1)}")
    return f"{', '.join(models)} on {' and '.join(parts)}"


def _planned(receipt: Receipt) -> str:
    if not receipt["tasks"]:
        return "the config is right"
    known = [row["num_requests"] for row in receipt["tasks"]]
    tasks = f"{len(known)} task{'s' * (len(known) > 1)}"
    if None in known:
        return f"{tasks}; how many prompts the hub's own files make is not known before they are there"
    return f"{count_text(sum(known))} prompts of {tasks} for each model, {count_text(receipt['num_requests'])} in all"


def show_scores(screen: Screen, receipt: Receipt) -> None:
    """All of it."""
    if receipt.get("state") == "dry run":
        _show_planned(screen, receipt)
        return
    if receipt["scores"]:
        _text(screen, receipt)
    if receipt.get("tasks"):
        _tasks(screen, receipt)
    if (control := receipt.get("control")) is not None and control["folder"] is not None:
        kept = f"{control['active_neurons']} of {control['dense_neurons']} neurons a layer kept"
        how = "at random, there is no text" if control["by"] == "random" else f"by {control['by']}, measured on "
        measured = "" if control["by"] == "random" else control["measured_on"]
        screen.line(f"static: the dense model with {kept} {how}{measured}; not trained", style="dim")
    if receipt.get("findings"):
        screen.line("")
        for sentence in receipt["findings"]:
            screen.line(sentence)


def _show_planned(screen: Screen, receipt: Receipt) -> None:
    if not receipt["tasks"]:
        return
    rows = [
        [
            row["task"],
            *("" if row[key] is None else f"{row[key]:,}" for key in ("num_fewshot", "num_documents", "num_requests")),
        ]
        for row in receipt["tasks"]
    ]
    screen.table(["task", "shots", "documents", "prompts"], rows)


def _text(screen: Screen, receipt: Receipt) -> None:
    models, table = list(receipt["models"]), {(row["domain"], row["model"]): row for row in receipt["scores"]}
    heads = [f"{group}\n{model}" for group in GROUPS for model in models]
    rows: list[list[str | Text]] = []
    for domain in receipt["domains"]:
        found = [table[domain, model] for model in models]
        perplexity = [f"{row['perplexity']:,.2f}" for row in found]
        rows.append([domain, *perplexity, *(f"{row['bits_per_byte']:.3f}" for row in found)])
    screen.table(["\ndomain", *heads], rows)
    screen.line(f"windows of {receipt['seq_len']} tokens, the same for every model", style="dim")


def _tasks(screen: Screen, receipt: Receipt) -> None:
    table = {(row["task"], row["model"]): row for row in receipt["tasks"]}
    models, tasks = list(receipt["models"]), list(dict.fromkeys(row["task"] for row in receipt["tasks"]))
    first, others = models[0], models[1:]
    scores: list[list[str | Text]] = []
    changes: list[list[str | Text]] = []
    for task in tasks:
        row = table[task, first]
        facts = ["" if row["num_fewshot"] is None else str(row["num_fewshot"]), f"{row['num_documents']:,}"]
        chance = "" if row["chance"] is None else f"{100 * row['chance']:.1f}"
        scores.append([task, row["metric"], *facts, chance, *(_score(table[task, model]) for model in models)])
        changes.append([task, *(_change(table[task, model]) for model in others)])
    screen.title("benchmarks, %, with standard error")
    heads = ["task", "metric", "shots", "documents", "chance", *models]
    screen.table(heads, scores, justify="ll" + "r" * (len(heads) - 2))
    if others:
        screen.title(f"change against {first}, points")
        screen.table(["task", *others], changes)
        tests = sum(row["p_value"] is not None for row in receipt["tasks"])
        screen.line(
            "paired permutation test over the same documents (McNemar's exact test where an answer is right or wrong), "
            f"5 % for all {tests} tests together (Holm)",
            style="dim",
        )
    for task, facts_ in receipt["benchmarks"].items():
        if facts_["note"]:
            screen.line(f"{task}: {facts_['note']}", style="dim")


def _score(row: Receipt) -> str:
    error = row["standard_error"]
    return f"{100 * row['score']:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")


def _change(row: Receipt) -> Text:
    text = f"{100 * row['change']:+.1f} {row['verdict']:<11}"
    return Text(text, style="bold" if row["verdict"] == "significant" else "dim")
