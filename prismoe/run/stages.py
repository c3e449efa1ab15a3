"""The stages of a run: each calls one function of prismoe on the run folder, and says what its result depends on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError, UsageError
from prismoe.progress import Progress
from prismoe.run.evaluation import check_evaluation, evaluate_run, is_evaluated, measured
from prismoe.run.recovery import RECOVERED, check_recovery, recover_run
from prismoe.run.texts import SIFTED, is_sifted, prepare_part, sift_texts, sifting, texts
from prismoe.run.tracing import check_trace, trace_run, traced
from prismoe.run.training import check_training, taught_by, train

if TYPE_CHECKING:
    from prismoe.checkpoint import Checkpoint
    from prismoe.config import Config
    from prismoe.plan import Plan, PlanShape

__all__ = ["STAGES", "Stage", "Work", "prepare_part"]

PLAN, STATES, STATISTICS = "plan.safetensors", "prompts.safetensors", "calibration"


class Work:
    """What the stages share: the config, the folder, and the dense checkpoint, opened once."""

    def __init__(self, config: Config, *, dry_run: bool, force: bool, offline: bool, on_progress: Progress) -> None:
        self.config, self.dry_run, self.force, self.offline = config, dry_run, force, offline
        self.on_progress = on_progress
        self.out = Path(config.out) if config.out is not None else None
        self._checkpoint: Checkpoint | None = None
        self._plan: Plan | None = None

    def folder(self, name: str) -> Path:
        out: str = self.config.need("out")
        return Path(out) / name

    @property
    def checkpoint(self) -> Checkpoint:
        from prismoe.checkpoint import Checkpoint

        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(self.config.need("source"), offline=self.offline)
        return self._checkpoint

    @property
    def plan(self) -> Plan:
        """The plan of this run: just made, or read where its stage was finished before."""
        from prismoe.plan import Plan

        if self._plan is None and self.out is not None and not self.dry_run:
            path = self.out / PLAN
            self._plan = Plan.load(path)
            if self._plan.origin.source != self.checkpoint.fingerprint:
                raise InputError("a plan of another checkpoint", where=str(path), hint="prismoe plan --force")
        return self._plan or self.make_plan()

    def make_plan(self) -> Plan:
        """The plan that the config describes."""
        from prismoe.plan import make_plan

        plan = self.config.plan
        own = self.folder(STATISTICS) if self.config.calibrate is not None else None
        with self.placed("plan"), self._prompts() as prompts:
            self._plan = make_plan(
                self.checkpoint,
                method=plan.method,
                layers=plan.layers,
                top_k=plan.top_k,
                seed=self.config.seed,
                scale=plan.scale,
                router=plan.router,
                calibration=own if plan.calibration is None else plan.calibration,
                **{**plan.arguments, **prompts},
            )
        return self._plan

    @contextmanager
    def _prompts(self) -> Iterator[dict[str, str]]:
        """The argument of router=prompts where the config has the prompts themselves."""
        prompts, router = self.config.plan.prompts, self.config.plan.router
        if prompts is None:
            if router == "prompts" and "prompt_states" not in self.config.plan.arguments:
                raise UsageError("prompts is not set", where="prompts", needed="a list of texts for each expert")
            yield {}
            return
        if router != "prompts":
            raise UsageError(f"{router} with prompts", where="router", needed="router=prompts")
        experts = self.config.plan.arguments.get("num_experts")
        copies = experts and experts // self.config.plan.arguments.get("granularity", 1)
        if copies is not None and len(prompts) != copies:
            raise UsageError(f"prompts for {len(prompts)} experts", where="prompts", needed=f"for {copies}")
        from prismoe.calibrate.prompts import prompt_states

        with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves nothing behind
            kept = self.out is not None and not self.dry_run
            path = self.folder(STATES) if kept else Path(scratch) / STATES
            yield {
                "prompt_states": str(
                    prompt_states(
                        self.checkpoint, prompts, out=path, offline=self.offline, on_progress=self.on_progress
                    )
                )
            }

    @contextmanager
    def placed(self, section: str) -> Iterator[None]:
        """A complaint about an argument is told where the argument was written."""
        from prismoe.config.keys import known_keys

        try:
            yield
        except UsageError as error:
            key = error.where if error.where.startswith(f"{section}.") else f"{section}.{error.where}"
            if key not in known_keys():
                raise
            where = self.config.place(key)
            raise UsageError(error.found, where=where, needed=error.needed, hint=error.hint) from None

    def target(self, shape: PlanShape) -> str:
        """The architecture to write: the one that was named, or the first that is right in the engines that were."""
        from prismoe.portability import choose_target
        from prismoe.target import absorbed

        convert = self.config.convert
        if convert.engines is None:
            return convert.target
        with self.placed("convert"):
            return choose_target(
                self.checkpoint.family,
                absorbed(shape) if convert.absorb else shape,
                engines=[name.strip() for name in convert.engines.split(",")],
                target=convert.target if "convert.target" in self.config.places else None,
            )

    def check_wanted(self) -> None:
        """That this run's plan will be able to use its calibration: known before a weight is read.

        Raises:
            UsageError: fewer data clusters than the plan needs, a quantity left out, or a method's library is missing.
        """
        from prismoe import registry
        from prismoe.config.keys import wanted_statistics

        plan, chosen = self.config.plan, self.config.need("calibrate")
        if plan.calibration is not None:
            return
        method = registry.load("prismoe.methods", plan.method, where="plan.method")
        if hasattr(method, "ready"):
            method.ready()
        asked = wanted_statistics(plan)
        by_domain = chosen.clusters == "domains"
        clusters = len(self.config.need("data").domains) if by_domain else chosen.clusters
        if clusters < (needed := asked.get("clusters", 0)):
            found = f"{clusters} data clusters for {needed} experts"
            raise UsageError(found, where="clusters", needed="at least one data cluster for each expert")
        if missing := sorted({*asked.get("quantities", ())} - {*chosen.quantities}):
            raise UsageError(
                f"without {missing[0]}", where="quantities", needed=f"what plan.method={plan.method} reads"
            )

    def width_warnings(self, shape: PlanShape, target: str) -> list[str]:
        """What the expert width costs in the engines that were named."""
        from prismoe.portability import width_warnings
        from prismoe.target import absorbed

        convert = self.config.convert
        engines = [name.strip() for name in (convert.engines or "").split(",")]
        stored = absorbed(shape) if convert.absorb else shape
        return list(width_warnings(stored, target, engines=engines, pad_to=convert.pad_to))

    def domains(self) -> list[Path]:
        return [self.folder("data") / name for name in self.config.need("data").domains]


def _plan(work: Work) -> dict[str, Any]:
    from prismoe.account import account
    from prismoe.plan import plan_shape
    from prismoe.plan.branches import alike_branches, branch_facts
    from prismoe.plan.strength import strength_warnings
    from prismoe.portability import portability
    from prismoe.target import absorbed
    from prismoe.targets import holder

    plan, convert = work.make_plan(), work.config.convert
    shape = plan_shape(plan)
    target = work.target(shape)
    counted = account(
        work.checkpoint.family, shape, target=target, pad_to=convert.pad_to, absorb=convert.absorb
    ).to_dict()
    stored = absorbed(shape) if convert.absorb else shape
    # What recovers learns the size of its output.
    warnings = [*alike_branches(plan), *(() if work.config.recover else strength_warnings(plan))]
    if held := target not in counted["objections"]:
        warnings += work.width_warnings(shape, target)
    else:
        other = holder(work.checkpoint.family, stored)
        warnings.append(f"{target} cannot hold this model" + (f": take {other}" if other else ", and no target can"))
    engines = [row.to_dict() for row in portability(work.checkpoint.family, stored, target)] if held else []
    if work.out is not None and not work.dry_run:
        plan.save(work.out / PLAN)
    origin = asdict(plan.origin)
    named = {**origin, **branch_facts(plan), "source_name": str(work.config.source), "shape": asdict(shape)}
    return {**named, "account": counted, "portability": engines, "warnings": warnings}


def _convert(work: Work) -> dict[str, Any]:
    from prismoe.convert import convert
    from prismoe.plan import plan_shape

    shape = plan_shape(work.plan)
    options = asdict(work.config.convert) | {"target": work.target(shape)}
    del options["engines"]
    receipt = convert(
        work.checkpoint,
        work.plan,
        out=work.folder("moe"),
        branches=work.config.plan.arguments.get("branches"),
        force=work.force,
        dry_run=work.dry_run,
        on_progress=work.on_progress,
        **options,
    )
    return {**receipt.to_dict(), "warnings": work.width_warnings(shape, receipt.target)}


def _verify(work: Work) -> dict[str, Any]:
    from prismoe.verify import verify

    return verify(
        work.folder("moe"),
        source=work.checkpoint,
        branches=work.config.plan.arguments.get("branches"),
        tokens=work.config.verify.tokens,
        offline=work.offline,
        on_progress=work.on_progress,
    ).to_dict()


def _prepare(work: Work) -> dict[str, Any]:
    return prepare_part(work, None)


def _calibrate(work: Work) -> dict[str, Any]:
    from prismoe.calibrate import calibrate

    with work.placed("calibrate"):
        work.check_wanted()
        return calibrate(
            work.checkpoint,
            work.config.need("calibrate"),
            domains=work.domains(),
            out=work.folder(STATISTICS),
            offline=work.offline,
            force=work.force,
            dry_run=work.dry_run,
            on_progress=work.on_progress,
        ).to_dict()


def _report(work: Work) -> dict[str, Any]:
    from prismoe.report import write_report

    path = write_report(work.folder("."))
    return {"report": str(path), "bytes": path.stat().st_size}


@dataclass(frozen=True)
class Stage:
    """`decides` gives what its result depends on beside those stages in `after` that the config has the sections for;
    `output` must be there when finished. `needs` are top-level keys; the first one asks for the stage, if `asked` does
    (else `nothing` says what was found and needed). `check` is done before the first stage of a run begins.
    """

    work: Callable[[Work], dict[str, Any]]
    output: str
    after: tuple[str, ...]
    decides: Callable[[Config], Mapping[str, Any]]
    needs: tuple[str, ...] = ("source",)
    dry: bool = False
    asked: Callable[[Config], bool] = lambda config: True
    nothing: tuple[str, str] = ("", "")
    check: Callable[[Work], object] = lambda work: None


STAGES: dict[str, Stage] = {
    "sift": Stage(
        sift_texts,
        f"{SIFTED}/manifest.json",
        (),
        lambda c: {"sift": sifting(c), "data": texts(c)},
        needs=("data",),
        dry=True,
        asked=is_sifted,
        nothing=("nothing to sift by", "data.filters, data.deduplicate or data.decontaminate"),
    ),
    "prepare": Stage(_prepare, "data", ("sift",), lambda c: {"data": texts(c)}, needs=("data",), dry=True),
    "calibrate": Stage(
        _calibrate,
        f"{STATISTICS}/manifest.json",
        ("prepare",),
        lambda c: {"seed": c.seed, "calibrate": _keys(c.need("calibrate"))},
        needs=("calibrate", "data"),
        dry=True,
    ),
    "plan": Stage(
        _plan,
        PLAN,
        ("calibrate",),
        lambda c: {"seed": c.seed, "plan": _keys(c.plan), **_calibration(c), **_branch_states(c)},
        dry=True,
    ),
    "convert": Stage(_convert, "moe/manifest.json", ("plan",), lambda c: {"convert": asdict(c.convert)}, dry=True),
    "verify": Stage(_verify, "moe/certificate.json", ("convert",), lambda c: {"verify": asdict(c.verify)}),
    "recover": Stage(
        recover_run,
        f"{RECOVERED}/manifest.json",
        ("convert", "prepare"),
        lambda c: {"seed": c.seed, "weights": c.need("data").weights, "recover": _keys(c.need("recover"))},
        needs=("recover", "data"),
        check=check_recovery,
        dry=True,
    ),
    "pretrain": Stage(
        train,
        "train/manifest.json",
        ("convert", "prepare", "recover"),
        lambda c: {
            "seed": c.seed,
            "weights": c.need("data").weights,
            "pretrain": {**_keys(c.need("pretrain")), **_reference(c), **taught_by(c)},
        },
        needs=("pretrain", "data"),
        check=check_training,
    ),
    "eval": Stage(
        evaluate_run,
        "scores.json",
        ("prepare",),
        measured,
        dry=True,
        asked=is_evaluated,
        nothing=("nothing to evaluate on", "a `data:` section, eval.suite or eval.tasks"),
        check=check_evaluation,
    ),
    "trace": Stage(
        trace_run,
        "trace/manifest.json",
        ("prepare",),
        traced,
        needs=("data",),
        check=check_trace,
    ),
    "report": Stage(_report, "report.html", (), lambda c: {}),
}
"""Every stage, after those that it builds on."""


def _keys(section: Any) -> dict[str, Any]:
    """A section's keys as the config file has them."""
    found = asdict(section)
    found |= found.pop("arguments", {})
    from prismoe.train.settings import LATER, MAY_CHANGE, PretrainConfig

    unset = [key for key in LATER if found.get(key) == getattr(PretrainConfig, key)]
    unimportant = ("save_every", "save_seconds", "keep", *MAY_CHANGE, *unset)  # they change no result
    return {key: value for key, value in found.items() if key not in unimportant}


def _calibration(config: Config) -> dict[str, str]:
    """What tells one calibration from another in the same folder."""
    from prismoe.folder import MANIFEST, sha256_file

    folder = config.plan.calibration
    path = Path(folder) / MANIFEST if folder is not None else None
    return {"calibration": sha256_file(path)} if path is not None and path.is_file() else {}


def _reference(config: Config) -> dict[str, dict[str, str]]:
    """The reference losses by what their file holds, not by where it lies; numbers in a config are what they are."""
    from prismoe.folder import sha256_file

    given, static = config.need("pretrain").reference, config.need("pretrain").mixing == "static"
    if static or not isinstance(given, str) or not Path(given).is_file():
        return {}
    return {"reference": {"sha256": sha256_file(Path(given))}}


def _branch_states(config: Config) -> dict[str, list[str]]:
    """What tells the branches from others in the same folders."""
    from prismoe.checkpoint import Checkpoint

    found = [Checkpoint.open(branch).fingerprint for branch in config.plan.arguments.get("branches", ())]
    return {"branches": found} if found else {}
