"""The receipt of a trace: what a person asks first of routing, in numbers and in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.folder import Manifest, claim, hash_files
from prismoe.routing import metrics
from prismoe.routing.record import FILE, RoutingTrace

__all__ = ["BEFORE", "Traced", "describe_trace", "write_traces"]

BEFORE = "before.safetensors"
UNDECIDED = 0.97  # of ln E: the mean entropy from which on a router is said to be undecided
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Traced:
    """Receipt. Rows of `domains`: name, kind, tokens. Rows of `per_layer`: means over the training domains (see
    docs/routing.md). `distances` holds the matrices `last` and `mean` in the order of domains, `dead` and `dominant`
    rows of layer, expert and the training domains where they are. `drift` is None without an earlier trace.
    """

    out: str | None
    model: dict[str, Any]
    before: dict[str, Any] | None
    num_experts: int
    top_k: int
    domains: tuple[dict[str, Any], ...]
    per_layer: tuple[dict[str, Any], ...]
    distances: dict[str, list[list[float]]]
    dead: tuple[dict[str, Any], ...]
    dominant: tuple[dict[str, Any], ...]
    drift: dict[str, Any] | None
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_trace(trace: RoutingTrace, *, before: RoutingTrace | None = None, out: str | None = None) -> Traced:
    """What stands in the trace, and how far it is from an earlier one of the same text.

    Raises:
        InputError: `before` is of another text or another shape of mixture.
    """
    train = metrics.training_domains(trace)
    moved = None if before is None else metrics.drift(before, trace)
    columns = {
        "entropy": metrics.normalised_entropy(trace)[train].mean(axis=0),
        "cv_squared": metrics.cv_squared(trace)[train].mean(axis=0),
        "load_variance": metrics.load_variance(trace),
        "mutual_information": metrics.mutual_information(trace),
        "norm": trace.norm_GL[train].mean(axis=0),
    }
    if moved is not None:
        columns["moved"] = moved.moved_GL[train].mean(axis=0)
    dead = _named(trace, metrics.dead_experts(trace))
    dominant = _named(trace, metrics.dominant_experts(trace))
    distances = {
        "last": metrics.distance_matrix(trace, layers="last"),
        "mean": metrics.distance_matrix(trace, layers="mean"),
    }
    sentences = [
        *_about_dead(trace, dead),
        *_about(trace, dominant, "dominant"),
        *_about_distances(trace, distances["mean"]),
        *_about_layers(trace, columns),
        *(_about_drift(trace, moved, train) if moved is not None else ()),
    ]
    return Traced(
        out=out,
        model=dict(trace.provenance["model"]),
        before=None if before is None else dict(before.provenance["model"]),
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        domains=tuple(
            {"name": name, "kind": kind, "tokens": int(tokens)}
            for name, kind, tokens in zip(trace.domains, trace.kinds, trace.tokens_G, strict=True)
        ),
        per_layer=tuple(
            {"layer": layer, **{name: float(column[row]) for name, column in columns.items()}}
            for row, layer in enumerate(trace.layers)
        ),
        distances={name: matrix.tolist() for name, matrix in distances.items()},
        dead=tuple(dead),
        dominant=tuple(dominant),
        drift=None if moved is None else moved.to_dict(),
        sentences=tuple(sentences),
    )


def write_traces(
    out: Path, trace: RoutingTrace, *, before: RoutingTrace | None = None, key: str = "trace", force: bool = False
) -> None:
    """A folder with the trace, the earlier one where there is one, and a manifest.

    Raises:
        ResourceError: it holds something else, or cannot be written.
    """
    traces = {FILE: trace} | ({BEFORE: before} if before is not None else {})
    with claim(out, kind="trace", key=key, force=force):
        for name, one in traces.items():
            one.save(out / name)
        parents = {name: str(one.provenance["model"]["fingerprint"]) for name, one in traces.items()}
        config = {name: trace.provenance[name] for name in ("seed", "seq_len", "max_tokens", "texts")}
        Manifest(kind="trace", parents=parents, config=config, files=hash_files(out, traces), key=key).write(out)


def _named(trace: RoutingTrace, flags_GLE: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    train = metrics.training_domains(trace)
    flags = flags_GLE[train]
    return [
        {
            "layer": trace.layers[row],
            "expert": int(expert),
            "domains": [trace.domains[train[number]] for number in np.flatnonzero(flags[:, row, expert])],
        }
        for row, expert in np.argwhere(flags.any(axis=0)).tolist()
    ]


def _about_dead(trace: RoutingTrace, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    train = metrics.training_domains(trace)
    everywhere = [row for row in rows if len(row["domains"]) == len(train)]
    if everywhere:
        return _about(trace, rows, "dead")
    share_LE = metrics.load_fractions(trace)[train].mean(axis=0) * trace.num_experts
    row, expert = np.unravel_index(int(share_LE.argmin()), share_LE.shape)
    least = f"layer {trace.layers[int(row)]} expert {expert} with {share_LE.min():.2f} of its fair share"
    return [f"no expert is dead on every domain (the least used: {least})", *_about(trace, rows, "dead")]


def _about(trace: RoutingTrace, rows: Sequence[Mapping[str, Any]], what: str, *, most: int = 4) -> list[str]:
    """Experts of a layer that are so on the same domains share a sentence, and layers with the same experts do."""
    count = len(metrics.training_domains(trace))
    by_layer: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for row in rows:
        by_layer.setdefault((row["layer"], tuple(row["domains"])), []).append(row["expert"])
    together: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = {}
    for (layer, domains), experts in by_layer.items():
        together.setdefault((tuple(experts), domains), []).append(layer)
    ordered = sorted(together.items(), key=lambda item: (-len(item[0][1]), item[1]))
    found = []
    for (chosen, domains), layers in ordered[:most]:
        on = f"all {count} domains" if len(domains) == count and count > 1 else ", ".join(domains)
        found.append(f"{_plural('layer', layers)}: {_plural('expert', chosen)} {what} on {on}")
    if len(ordered) > most:
        found.append(f"{len(ordered) - most} more groups of {what} experts: see the receipt")
    return found


def _plural(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _about_distances(trace: RoutingTrace, matrix_GG: Array) -> list[str]:
    train = metrics.training_domains(trace).tolist()
    pairs = sorted((matrix_GG[i, j], i, j) for i in train for j in train if i < j)
    found = []
    if pairs:
        (near, i, j), (far, k, m) = pairs[0], pairs[-1]
        text = f"{trace.domains[i]} and {trace.domains[j]} are nearest ({near:.3f})"
        if len(pairs) > 1:
            text += f", {trace.domains[k]} and {trace.domains[m]} farthest ({far:.3f})"
        found.append(f"{text}: L2 between load fractions, mean over layers")
    for number in sorted(set(range(len(trace.domains))) - set(train)):
        nearest = min(train, key=lambda other: matrix_GG[number, other])
        found.append(
            f"{trace.domains[number]} is nearest to {trace.domains[nearest]} ({matrix_GG[number, nearest]:.3f})"
        )
    return found


def _about_layers(trace: RoutingTrace, columns: Mapping[str, Array]) -> list[str]:
    found = []
    count = len(metrics.training_domains(trace))
    if count > 1:
        bits, limit = columns["mutual_information"], np.log2(min(count, trace.num_experts))
        best, worst = (trace.layers[int(place)] for place in (bits.argmax(), bits.argmin()))
        found.append(
            f"layer {best} tells domains apart best ({bits.max():.3f} of at most {limit:.2f} bits), "
            f"layer {worst} least ({bits.min():.3f})"
        )
    undecided = [layer for layer, share in zip(trace.layers, columns["entropy"], strict=True) if share > UNDECIDED]
    if undecided:
        where = "every layer" if len(undecided) == len(trace.layers) else _plural("layer", undecided)
        found.append(f"routers of {where} are undecided: entropy above {UNDECIDED:g} of ln {trace.num_experts}")
    return found


def _about_drift(trace: RoutingTrace, moved: metrics.Drift, train: npt.NDArray[np.int64]) -> list[str]:
    moved_L = moved.moved_GL[train].mean(axis=0)
    most = int(moved_L.argmax())
    return [
        f"since the earlier model {100 * moved_L.mean():.0f} % of the load moved to other experts, most in layer "
        f"{trace.layers[most]} ({100 * moved_L[most]:.0f} %); {100 * moved.kept_GL[train].mean():.0f} % of the choices "
        "for sampled tokens stayed"
    ]
