"""Which experts the text of each domain is sent to, layer by layer: the expert-selection figure of LLaMA-MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prismoe.console import count_text
from prismoe.report.heat import heat_panel
from prismoe.report.page import Block, Figure, Findings, Section, Table, Text

if TYPE_CHECKING:
    from prismoe.routing.record import RoutingTrace

__all__ = ["PLACE", "section"]

PLACE = 50
MOST_NAMED = 24  # experts called by number in one sentence


def section(found: Findings) -> Section | None:
    """Of a routing trace."""
    trace = found.trace
    if trace is None:
        return None
    from prismoe.routing.metrics import load_fractions

    share_GLE = load_fractions(trace) * trace.num_experts
    top = max(2.0, float(share_GLE.max()))
    layers, experts = len(trace.layers), trace.num_experts
    panels = []
    for name, kind, share_LE in zip(trace.domains, trace.kinds, share_GLE, strict=True):
        row, column = divmod(int(share_LE.argmax()), experts)
        most = f"most to expert {column} of layer {trace.layers[row]}, {share_LE.max():.1f} × a fair share"
        panels.append(
            heat_panel(
                share_LE,
                columns=[str(expert) for expert in range(experts)],
                rows=[str(layer) for layer in trace.layers],
                top=top,
                label="× fair share",
                shows=f"{name}: {most}",
                title=name if kind == "train" else f"{name} (benchmark)",
                axes=("expert", "layer"),
                cell=(max(0.12, min(0.29, 2.6 / experts)), max(0.13, min(0.24, 2.2 / layers))),
            )
        )
    about = (
        "A cell is the share of a domain's assignments that went to an expert, times the number of experts: 1 is a "
        "balanced router, 0 an expert that is never chosen. One scale for all domains. Definitions: docs/routing.md."
    )
    counts = Table(
        ["text", "", "tokens"],
        [
            [name, kind, f"{n:,}"]
            for name, kind, n in zip(trace.domains, trace.kinds, trace.tokens_G.tolist(), strict=True)
        ],
        left=(1,),
        caption="what was traced",
    )
    total = count_text(int(trace.tokens_G.sum()))
    text = f"{total} tokens through {layers} layers of {experts} experts, {trace.top_k} for each token."
    figure = Figure("expert_selection", "Expert selection by layer and domain", panels, about)
    blocks: list[Block] = [Text(text), *_extremes(trace), figure, counts]
    return Section("routing", "Which experts are chosen", blocks)


def _extremes(trace: RoutingTrace) -> list[Text]:
    """Dead and dominant experts by name."""
    from prismoe.routing.metrics import DEAD, dead_experts, dominant_experts, training_domains

    train = training_domains(trace)
    dead_LE = dead_experts(trace)[train].all(axis=0)
    limit = f"less than {100 * DEAD:.0f} % of a fair share in every training domain"
    told = [Text(f"Dead experts ({limit}): {_named(trace.layers, dead_LE)}.", look="bad" if dead_LE.any() else "")]
    dominant_LE = dominant_experts(trace)[train].all(axis=0)
    if dominant_LE.any():
        told.append(Text(f"Dominant in every training domain: {_named(trace.layers, dominant_LE)}.", look="bad"))
    return told


def _named(layers: Sequence[int], flags_LE: Any) -> str:
    """ "layer 0: 3, 7; layer 5: 2", or "none"."""
    parts, left = [], MOST_NAMED
    for layer, flags_E in zip(layers, flags_LE, strict=True):
        experts = flags_E.nonzero()[0].tolist()
        if experts[:left]:
            parts.append(f"layer {layer}: {', '.join(map(str, experts[:left]))}")
        left -= len(experts)
    more = f"; and {-left} more" if left < 0 else ""
    return "; ".join(parts) + more if parts else "none"
