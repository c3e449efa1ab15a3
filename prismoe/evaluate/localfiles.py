"""Benchmark files on disk: which file belongs to which task, and how a row gets the fields of the harness's data set.

Files are JSONL, one row a line, either with the field names of the data set on the hub or with those that the sources
of such files use; `LOCAL` is the whole list. Nothing here needs the harness.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from prismoe.errors import InputError, UsageError

__all__ = ["LOCAL", "LocalFiles", "LocalTask", "read_files"]

Row = dict[str, Any]

# HellaSwag's cleaned files come without rows of its train split: so many of the last rows become examples instead.
_RESERVED = 100


@dataclass(frozen=True)
class LocalTask:
    """What is known of a task beyond the harness's own definition.

    `definition` is the harness's file below its folder of tasks ("*" for one file a subject), `dataset` what it names
    on the hub. `scored` and `shots` (examples for the prompt, empty where the task has none) are pairs of split and
    file name: the first file that exists is used, and a result says when its split is not the stock one, the first.
    `fields` are those the definition reads, after `adapt`; `sound` looks at what types cannot say; `documents` is the
    size of the stock split. With `may_reserve` the last scored rows become examples where there is no file of them.
    """

    definition: str
    dataset: str
    scored: tuple[tuple[str, str], ...]
    shots: tuple[tuple[str, str], ...]
    fields: dict[str, type]
    documents: int
    sound: Callable[[Row], bool]
    adapt: Callable[[Row], Row] = dict
    may_reserve: bool = False


@dataclass(frozen=True)
class LocalFiles:
    """Rows of a task by split, in the hub's layout, and what a reader of its score has to know about them."""

    rows: dict[str, list[Row]]
    scored: str
    notes: tuple[str, ...]


def read_files(task: str, files: Path, *, num_fewshot: int) -> LocalFiles:
    """Read and check the files of `task` in the folder `files`.

    Raises:
        InputError: a file is missing, empty or damaged, or holds too few examples.
        UsageError: examples are wanted of a task that has none.
    """
    known, notes = LOCAL[task], []
    scored, path = _first(known.scored, files) or _missing(task, known.scored, files)
    rows = {scored: list(_read(path, task))}
    if scored != (stock := known.scored[0][0]):
        notes.append(f"scored on the {scored} split, not on {stock}")
    if num_fewshot:
        if not known.shots:
            raise UsageError(f"{num_fewshot} examples asked for", where=task, needed="0: this task has no others")
        split = known.shots[0][0]
        if found := _first(known.shots, files):
            rows[split] = list(_read(found[1], task))
            if found[0] != split:
                notes.append(f"examples from {found[0]} rows that are not scored, not from {split}")
        elif known.may_reserve:
            kept = max(len(rows[scored]) - _RESERVED, 0)
            rows[scored], rows[split] = rows[scored][:kept], rows[scored][kept:]
            notes.append(f"examples from the last {_RESERVED} rows of {path.name}, which are not scored")
        else:
            _missing(task, known.shots, files)
        _check_examples(task, rows[split], num_fewshot, where=str(found[1] if found else path))
    if not rows[scored]:
        raise InputError("no row left to score", where=str(path), needed=f"more than {_RESERVED}")
    if len(rows[scored]) != known.documents:
        notes.append(f"{len(rows[scored]):,} of {known.documents:,} documents")
    return LocalFiles(rows, scored, tuple(notes))


def _first(wanted: tuple[tuple[str, str], ...], files: Path) -> tuple[str, Path] | None:
    return next(((split, files / name) for split, name in wanted if (files / name).is_file()), None)


def _missing(task: str, wanted: tuple[tuple[str, str], ...], files: Path) -> NoReturn:
    split, name = wanted[0]
    dataset = LOCAL[task].dataset
    arguments = ", ".join(repr(part) for part in dataset.split(":"))
    get = f"datasets.load_dataset({arguments}, split='{split}').to_json('{name}')"
    if "*" in LOCAL[task].definition:
        get = get.replace(f"'{dataset}'", f"'{dataset}', 'all'")
    raise InputError(
        f"no {' or '.join(name for _, name in wanted)} for task {task}",
        where=str(files),
        hint=f"where there is a network, python: import datasets; {get}",
    )


def _read(path: Path, task: str) -> Iterator[Row]:
    known, number, empty = LOCAL[task], 0, True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"invalid JSON ({error})", where=f"{path}:{number}") from error
            try:
                row = known.adapt(row)
                row = {name: row[name] for name in known.fields}
                sound = all(isinstance(row[name], kind) for name, kind in known.fields.items()) and known.sound(row)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                sound = False
            if not sound:
                fields = ", ".join(known.fields)
                raise InputError(
                    f"not a row of {task}", where=f"{path}:{number}", needed=f"{fields}, the answer among its choices"
                )
            yield row
    if empty:
        raise InputError(f"no rows in {number} lines", where=str(path))


def _check_examples(task: str, rows: list[Row], num_fewshot: int, *, where: str) -> None:
    groups: dict[str, int] = {}
    for row in rows:
        subject = str(row.get("subject", "")) if "*" in LOCAL[task].definition else ""
        groups[subject] = groups.get(subject, 0) + 1
    # One more than is shown: the harness draws it to be able to leave the question itself out.
    needed = num_fewshot if "*" in LOCAL[task].definition else num_fewshot + 1
    few = min(groups, key=lambda name: groups[name])
    if groups[few] < needed:
        of = f" of {few}" if few else ""
        raise InputError(f"{groups[few]} examples{of}", where=where, needed=f"{needed} for {num_fewshot} shots")


def _hellaswag(row: Row) -> Row:
    """Files of cleaned rows have `ctx` alone. The harness cleans once more, and would strip the space that cleaning
    leaves where an ending began with a tag: an empty tag before it keeps the text what it was."""
    if "ctx_a" in row:
        return {**row, "label": str(row["label"])}
    endings = [f"[]{ending}" if ending[:1].isspace() else ending for ending in row["endings"]]
    return {**row, "ctx_a": row["ctx"], "ctx_b": "", "endings": endings, "label": str(row["label"])}


def _boolq(row: Row) -> Row:
    return row if "label" in row else {**row, "label": int(row["answer"])}


def _truthfulqa(row: Row) -> Row:
    adapted = dict(row)
    for name in ("mc1_targets", "mc2_targets"):
        targets = row[name]
        if not isinstance(targets.get("choices"), list):
            adapted[name] = {"choices": list(targets), "labels": list(targets.values())}
    return adapted


def _arc(row: Row) -> bool:
    choices = row["choices"]
    return row["answerKey"] in choices["label"] and len(choices["label"]) == len(choices["text"])


def _has_truth(targets: Row) -> bool:
    return 1 in targets["labels"] and len(targets["labels"]) == len(targets["choices"])


_ARC_FIELDS: dict[str, type] = {"id": str, "question": str, "choices": dict, "answerKey": str}
_TRUTHFULQA: dict[str, type] = {"question": str, "mc1_targets": dict, "mc2_targets": dict}

LOCAL: dict[str, LocalTask] = {
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml",
        "allenai/ai2_arc:ARC-Challenge",
        (("test", "arc_challenge_test.jsonl"), ("validation", "arc_challenge_validation.jsonl")),
        (("train", "arc_challenge_train_fewshot.jsonl"),),
        _ARC_FIELDS,
        1172,
        _arc,
    ),
    "arc_easy": LocalTask(
        "arc/arc_easy.yaml",
        "allenai/ai2_arc:ARC-Easy",
        (("test", "arc_easy_test.jsonl"), ("validation", "arc_easy_validation.jsonl")),
        (("train", "arc_easy_train_fewshot.jsonl"),),
        _ARC_FIELDS,
        2376,
        _arc,
    ),
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml",
        "aps/super_glue:boolq",
        (("validation", "boolq_validation.jsonl"),),
        (("train", "boolq_train_fewshot.jsonl"),),
        {"question": str, "passage": str, "label": int},
        3270,
        lambda row: row["label"] in (0, 1),
        _boolq,
    ),
    "gsm8k": LocalTask(
        "gsm8k/gsm8k.yaml",
        "openai/gsm8k:main",
        (("test", "gsm8k_test.jsonl"),),
        (("train", "gsm8k_train_fewshot.jsonl"),),
        {"question": str, "answer": str},
        1319,
        lambda row: "#### " in row["answer"],
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        "Rowan/hellaswag",
        (("validation", "hellaswag_val.jsonl"),),
        (("train", "hellaswag_train_fewshot.jsonl"),),
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        10042,
        lambda row: 0 <= int(row["label"]) < len(row["endings"]),
        _hellaswag,
        may_reserve=True,
    ),
    "lambada_openai": LocalTask(
        "lambada/lambada_openai.yaml",
        "EleutherAI/lambada_openai:default",
        (("test", "lambada_openai_test.jsonl"),),
        (),
        {"text": str},
        5153,
        lambda row: " " in row["text"],
    ),
    "logiqa": LocalTask(
        "logiqa/logiqa.yaml",
        "EleutherAI/logiqa:logiqa",
        (("test", "logiqa_test.jsonl"), ("validation", "logiqa_validation.jsonl")),
        (("train", "logiqa_train_fewshot.jsonl"),),
        {"label": str, "context": str, "question": str, "options": list},
        651,
        lambda row: "abcd".index(row["label"].strip()) < len(row["options"]),
    ),
    "mmlu": LocalTask(
        "mmlu/default/mmlu_*.yaml",
        "cais/mmlu",
        (("test", "mmlu_test.jsonl"),),
        (("dev", "mmlu_dev_fewshot.jsonl"),),
        {"question": str, "subject": str, "choices": list, "answer": int},
        14042,
        lambda row: len(row["choices"]) == 4 and 0 <= row["answer"] < 4,
    ),
    "nq_open": LocalTask(
        "nq_open/nq_open.yaml",
        "google-research-datasets/nq_open",
        (("validation", "nq_open_dev.jsonl"),),
        (("train", "nq_open_train_fewshot.jsonl"), ("validation", "nq_open_dev_fewshot.jsonl")),
        {"question": str, "answer": list},
        3610,
        lambda row: len(row["answer"]) > 0 and all(isinstance(answer, str) for answer in row["answer"]),
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml",
        "baber/piqa",
        (("validation", "piqa_valid.jsonl"),),
        (("train", "piqa_train_fewshot.jsonl"),),
        {"goal": str, "sol1": str, "sol2": str, "label": int},
        1838,
        lambda row: row["label"] in (0, 1),
    ),
    "sciq": LocalTask(
        "sciq/sciq.yaml",
        "allenai/sciq",
        (("test", "sciq_test.jsonl"), ("validation", "sciq_validation.jsonl")),
        (("train", "sciq_train_fewshot.jsonl"),),
        dict.fromkeys(("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"), str),
        1000,
        lambda row: True,
    ),
    "truthfulqa_mc1": LocalTask(
        "truthfulqa/truthfulqa_mc1.yaml",
        "truthfulqa/truthful_qa:multiple_choice",
        (("validation", "truthfulqa_mc.jsonl"),),
        (),
        _TRUTHFULQA,
        817,
        lambda row: _has_truth(row["mc1_targets"]) and row["mc1_targets"]["labels"][0] == 1,
        _truthfulqa,
    ),
    "truthfulqa_mc2": LocalTask(
        "truthfulqa/truthfulqa_mc2.yaml",
        "truthfulqa/truthful_qa:multiple_choice",
        (("validation", "truthfulqa_mc.jsonl"),),
        (),
        _TRUTHFULQA,
        817,
        lambda row: _has_truth(row["mc2_targets"]),
        _truthfulqa,
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        "allenai/winogrande:winogrande_xl",
        (("validation", "winogrande_xl_validation.jsonl"),),
        (("train", "winogrande_train_fewshot.jsonl"),),
        {"sentence": str, "option1": str, "option2": str, "answer": str},
        1267,
        lambda row: "_" in row["sentence"] and row["answer"] in ("1", "2"),
    ),
}
