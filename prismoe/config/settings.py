"""The sections of a config file as frozen dataclasses; what is not here is no key. `load_config` reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from prismoe.data.filters import FilterSpec
from prismoe.errors import UsageError
from prismoe.plan.rescale import Scale

if TYPE_CHECKING:
    from prismoe.calibrate.settings import CalibrateConfig
    from prismoe.recover.settings import RecoverConfig
    from prismoe.train.settings import PretrainConfig
    from prismoe.tune.settings import TuneConfig

__all__ = [
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DomainConfig",
    "EvalConfig",
    "PlanConfig",
    "TraceConfig",
    "VerifyConfig",
]

Paths = str | list[str]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class PlanConfig:
    """Which neurons become which expert; see `make_plan`. `arguments` are the method's and the router's own.

    `prompts` (for each expert a list of texts) are run through the dense model first, for router=prompts.
    """

    method: str = "random"
    top_k: Positive = 2
    layers: str | int | list[int] = "all"
    scale: Scale = "auto"
    router: str = "auto"
    calibration: str | None = None  # default: the run's own, where it has a calibrate section
    prompts: list[list[str]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvertConfig:
    """How the plan is written: the architecture, zero neurons up to a multiple of `pad_to`, bytes per shard.

    `pad_to` 32 is what stock kernels and Q8_0 need, 256 what K-quants of llama.cpp do, 128 x the tensor-parallel ranks
    what block-wise FP8 of vLLM and SGLang does: zero neurons change nothing.
    `absorb` appends the shared neurons to every expert, for targets that have no shared one. `engines` ("vllm,gguf",
    also `--for`) has a target chosen that is right in all of them, or `target` refused where it was set and is not.
    """

    target: str = "mixtral"
    pad_to: Positive = 32
    max_shard_bytes: Positive = 5_000_000_000
    absorb: bool = False
    engines: str | None = None


@dataclass(frozen=True)
class VerifyConfig:
    """How many tokens of text go through the layers."""

    tokens: Positive = 128


@dataclass(frozen=True)
class DomainConfig:
    """Text of one domain: files or globs, also hf://datasets/OWNER/NAME/…; without `heldout` a share of the documents
    is held out by hash. `select` keeps documents by the value of a field ("meta.redpajama_set_name").
    """

    train: Paths
    heldout: Paths | None = None
    field: str = "auto"
    select: dict[str, str | list[str]] | None = None


@dataclass(frozen=True)
class DataConfig:
    """The domains, the tokenizer (default: the source's) and the weights to mix them with (a preset or numbers).

    `max_bad` is the share of documents that may be unreadable; `files_per_shard` is for corpora of very many files.
    `filters`, `deduplicate` and `decontaminate` (benchmark files; by default those that `eval` scores from eval.files,
    "none" for none at all) are for `sift`, which drops documents before that.
    """

    domains: Annotated[dict[str, DomainConfig], Field(min_length=1)]
    weights: str | dict[str, Annotated[float, Field(ge=0)]] = "proportional"
    tokenizer: str | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    max_bad: Annotated[float, Field(ge=0, lt=1)] = 0.001
    files_per_shard: Positive = 1
    filters: list[FilterSpec] = field(default_factory=list)
    deduplicate: Literal["none", "exact", "near"] = "none"
    decontaminate: Paths | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss: windows of `seq_len` ids (default: the training length), up to `max_tokens` of each domain.

    Benchmarks: a named `suite`, or `tasks` ("boolq", with other shots "boolq:5"), from a folder of `files` (alone: of
    suite llama-moe) or else from the hub; `limit` documents of each. `models` (name and folder) are measured beside the
    run's own. The static `control` is made for benchmarks and where a calibration is, with "static" for text alone too.
    """

    seq_len: Positive | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 100_000
    batch_size: Positive = 16
    suite: str | None = None
    tasks: Paths | None = None
    files: str | None = None
    limit: Positive | None = None
    models: dict[str, str] | None = None
    control: Literal["auto", "static", "none"] = "auto"

    def __post_init__(self) -> None:
        if self.suite is not None and self.tasks is not None:
            raise UsageError("a suite and tasks", where="eval.tasks", needed="one of them")
        if taken := {"dense", "step 0", "recovered", "trained", "static"} & {*(self.models or ())}:
            raise UsageError(f"{min(taken)!r} is the run's own", where="eval.models", needed="another name")

    @property
    def benchmarks(self) -> dict[str, Any]:
        """`suite` and `tasks` as `score_tasks` takes them; empty where none are asked for."""
        if self.suite is None and self.tasks is None and self.files is None:
            return {}
        tasks = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return {"suite": self.suite or (None if tasks else "llama-moe"), "tasks": tasks}


@dataclass(frozen=True)
class TraceConfig:
    """What the routers do with held-out text: windows of `seq_len` ids (default: the training length), `max_tokens` of
    each domain, `sample_tokens` of them kept one by one. `benchmarks` are JSONL files (globs, folders) as further
    domains. `model` and `before` are folders; by default the trained mixture and the one of step 0.
    """

    model: str | None = None
    before: str | None = None
    benchmarks: Paths | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 16_384
    sample_tokens: Annotated[int, Field(ge=128)] = 4096
    batch_size: Positive = 16
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"


@dataclass(frozen=True)
class Config:
    """A whole run. `source` is a dense HF folder or hub name, `out` the run folder."""

    source: str | None = None
    out: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    calibrate: CalibrateConfig | None = None
    plan: PlanConfig = field(default_factory=PlanConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    data: DataConfig | None = None
    recover: RecoverConfig | None = None
    pretrain: PretrainConfig | None = None
    tune: TuneConfig | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    places: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # dotted key: where it was written

    def need(self, key: str) -> Any:
        """The value of an optional top-level key that a verb cannot do without.

        Raises:
            UsageError: it is not set.
        """
        value = getattr(self, key)
        if value is None:
            hint = f"{key}=FOLDER" if key == "source" else "--out FOLDER" if key == "out" else f"a `{key}:` section"
            raise UsageError(f"{key} is not set", where=self.place(""), needed=hint)
        return value

    def place(self, key: str) -> str:
        """Where dotted `key` was written, for messages about its value: file:line, the override, or the key itself."""
        written = self.places.get(key)
        return f"{written}: {key}" if written and key and not written.startswith(key) else written or key

    def words(self) -> list[str]:
        """The arguments of a command that reads this config again: its file or model, overrides and options."""
        origin, given = self.place(""), dict.fromkeys(self.places.values())
        options = dict(where[2:].split(" ", 1) for where in given if where.startswith("--"))
        subject = (
            [origin] if origin.endswith((".yaml", ".yml")) else [options.pop("source")] if "source" in options else []
        )
        overrides = [where for where in given if where.partition("=")[0] in self.places]
        return [*subject, *overrides, *(word for key, value in options.items() for word in (f"--{key}", value))]

    def to_dict(self) -> dict[str, Any]:
        """The keys as a config file holds them: `load_config` of their YAML gives an equal config."""
        found = {key: value for key, value in asdict(self).items() if value is not None and key != "places"}
        for section in ("plan", "pretrain", "tune"):
            found.get(section, {}).update(found.get(section, {}).pop("arguments", {}))
        for spec in found.get("data", {}).get("filters", ()):
            spec.update(spec.pop("arguments"))
        for section in ("calibrate", "recover", "pretrain", "tune"):
            found.get(section, {}).pop("seed", None)  # one seed for the whole run
        for key in ("quantities", "clusters"):
            if f"calibrate.{key}" not in self.places:  # chosen by the plan, and again when it changes
                found.get("calibrate", {}).pop(key, None)
        jsonable: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, as YAML has them
        return jsonable
