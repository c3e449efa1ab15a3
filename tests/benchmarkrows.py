"""A few rows of every benchmark, in the layout of the hub's data sets and in that of files people have."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

WORDS = ("the", "old tower", "girl", "ball", "king", "park", "red", "big", "sun", "numbers", "sum", "plays", "said")
SUBJECTS = ("anatomy", "virology")
SCORED, SHOTS = 5, 9

Row = dict[str, Any]


def hub_rows(seed: int = 0) -> dict[str, dict[str, list[Row]]]:
    """Data set → split → rows with the hub's field names and types."""
    draw = random.Random(seed)

    def text(low: int = 3, high: int = 8) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    def arc() -> Row:
        number = draw.choice((3, 4, 4, 5))
        labels = draw.choice(("ABCDE", "12345"))[:number]
        choices = {"text": [text(1, 4) for _ in labels], "label": list(labels)}
        return {"id": text(1, 1), "question": text() + "?", "choices": choices, "answerKey": draw.choice(labels)}

    def hellaswag() -> Row:
        tag = draw.choice(("[title] ", "[step] ", ""))
        endings = [f"{draw.choice(('[substeps] ', '[header] ', ''))}{text()}. {tag}{text()}" for _ in range(4)]
        ctx_b = draw.choice(("", text(1, 2)))
        return {
            **{"activity_label": text(1, 2), "ctx_a": f"[header] {text()} [title] {text()}.", "ctx_b": ctx_b},
            **{"endings": endings, "label": str(draw.randrange(4))},
        }

    def winogrande() -> Row:
        sentence = f"{text()} because _ {text()} ."
        return {"sentence": sentence, "option1": text(1, 1), "option2": text(1, 1), "answer": draw.choice("12")}

    def truthfulqa() -> Row:
        labels = [1, *draw.choices((0, 1), k=draw.randint(1, 4)), 0]
        one = {"choices": [f"{text()} {i}" for i in range(4)], "labels": [1, 0, 0, 0]}
        two = {"choices": [f"{text()} {i}" for i in range(len(labels))], "labels": labels}
        return {"question": text() + "?", "mc1_targets": one, "mc2_targets": two}

    sciq_fields = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    make = {
        "arc_challenge": ("test", "train", arc),
        "arc_easy": ("test", "train", arc),
        "boolq": (
            *("validation", "train"),
            lambda: {"question": text(), "passage": text(), "label": draw.randrange(2)},
        ),
        "gsm8k": ("test", "train", lambda: {"question": text() + "?", "answer": f"{text()}\n#### {draw.randrange(9)}"}),
        "hellaswag": ("validation", "train", hellaswag),
        "lambada_openai": ("test", "", lambda: {"text": text(5, 9)}),
        "logiqa": (
            *("test", "train"),
            lambda: {
                **{"label": draw.choice("abcd"), "context": text(), "question": text()},
                "options": [text(1, 3) for _ in range(4)],
            },
        ),
        "nq_open": ("validation", "train", lambda: {"question": text(), "answer": [text(1, 2), text(1, 2)]}),
        "piqa": (
            "validation",
            "train",
            lambda: {
                **dict(zip(("goal", "sol1", "sol2"), (text(), text(), text()), strict=True)),
                "label": draw.randrange(2),
            },
        ),
        "sciq": ("test", "train", lambda: {name: text(1, 5) for name in sciq_fields}),
        "truthfulqa": ("validation", "", truthfulqa),
        "winogrande": ("validation", "train", winogrande),
    }
    rows = {
        name: {split: [row() for _ in range(count)] for split, count in ((scored, SCORED), (shots, SHOTS)) if split}
        for name, (scored, shots, row) in make.items()
    }
    rows["mmlu"] = {
        split: [
            {"question": text() + "?", "subject": subject, "choices": [text(1, 2) for _ in range(4)], "answer": i % 4}
            for subject in SUBJECTS
            for i in range(count)
        ]
        for split, count in (("test", SCORED), ("dev", SHOTS))
    }
    return rows


FILES = {
    **{("piqa", "validation"): "piqa_valid", ("winogrande", "validation"): "winogrande_xl_validation"},
    **{("hellaswag", "validation"): "hellaswag_val", ("nq_open", "validation"): "nq_open_dev"},
    ("truthfulqa", "validation"): "truthfulqa_mc",
}


def cleaned(text: str) -> str:
    """What is usually done to a HellaSwag text, once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def as_people_have_it(name: str, row: Row) -> Row:
    """The other layout of a row, where there is one."""
    if name == "boolq":
        return {"question": row["question"], "passage": row["passage"], "answer": bool(row["label"])}
    if name == "hellaswag":
        label = row["activity_label"]
        context = cleaned(f"{label}: {row['ctx_a']} {row['ctx_b'].capitalize()}").removeprefix(f"{label}: ")
        endings = [cleaned(ending) for ending in row["endings"]]
        return {"activity_label": label, "ctx": context, "endings": endings, "label": int(row["label"])}
    if name == "truthfulqa":
        targets = {key: dict(zip(*row[key].values(), strict=True)) for key in ("mc1_targets", "mc2_targets")}
        return {"question": row["question"], **targets}
    return row


def write_files(folder: Path, *, hub: bool = False) -> Path:
    """One JSONL file a data set and split, `hub` for the hub's own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in hub_rows().items():
        for split, rows in splits.items():
            file = FILES.get((name, split), f"{name}_{split}" + ("_fewshot" if split in ("train", "dev") else ""))
            write_rows(folder / f"{file}.jsonl", [row if hub else as_people_have_it(name, row) for row in rows])
    return folder


def write_rows(path: Path, rows: list[Row]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
