"""Verbs that stand beside a run have a few options of their own, given as key=value after the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import Field

from prismoe.config.bind import Binder
from prismoe.config.keys import type_text
from prismoe.config.located import Located, read_override
from prismoe.errors import UsageError

__all__ = [
    "ChatOptions",
    "DensifyOptions",
    "GenerateOptions",
    "ImportOptions",
    "MtBenchOptions",
    "PruneOptions",
    "ReferenceOptions",
    "ShowOptions",
    "TrainFilterOptions",
    "option_lines",
    "read_options",
]

Positive = Annotated[int, Field(ge=1)]
Device = Literal["auto", "cpu", "cuda"]
Options = TypeVar("Options")


@dataclass(frozen=True)
class ChatOptions:
    """See `prismoe.chat.dialogue`; `system` is taken as it is typed."""

    template: str = "model"
    system: str = ""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    seed: Annotated[int, Field(ge=0)] = 0
    experts: bool = False
    device: Device = "auto"


@dataclass(frozen=True)
class DensifyOptions:
    """See `densify`."""

    plan: str | None = None
    scale: Annotated[float, Field(gt=0)] | None = None
    max_shard_bytes: Positive = 5_000_000_000


@dataclass(frozen=True)
class GenerateOptions:
    """See `prismoe.generate.answers`; `prompt` is taken as it is typed, in place of a file."""

    prompt: str | None = None
    template: str | None = None
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 8
    device: Device = "auto"


@dataclass(frozen=True)
class ImportOptions:
    """See `import_checkpoint`."""

    domains: str | list[str] = ""
    seq_len: Annotated[int, Field(ge=2)] = 512
    fit_tokens: Positive = 16_384
    heldout_tokens: Positive = 8_192
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    pad_to: Positive = 32
    max_shard_bytes: Positive = 5_000_000_000


@dataclass(frozen=True)
class MtBenchOptions:
    """See `prismoe.mtbench`: `questions` to `device` for answers, the others for judging them."""

    questions: str | None = None
    template: str = "model"
    max_new_tokens: Positive = 1024
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 8
    model_id: str | None = None
    device: Device = "auto"
    prompts: str | None = None
    references: str | None = None
    judge: str | None = None
    judge_model: str = "gpt-4"
    key_env: str | None = None
    parallel: Positive = 4
    results: str | None = None


@dataclass(frozen=True)
class PruneOptions:
    """See `prune_experts`; of a run folder, trace and domains are its own where they are not given."""

    keep: int | list[int] | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None
    criterion: Literal["load", "importance"] = "load"
    trace: str | None = None
    domains: str | list[str] = ""
    seq_len: Annotated[int, Field(ge=2)] = 512
    max_tokens: Annotated[int, Field(ge=2)] = 65_536
    batch_size: Positive = 16
    threads: Annotated[int, Field(ge=0)] = 0
    tokens: Positive = 128
    max_shard_bytes: Positive = 5_000_000_000


@dataclass(frozen=True)
class ReferenceOptions:
    """See `reference_loss`."""

    seq_len: Annotated[int, Field(ge=2)] = 512
    max_tokens: Annotated[int, Field(ge=2)] = 65_536
    batch_size: Positive = 16
    threads: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class ShowOptions:
    """See `prismoe.showplan`, and `prismoe.showmixture` for prepared domains."""

    calibration: str | None = None
    weights: str | dict[str, Annotated[float, Field(ge=0)]] = "proportional"
    steps: Positive = 1000
    seq_len: Annotated[int, Field(ge=2)] = 512
    batch_size: Positive = 16
    max_epochs: Annotated[float, Field(gt=0)] = 4.0


@dataclass(frozen=True)
class TrainFilterOptions:
    """See `train_filter`: files of texts, one a line in .txt, one an object or row otherwise."""

    keep: str
    drop: str


def read_options(cls: type[Options], overrides: Sequence[str]) -> Options:
    """An instance of the dataclass `cls` from "key=value" texts.

    Raises:
        UsageError: every problem at once, one line each.
    """
    values: dict[str, Located] = {}
    for text in overrides:
        keys, value = read_override(text)
        values[".".join(keys)] = value
    binder = Binder([item.name for item in fields(cls)])  # type: ignore[arg-type]
    found: Options | None = binder.record(cls, Located(values, "command line"), "")
    if binder.problems or found is None:
        raise UsageError("\n".join(binder.problems))
    return found


def option_lines(cls: Any) -> list[str]:
    """One line for each option: name, default, type."""
    hints = get_type_hints(cls, include_extras=True)
    values = {item.name: "(must be set)" if item.default is MISSING else str(item.default) for item in fields(cls)}
    return [f"  {name:<28} {value:<14} {type_text(hints[name])}" for name, value in values.items()]
