"""What can be read off a `RoutingTrace`: NumPy alone, float64, every definition with its formula in docs/routing.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.routing.record import RoutingTrace

__all__ = [
    "DEAD",
    "Drift",
    "Scaling",
    "coactivation_lift",
    "cv_squared",
    "dead_experts",
    "distance_matrix",
    "domain_affinity",
    "dominant_experts",
    "drift",
    "load_fractions",
    "load_variance",
    "mutual_information",
    "normalised_entropy",
    "routing_vectors",
    "training_domains",
]

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Scaling = Literal["fractions", "compat"]

DEAD = 0.05
"""An expert is dead on a domain that gives it less than this share of what a balanced router would."""


def training_domains(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """The numbers of the domains that are no benchmarks."""
    return np.flatnonzero([kind == "train" for kind in trace.kinds])


def load_fractions(trace: RoutingTrace) -> Array:
    """f_gle [G, L, E]: the share of a domain's assignments that an expert got; 1/E each under balance, sum 1."""
    found: Array = trace.load_GLE / (trace.tokens_G[:, None, None] * trace.top_k)
    return found


def _ratio(part: Array, whole: Array, *, otherwise: float = 0.0) -> Array:
    """part / whole, and `otherwise` where there is nothing to divide by."""
    found = np.full(np.broadcast_shapes(part.shape, whole.shape), otherwise)
    np.divide(part, whole, out=found, where=np.broadcast_to(whole > 0, found.shape))
    return found


def routing_vectors(trace: RoutingTrace, *, layer: int = -1, scaling: Scaling = "fractions") -> Array:
    """The vector of each domain [G, E] in one layer (an index into `trace.layers`).

    "fractions": `load_fractions`. "compat": each domain's loads stretched to 0…1, as the code published with LLaMA-MoE
    does; there a vector of equal numbers divides by zero, here it is 0.
    """
    return _scaled(load_fractions(trace)[:, layer], scaling)


def _scaled(vectors_GE: Array, scaling: Scaling) -> Array:
    if scaling == "fractions":
        return vectors_GE
    low, high = (bound(vectors_GE, axis=-1, keepdims=True) for bound in (np.min, np.max))
    return _ratio(vectors_GE - low, high - low)


def distance_matrix(
    trace: RoutingTrace, *, layers: Literal["last", "mean"] = "last", scaling: Scaling = "fractions"
) -> Array:
    """[G, G]: L2 distance between the routing vectors of two domains.

    "last" takes the last layer. "mean" takes the mean over layers of each layer's distance; under "compat" it is the
    distance of the vectors averaged over layers, as published, although expert e of one layer has nothing to do with
    expert e of another.
    """
    fractions_GLE = load_fractions(trace)
    if layers == "last":
        return _distances(_scaled(fractions_GLE[:, -1], scaling))
    if scaling == "compat":
        return _distances(_scaled(fractions_GLE.mean(axis=1), scaling))
    found: Array = np.mean([_distances(fractions_GLE[:, layer]) for layer in range(len(trace.layers))], axis=0)
    return found


def _distances(vectors_GE: Array) -> Array:
    found: Array = np.linalg.norm(vectors_GE[:, None] - vectors_GE[None], axis=-1)
    return found


def load_variance(trace: RoutingTrace) -> Array:
    """[L]: variance of f_gle over the training domains, mean over experts: specialisation against depth."""
    found: Array = load_fractions(trace)[training_domains(trace)].var(axis=0).mean(axis=-1)
    return found


def cv_squared(trace: RoutingTrace, *, of: Literal["load", "importance"] = "load") -> Array:
    """[G, L]: variance over squared mean, over the experts of a layer; 0 is balance, E - 1 a single expert."""
    values = (trace.load_GLE if of == "load" else trace.importance_GLE).astype(np.float64)
    found: Array = values.var(axis=-1) / values.mean(axis=-1) ** 2
    return found


def dead_experts(trace: RoutingTrace, *, threshold: float = DEAD) -> Flags:
    """[G, L, E]: f_gle is below `threshold` / E."""
    return load_fractions(trace) < threshold / trace.num_experts


def dominant_experts(trace: RoutingTrace) -> Flags:
    """[G, L, E]: chosen by more tokens than halfway from the fair share K/E to all of them, as `pretrain` warns."""
    return load_fractions(trace) > (1 / trace.top_k + 1 / trace.num_experts) / 2


def domain_affinity(trace: RoutingTrace) -> Array:
    """[G, L, E]: f_gle over its mean over the training domains; 1 is indifference, 0 where none uses it."""
    fractions_GLE = load_fractions(trace)
    mean_LE = fractions_GLE[training_domains(trace)].mean(axis=0)
    return _ratio(fractions_GLE, mean_LE)


def mutual_information(trace: RoutingTrace) -> Array:
    """[L]: bits that the expert of one assignment tells about the training domain of its token, domains being equally
    likely. Between 0 and log₂ min(E, number of domains); 0 for a single domain.
    """
    given_GLE = load_fractions(trace)[training_domains(trace)]
    whole_LE = given_GLE.mean(axis=0)
    ratio_GLE = np.where(given_GLE > 0, _ratio(given_GLE, whole_LE, otherwise=1.0), 1.0)
    found: Array = (given_GLE * np.log2(ratio_GLE)).sum(axis=-1).mean(axis=0)
    return np.maximum(found, 0.0)


def normalised_entropy(trace: RoutingTrace) -> Array:
    """[G, L]: mean entropy of the router's softmax as a share of ln E: 1 is undecided, 0 certain."""
    found: Array = trace.entropy_GL / np.log(trace.num_experts)
    return found


def coactivation_lift(trace: RoutingTrace) -> Array:
    """[L, E, E]: how often two experts share a token, over what their loads alone would give.

    The latter is n_i·n_j/T times (K-1)·E/(K·(E-1)): K different experts are drawn, not K independent ones. 1 is
    independence. NaN on the diagonal, where an expert got nothing, and everywhere when K is 1.
    """
    together, tokens = trace.coactivation_LEE.astype(np.float64), float(trace.tokens_G.sum())
    load_LE = np.diagonal(together, axis1=1, axis2=2)
    experts, kept = trace.num_experts, trace.top_k
    expected = load_LE[:, :, None] * load_LE[:, None] / tokens * (kept - 1) * experts / (kept * (experts - 1))
    lift = _ratio(together, expected, otherwise=np.nan)
    lift[:, np.arange(experts), np.arange(experts)] = np.nan
    return lift


@dataclass(frozen=True, eq=False)
class Drift:
    """Between two traces of the same text: `moved_GL` is half of Σ_e |f_gle - f'_gle|, the share of a domain's
    assignments that would have to change hands; `kept_GL` the share of the experts of sampled tokens that stayed.
    """

    moved_GL: Array
    kept_GL: Array

    def to_dict(self) -> dict[str, Any]:
        """Rows of domains, columns of layers."""
        return {"moved": self.moved_GL.tolist(), "kept": self.kept_GL.tolist()}


def drift(before: RoutingTrace, after: RoutingTrace) -> Drift:
    """How far routing moved from one checkpoint to another.

    Raises:
        InputError: traces of different texts, layers or experts.
    """
    for name in ("domains", "layers", "num_experts", "top_k"):
        if getattr(before, name) != getattr(after, name):
            raise InputError(f"{name} {getattr(after, name)}", where="drift", needed=f"{getattr(before, name)}")
    if not np.array_equal(before.sample_tokens_GS, after.sample_tokens_GS):
        raise InputError("traces of different text", where="drift", needed="one seed, seq_len and max_tokens for both")
    moved_GL = np.abs(load_fractions(before) - load_fractions(after)).sum(axis=-1) / 2
    first, second = before.sample_experts_GSLK, after.sample_experts_GSLK
    same_GSL = (first[..., :, None] == second[..., None, :]).any(axis=-1).sum(axis=-1)
    real_GS1 = (before.sample_tokens_GS >= 0)[..., None]
    counts_G1 = np.maximum(real_GS1.sum(axis=1), 1) * before.top_k
    return Drift(moved_GL=moved_GL, kept_GL=np.where(real_GS1, same_GSL, 0).sum(axis=1) / counts_G1)
