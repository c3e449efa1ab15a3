"""A plan: which neurons of each dense FFN become which expert. It names no tensor and depends on no target."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe import registry
from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import Branched
from prismoe.checkpoint.family import check_tensors
from prismoe.checkpoint.finite import finite_ffn
from prismoe.checkpoint.tensorfile import DTYPES, read_sealed, sealed_bytes
from prismoe.errors import InputError, UsageError
from prismoe.folder import MANIFEST, sha256_file, write_atomic
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, layer_problem, no_statistics
from prismoe.plan.planfile import pack_layer, unpack_layer
from prismoe.plan.rescale import Scale, rescaled
from prismoe.routerinit import Router
from prismoe.stats.calibration import Calibration
from prismoe.strictjson import parse_json

__all__ = [
    "LayerPlan",
    "LayerView",
    "Origin",
    "Plan",
    "PlanShape",
    "RouterDraw",
    "make_plan",
    "plan_shape",
    "select_layers",
]

FORMAT = "prismoe-plan-1"
MAX_NEURONS = 1 << 20  # a damaged header must not ask for more memory than this


@dataclass(frozen=True)
class Origin:
    """Where a plan came from: enough to make it again."""

    method: str
    arguments: dict[str, Any]
    seed: int
    source: str  # fingerprint of the dense checkpoint (sha256 over config and tensor headers)
    calibration: str = ""  # sha256 of its manifest; empty where none was given


@dataclass(frozen=True, eq=False)
class Plan:
    """One `LayerPlan` per layer, or None where the layer stays dense.

    `num_neurons` F and `hidden_size` D are the dense model's. `branches` are the fingerprints of the checkpoints that
    experts are made of beside the base; checkpoint 0 is the base, b is branches[b - 1]. Everything outside the experts
    is the mean of the checkpoints `rest`, or with one of them its own.
    """

    layers: tuple[LayerPlan | None, ...]
    top_k: int
    num_neurons: int
    hidden_size: int
    origin: Origin = field(repr=False)
    branches: tuple[str, ...] = ()
    rest: tuple[int, ...] = (0,)

    def sources(
        self, base: Checkpoint, *, branches: Sequence[str | Path] | None = None, offline: bool = False
    ) -> Checkpoint:
        """`base` with the branches beside it that this plan was made of, if it was.

        Args:
            branches: their folders, in the order of the plan; None: where they were when the plan was made.

        Raises:
            InputError: they do not fit the base or are not those of the plan, see `Branched.beside`.
            UsageError: branches for a plan of one checkpoint.
        """
        if not self.branches:
            if branches:
                raise UsageError("a plan of one checkpoint", where="branches", needed="a plan of the method branch")
            return base
        if isinstance(base, Branched):
            base, *given = base.donors
            return Branched.beside(base, given, fingerprints=self.branches)
        places = self.origin.arguments.get("branches", ()) if branches is None else branches
        return Branched.beside(base, places, fingerprints=self.branches, offline=offline)

    def to_bytes(self) -> bytes:
        """A .safetensors file: index tensors, and everything else readable in the header.

        Experts that all hold every neuron are named in the header instead of stored. Equal plans give equal bytes.
        """
        header, tensors = _pack(self)
        entries = [(name, "F32" if a.dtype == np.float32 else "I32", a.shape) for name, a in tensors.items()]
        data = b"".join(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes() for a in tensors.values())
        return sealed_bytes(entries, data, metadata=header)

    def save(self, path: str | Path) -> Path:
        """Write the plan into one file.

        Raises:
            ResourceError: the folder cannot be written or the disk is full.
        """
        path = Path(path)
        write_atomic(path, self.to_bytes())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and check every index in it.

        Raises:
            InputError: not a plan, damaged, or inconsistent; names the file and the layer.
        """
        return _unpack(Path(path))


@dataclass(frozen=True)
class PlanShape:
    """What a plan comes to in numbers: all that an accountant or a target's rules need. Widths are before padding."""

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_width: int  # the widest, where layers differ
    shared_width: int
    scales: tuple[float, ...]  # the different ones, ascending
    num_branches: int = 0  # checkpoints beside the base that are read as well

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that stay as they are."""
        return tuple(layer for layer in range(self.num_layers) if layer not in set(self.moe_layers))


def make_plan(
    source: str | Path | Checkpoint,
    *,
    method: str = "random",
    layers: str | int | Sequence[int] = "all",
    top_k: int = 2,
    seed: int = 0,
    scale: Scale = "auto",
    router: str = "auto",
    calibration: str | Path | Calibration | None = None,
    **arguments: Any,
) -> Plan:
    """Plan how the FFN of each selected layer becomes experts. Needs weights and statistics only where a method,
    router or scale looks at them.

    Args:
        source: a checkpoint, its folder or hub name; `config.json` alone will do.
        method: a file of `prismoe/methods`; `arguments` are its keyword parameters and those of `router`.
        layers: see `select_layers`; the others stay dense.
        top_k: experts per token. A method that makes a single expert has it always on.
        seed: of everything that draws.
        scale: factor on the routed output: "auto" is the method's own, see `prismoe.plan.rescale` for the other names.
        router: a file of `prismoe/routerinit`, or "from:FILE"; "auto" is the method's own rows, else "random".
        calibration: what `calibrate` made of this checkpoint.

    Raises:
        UsageError: an unknown method, router or argument, more active experts than there are, a width that does not
            divide, statistics that are needed and not there.
        InputError: the checkpoint is not one that prismoe reads, or the calibration is another checkpoint's.
        NumericalError: weights or statistics that are not finite.
    """
    checkpoint = Checkpoint.open(source)
    dense = checkpoint.family
    if checkpoint.has_weights:  # converting would find it later
        shapes = {name: info.shape for name, info in checkpoint.donors[0].tensors.items()}
        check_tensors(dense, shapes, where=str(checkpoint.folder))
    module = registry.load("prismoe.methods", method, where="method")
    split = module.split
    init = Router.choose(router, arguments, known=registry.keywords(split))
    bound = registry.arguments(split, init.others, where=f"method {method}")
    factor = registry.arguments(rescaled, {"scale": scale}, where="plan")
    if not 0 <= seed < 2**63:
        raise UsageError(f"{seed}", where="seed", needed="a whole number from 0 to 2**63 - 1")
    if top_k < 1:
        raise UsageError(f"{top_k}", where="top_k", needed="at least 1")
    num_experts = module.num_experts(bound) if hasattr(module, "num_experts") else bound.get("num_experts")
    if num_experts is None:
        num_experts = top_k = 1  # such a method makes a single expert
    if top_k > num_experts:
        raise UsageError(f"{top_k} of {num_experts} experts", where="top_k", needed=f"at most {num_experts}")
    branches = Branched.beside(checkpoint, bound["branches"]).donors[1:] if "branches" in bound else ()
    statistics = None if calibration is None else _calibration(calibration, checkpoint)
    plans: list[LayerPlan | None] = [None] * dense.num_layers
    for index in select_layers(layers, dense.num_layers):
        view = LayerView(
            index=index,
            num_neurons=dense.intermediate_size,
            hidden_size=dense.hidden_size,
            top_k=top_k,
            seed=seed,
            ffn=lambda index=index: finite_ffn(checkpoint, index),  # type: ignore[misc]
            stats=no_statistics if statistics is None else lambda index=index: statistics.layer(index),  # type: ignore[misc]
        )
        plans[index] = rescaled(view, init.apply(view, split(view, **bound)), **factor)
    made_with = {**bound, **init.arguments, "router": init.name, "scale": scale}
    origin = Origin(
        method=method,
        arguments=made_with,
        seed=seed,
        source=checkpoint.fingerprint,
        calibration="" if statistics is None else sha256_file(statistics.folder / MANIFEST),
    )
    plan = Plan(
        layers=tuple(plans),
        top_k=top_k,
        num_neurons=dense.intermediate_size,
        hidden_size=dense.hidden_size,
        origin=origin,
        branches=tuple(branch.fingerprint for branch in branches),
        rest=module.averaged(bound) if branches else (0,),
    )
    _check(plan, where=f"method {method}")
    return plan


def _calibration(calibration: str | Path | Calibration, checkpoint: Checkpoint) -> Calibration:
    found = calibration if isinstance(calibration, Calibration) else Calibration.open(calibration)
    if found.source != checkpoint.fingerprint:
        raise InputError(
            f"a calibration of another checkpoint ({found.source[:12]}…)",
            where=str(found.folder),
            needed=f"one of {checkpoint.folder} ({checkpoint.fingerprint[:12]}…)",
            hint="run prismoe calibrate on it",
        )
    return found


def select_layers(layers: str | int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers named by "all", "even", "odd", ranges and numbers ("0,4-27"), or a list; ascending, from 0.

    Raises:
        UsageError: a word we do not know, a layer that is not there, or none at all.
    """
    needed = f'"all", "even", "odd", "4-27", "0,3" or a list of layers below {num_layers}'
    words = {"all": range(num_layers), "even": range(0, num_layers, 2), "odd": range(1, num_layers, 2)}
    found: Iterable[int]
    if isinstance(layers, str):
        try:
            found = words[layers] if layers in words else [x for part in layers.split(",") for x in _range(part)]
        except ValueError:
            raise UsageError(f"{layers!r}"[:80], where="layers", needed=needed) from None
    else:
        found = [layers] if isinstance(layers, int) else layers
    chosen = sorted(set(found))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
        raise UsageError(f"{layers!r}"[:80] + f" of {num_layers} layers", where="layers", needed=needed)
    return tuple(chosen)


def plan_shape(plan: Plan) -> PlanShape:
    """The numbers of a plan (every checked plan has at least one MoE layer and one number of experts)."""
    moe = {index: layer for index, layer in enumerate(plan.layers) if layer is not None}
    return PlanShape(
        num_layers=len(plan.layers),
        moe_layers=tuple(moe),
        num_experts=len(next(iter(moe.values())).experts),
        top_k=plan.top_k,
        expert_width=max(layer.experts.shape[1] for layer in moe.values()),
        shared_width=max(len(layer.shared) for layer in moe.values()),
        scales=tuple(sorted({float(layer.scale) for layer in moe.values()})),
        num_branches=len(plan.branches),
    )


def _range(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    # int() accepts " 4", "٤" and "1_0"; a layer number is plain digits.
    if (
        not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit())))
        or len(part) > 20
    ):
        raise ValueError(part)
    return range(int(first), min(int(last or first), 1_000_000) + 1)


def _pack(plan: Plan) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Header strings and the tensors that need storing."""
    rows: list[dict[str, Any] | None] = []
    tensors: dict[str, npt.NDArray[Any]] = {}
    for index, layer in enumerate(plan.layers):
        if layer is None:
            rows.append(None)
            continue
        row, stored = pack_layer(layer, at=f"layers.{index}", num_neurons=plan.num_neurons)
        rows.append(row)
        tensors |= stored
    body = {
        "top_k": plan.top_k,
        "num_neurons": plan.num_neurons,
        "hidden_size": plan.hidden_size,
        "origin": asdict(plan.origin),
        "layers": rows,
    }
    if plan.branches:
        body |= {"branches": list(plan.branches), "rest": list(plan.rest)}
    header = {"format": FORMAT, "plan": json.dumps(body, allow_nan=False)}
    return header, tensors


def _unpack(path: Path) -> Plan:
    where = str(path)
    infos, header, data = read_sealed(path, keys={"format", "plan"})
    if header.get("format") != FORMAT:
        raise InputError(f"format {header.get('format')!r}", where=where, needed=f"a plan ({FORMAT})")
    used: set[str] = set()

    def stored(name: str, dtype: str) -> npt.NDArray[Any]:
        info = infos.get(name)
        if info is None or info.dtype != dtype:
            raise InputError("missing or of a wrong dtype", where=f"{where}: {name}", needed=dtype)
        used.add(name)
        count = info.nbytes // 4
        return np.frombuffer(data, np.dtype(DTYPES[dtype]), count=count, offset=info.start).reshape(info.shape)

    try:
        body = parse_json(header["plan"].encode(), where=where)
        neurons = _count(body["num_neurons"], MAX_NEURONS)
        layers = [
            None if row is None else unpack_layer(row, stored, at=f"layers.{index}", where=where, num_neurons=neurons)
            for index, row in enumerate(body["layers"])
        ]
        plan = Plan(
            layers=tuple(layers),
            top_k=body["top_k"],
            num_neurons=neurons,
            hidden_size=_count(body["hidden_size"], 2**31 - 1),
            origin=Origin(**body["origin"]),
            branches=tuple(body.get("branches", ())),
            rest=tuple(body.get("rest", (0,))),
        )
    except (KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(
            f"header is damaged ({error!r})"[:120], where=where, needed="a plan written by prismoe"
        ) from error
    if unused := sorted(infos.keys() - used):
        raise InputError(f"unexpected tensor {unused[0]}", where=where)
    _check(plan, where=where)
    return plan


def _count(value: Any, ceiling: int) -> int:
    if type(value) is not int or not 0 < value <= ceiling:
        raise TypeError(f"{value!r} is not a count")
    return value


def _check(plan: Plan, *, where: str) -> None:
    """Everything a plan promises, so that no later stage has to doubt an index."""
    problem = _problem(plan)
    if problem:
        raise InputError(problem, where=where)


def _problem(plan: Plan) -> str:
    counts = {len(layer.experts) for layer in plan.layers if layer is not None and layer.experts.ndim == 2}
    texts = (plan.origin.method, plan.origin.source, plan.origin.calibration)
    if not isinstance(plan.origin.arguments, dict) or not all(isinstance(text, str) for text in texts):
        return f"origin {plan.origin}"[:80]
    known = range(len(plan.branches) + 1)
    if not all(isinstance(text, str) for text in plan.branches):
        return f"branches {plan.branches}"[:80]
    if not plan.rest or not all(type(number) is int and number in known for number in plan.rest):
        return f"rest {list(plan.rest)} of {len(known)} checkpoints"[:80]
    if not counts:
        return "no layer has experts"
    if len(counts) > 1:
        return f"layers with {' and '.join(map(str, sorted(counts)))} experts; one model has one number of experts"
    if type(plan.top_k) is not int or not 1 <= plan.top_k <= min(counts):
        return f"top_k {plan.top_k} of {min(counts)} experts"
    for index, layer in enumerate(plan.layers):
        if layer is None:
            continue
        if problem := layer_problem(layer, num_neurons=plan.num_neurons, hidden_size=plan.hidden_size):
            return f"layer {index}: {problem}"
        if any(number not in known for number in layer.donors):
            return f"layer {index}: donors {list(layer.donors)} of {len(known)} checkpoints"[:80]
        if plan.top_k % layer.group:
            return f"layer {index}: top_k {plan.top_k} cuts a virtual group of {layer.group} experts"
    return ""
