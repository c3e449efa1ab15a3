"""Held-out text: perplexity, bits per byte and the paired difference of every model on every domain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.report.page import Figure, Findings, Panel, Section, Table, Text
from prismoe.report.style import legend_above, look
from prismoe.views import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 10


def section(found: Findings) -> Section | None:
    """Of the stage `eval`."""
    receipt = found.receipts.get("eval")
    if receipt is None or not receipt["scores"]:
        return None
    models, domains = _models(receipt), list(receipt["domains"])
    table = {(row["domain"], row["model"]): row for row in receipt["scores"]}
    perplexity = [[name, *(f"{table[name, model]['perplexity']:,.2f}" for model in models)] for name in domains]
    bits = [[name, *(f"{table[name, model]['bits_per_byte']:.3f}" for model in models)] for name in domains]
    change = [[name, *(_change(table[name, model]) for model in models[1:])] for name in domains]
    tables = [Table(["domain", *models], perplexity, caption="perplexity per token")]
    tables.append(Table(["domain", *models], bits, caption="bits per byte of text"))
    if len(models) > 1:
        caption = f"loss minus that of {models[0]}, nats per token ± standard error of the paired difference"
        tables.append(Table(["domain", *models[1:]], change, caption=caption))
    text = f"{summary('eval', receipt)} in windows of {receipt['seq_len']}, the same for every model."
    means = [sum(table[name, model]["bits_per_byte"] for name in domains) / len(domains) for model in models]
    shows = "mean over domains: " + ", ".join(f"{m} {mean:.3f}" for m, mean in zip(models, means, strict=True))
    height = 1.5 + 0.34 * len(domains)
    panel = Panel(partial(_draw, receipt=receipt), f"Bits per byte, {shows}", height=height)
    figure = Figure("scores", "Bits per byte of every model on the held-out text of every domain", [panel])
    return Section("scores", "Held-out scores", [Text(text), figure, *tables])


def _models(receipt: Mapping[str, Any]) -> list[str]:
    """In the order they were scored: the first is what the others are compared with."""
    return list(dict.fromkeys(row["model"] for row in receipt["scores"]))


def _change(row: Mapping[str, Any]) -> str:
    error = row["change_standard_error"]  # None where one document was scored
    return f"{row['change']:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def _draw(axes: Axes, *, receipt: Mapping[str, Any]) -> None:
    models, domains = _models(receipt), list(receipt["domains"])
    table = {(row["model"], row["domain"]): row["bits_per_byte"] for row in receipt["scores"]}
    for line, domain in enumerate(domains):
        values = [table[model, domain] for model in models]
        axes.plot([min(values), max(values)], [line, line], color="#bbbbbb", linewidth=1.2, zorder=1)
    for index, model in enumerate(models):
        values, mark = [table[model, domain] for domain in domains], {**look(index), "linestyle": "none"}
        axes.plot(values, range(len(domains)), label=model, markersize=7, **mark)
    axes.set_yticks(range(len(domains)), domains)
    axes.set(xlabel="bits per byte (less is better)", ylim=(len(domains) - 0.5, -0.5))
    legend_above(axes)
