"""The seam to lm-evaluation-harness: its definitions on given rows, and its model class around a stock model.

The only file that imports the harness, which takes seconds: import it inside functions. Tasks are the harness's own in
everything that makes a score (prompt, examples drawn, answer, metric, filter); only the rows are handed in.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task as harness_task
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env as templates
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.evaluate.localfiles import LOCAL, LocalFiles
from prismoe.panics import told
from prismoe.progress import Progress
from prismoe.registry import suggestion
from prismoe.train.model import load_model

__all__ = [
    "VERSION",
    "Benchmark",
    "HarnessModel",
    "definition_files",
    "open_benchmark",
    "open_model",
    "refuse_code",
    "run",
]

VERSION = f"lm_eval {lm_eval.__version__}"

_DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"

_NAMED = re.compile(r"""^["']?task["']?:\s*["']?([\w.:-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)

# What a definition says about where rows come from: not part of what a row becomes, so not of the task's hash.
_NOT_HASHED = (
    *("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"),
    *("training_split", "validation_split", "test_split", "fewshot_split"),
)


@dataclass(frozen=True)
class Benchmark:
    """One task ready to be run, by any number of models: its `parts` (the subjects of MMLU, else itself) by the
    harness's names, the rows each scores (`chosen`, from the first), the metric that is its score and the filter that
    comes before it; whether an answer `has_choices`; the `seed` that draws examples."""

    task: str
    parts: dict[str, Any]
    chosen: dict[str, range]
    metric: str
    filter: str
    has_choices: bool
    num_fewshot: int
    seed: int
    notes: tuple[str, ...]
    task_hash: str
    harness: str = VERSION


def definition_files(task: str) -> list[Path]:
    """The harness's own definition of `task`, one file a subject.

    Raises:
        UsageError: there is none, or it runs code that the model wrote, or is no plain definition.
        ResourceError: this version of the harness has a task we know elsewhere.
    """
    if task in LOCAL:
        if found := sorted(_DEFINITIONS.glob(LOCAL[task].definition)):
            return found
        raise ResourceError(f"{VERSION} has no {LOCAL[task].definition}", needed="lm_eval 0.4.13")
    refuse_code(task)
    known = _named()
    if task not in known:
        raise UsageError(f"unknown task {task!r}", where="tasks", hint=suggestion(task, [*known, "mmlu"]))
    config = load_yaml(known[task], resolve_func=False)
    if "class" in config or config.get("output_type") == "loglikelihood_rolling":
        raise UsageError(f"{task} is no list of questions", where="tasks", hint="leave it out")
    return [known[task]]


def refuse_code(task: str) -> None:
    """Say no to a task of the harness that runs what the model wrote.

    Raises:
        UsageError: it is one.
    """
    if task in _named() and load_yaml(_named()[task], resolve_func=False).get("unsafe_code"):
        raise UsageError(f"{task} runs code that the model wrote", where="tasks", hint="leave it out: never done here")


@cache
def _named() -> dict[str, Path]:
    """The harness's own definitions by the name of their task."""
    return {str(match[1]): path for path in _DEFINITIONS.rglob("*.yaml") if (match := _NAMED.search(path.read_text()))}


@contextmanager
def tamed_harness() -> Iterator[None]:
    """No bars and no log lines: what they would say is counted and noted in results instead. And a template is
    compiled once, not once a document and field, which was a fifth of the whole time."""
    loggers, bars = (
        [logging.getLogger(name) for name in ("lm_eval", "transformers")],
        datasets.are_progress_bars_disabled(),
    )
    levels, tqdm = [logger.level for logger in loggers], harness_task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    harness_task.tqdm = lambda rows, **_: rows
    templates.from_string = lru_cache(maxsize=256)(templates.from_string)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        harness_task.tqdm = tqdm
        del templates.from_string  # the method of the class is found again
        if not bars:
            datasets.enable_progress_bars()


def open_benchmark(task: str, files: LocalFiles | None, *, num_fewshot: int, limit: int | None, seed: int) -> Benchmark:
    """`task` from the harness's definitions, on the rows of `files`, or on those of its own data set on the hub.

    Raises:
        UsageError: see `definition_files`.
        ResourceError: a data set that cannot be fetched.
        InputError: a metric that is no mean over documents, or rows of subjects that there are not.
    """
    definitions = definition_files(task)
    with tamed_harness():
        parts, notes = {}, list(files.notes) if files else []
        for path in definitions:
            config = load_yaml(path, resolve_func=True)
            if files is not None and (config := _on_rows(config, files, by_subject=len(definitions) > 1)) is None:
                notes.append(f"no rows of {path.stem}")
                continue
            for key in ("tag", "group", "task_list", "include"):
                config.pop(key, None)
            config["num_fewshot"] = num_fewshot
            name = config["task"]
            try:
                part = ConfigurableTask(config=config)
            except (OSError, datasets.exceptions.DatasetsError) as error:
                raise ResourceError(
                    f"data set {config.get('dataset_path')} cannot be fetched ({_first_line(error)})",
                    where=task,
                    hint="score local files instead: files=FOLDER",
                ) from error
            parts[name] = part
        first = next(iter(parts.values()))
        return Benchmark(
            task=task,
            parts=parts,
            chosen=_chosen({name: len(part.eval_docs) for name, part in parts.items()}, limit),
            metric=_metric(task, first),
            filter=first._filters[0].name,
            has_choices=first.OUTPUT_TYPE == "multiple_choice",
            num_fewshot=num_fewshot,
            seed=seed,
            notes=tuple(notes),
            task_hash=_digest([_definition(part) for part in parts.values()]),
        )


def _on_rows(config: dict[str, Any], files: LocalFiles, *, by_subject: bool) -> dict[str, Any] | None:
    """The definition with our rows in place of its data set; None where there is no row of its subject."""
    rows = files.rows
    if by_subject:
        rows = {
            split: [row for row in some if row["subject"] == config["dataset_name"]] for split, some in rows.items()
        }
        if not rows[files.scored]:
            return None
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(some) for split, some in rows.items()})
    config = {**config, "custom_dataset": lambda **_: made}
    for role in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(role) not in rows:
            config[role] = None
    return config


def _chosen(documents: Mapping[str, int], limit: int | None) -> dict[str, range]:
    """How many of the first documents of each part are scored: `limit` in all, spread evenly, one after the other."""
    taken = dict.fromkeys(documents, 0)
    left = sum(documents.values()) if limit is None else min(limit, sum(documents.values()))
    while left:
        for name in (name for name, count in documents.items() if taken[name] < count):
            if left:
                taken[name] += 1
                left -= 1
    return {name: range(count) for name, count in taken.items() if count}


def _metric(task: str, part: Any) -> str:
    names = list(part._metric_fn_list)
    metric = next((name for name in ("acc_norm", "acc") if name in names), names[0])
    if getattr(part._aggregation_list[metric], "__name__", "") != "mean":
        raise InputError(f"its metric {metric} is no mean over documents", where=task)
    return str(metric)


def _definition(part: Any) -> dict[str, Any]:
    config = part.dump_config()
    config["fewshot_config"] = {**config["fewshot_config"], "split": None}
    version = (config.get("metadata") or {}).get("version")
    return {"version": version, **{key: value for key, value in config.items() if key not in _NOT_HASHED}}


def _digest(found: object) -> str:
    text = json.dumps(found, sort_keys=True, default=lambda value: inspect.getsource(value))
    return hashlib.sha256(text.encode()).hexdigest()


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Stops a generation whose logits are not finite."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        _check_finite(scores, self._where)
        return scores


class HarnessModel(HFLM):  # type: ignore[misc]
    """The harness's own model class, which also counts what it cuts off, refuses numbers that are not finite, and
    encodes a context once for all its answers."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, name: str, on_progress: Progress) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._name, self._on_progress = name, on_progress
        self._encoded: OrderedDict[str, list[int]] = OrderedDict()
        self.begin("")

    def begin(self, task: str) -> None:
        """Count anew, for `task`."""
        self.task, self.where = task, f"{self._name} on {task}"
        self.requests = self.truncated = self._done = 0
        self.notes: tuple[str, ...] = ()

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if args or kwargs:
            return super().tok_encode(string, *args, **kwargs)  # type: ignore[no-any-return]
        if string not in self._encoded:
            self._encoded[string] = super().tok_encode(string)
            if len(self._encoded) > _REMEMBERED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(string)
        return self._encoded[string]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.requests += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                needed = f"1 to {self.max_length}, the model's positions"
                raise InputError(f"an answer of {len(continuation)} tokens", where=self.where, needed=needed)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        if not np.isfinite([score for score, _ in answers]).all():
            raise NumericalError("a log-likelihood is not finite", where=self.where, hint=_DIVERGED)
        if self._done < self.requests:  # answers of one token to one context are read off one row
            self._report(self.requests - self._done)
        return answers

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, **kwargs)
        self._report(len(inps))
        return logits

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.requests += len(requests)
        for request in requests:
            context, settings = request.arguments
            # The harness makes no room: it stops at a model with fewer positions than the answer may have tokens.
            if settings.get("max_gen_toks", self.max_gen_toks) >= self.max_length:
                longest = self.max_length // 2
                request.arguments = (context, {**settings, "max_gen_toks": longest})
                self.notes = (f"answers of at most {longest} tokens, half of the model's positions",)
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings: Any, left_truncate_len: int | None = None, **kwargs: Any) -> Any:
        ids, mask = super().tok_batch_encode(strings, left_truncate_len=None, **kwargs)
        if left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, **kwargs: Any) -> Any:
        watched = LogitsProcessorList([_Finite(self.where)])
        written = super()._model_generate(context=context, logits_processor=watched, **kwargs)
        self._report(len(context))
        return written

    def _report(self, count: int) -> None:
        self._done += count
        self._on_progress(f"benchmarks: {self.task}", self._done, self.requests)


_REMEMBERED = 8
_DIVERGED = "a weight is not, or training has diverged"


def _check_finite(logits: torch.Tensor, where: str) -> None:
    if not torch.isfinite(logits).all():
        raise NumericalError("logits are not finite", where=where, hint=_DIVERGED)


def open_model(folder: Path, *, batch_size: int, on_progress: Progress) -> HarnessModel:
    """The stock model of `folder` in float32, on the GPU if there is one, in the harness's class.

    Raises:
        InputError: a folder that stock transformers cannot load, or whose tokenizer is not its own.
        NumericalError: logits that are not finite.
    """
    with told(folder):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    model = load_model(folder)
    vocab_size = model.config.vocab_size
    if len(tokenizer) > vocab_size or 2 * len(tokenizer) < vocab_size:
        raise InputError(
            f"a tokenizer of {len(tokenizer):,} tokens does not fit a model of {vocab_size:,}",
            where=str(folder),
            hint="put the tokenizer that the model was trained with beside it",
        )
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer names no end token", where=str(folder), needed="eos_token")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.no_grad():
        _check_finite(model(torch.arange(min(vocab_size, 16), device=model.device)[None]).logits, str(folder))
    with tamed_harness():
        return HarnessModel(model, tokenizer, batch_size=batch_size, name=folder.name, on_progress=on_progress)


def run(model: HarnessModel, benchmark: Benchmark) -> list[dict[str, Any]]:
    """What the harness logs of every document of `benchmark`, in order.

    Raises:
        InputError: an answer that has no place in the model.
        NumericalError: a number that is not finite.
        ResourceError: not enough memory on the device.
    """
    parts = {name: benchmark.parts[name] for name in benchmark.chosen}
    for part in parts.values():
        part.set_fewshot_seed(benchmark.seed)  # every model is shown the same examples
    model.begin(benchmark.task)
    try:
        with tamed_harness():
            found = evaluate(
                lm=model, task_dict={"tasks": parts, "groups": {}}, samples=benchmark.chosen, bootstrap_iters=0
            )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory on {model.device}", where=model.where, hint="a smaller batch_size"
        ) from error
    finally:
        for part in parts.values():
            part._instances = None  # prompts of 32 examples take far more memory than rows
    return [one for name in parts for one in found["samples"][name] if one["filter"] == benchmark.filter]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
