"""What tuning tests tune: a few made-up conversations on a tiny mixture whose tokenizer knows an end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prismoe.tune import TuneConfig
from tests.tiny import TEXT


def conversations(path: Path, *, count: int = 40) -> Path:
    """ShareGPT rows of two turns each, all different."""
    rows = []
    for number in range(count):
        first, second, third = TEXT[number % 3], TEXT[(number + 1) % 3], TEXT[(number // 3) % 3]
        question = f"{number} {first[: 10 + number % 20]}"
        turns = [question, second[: 8 + number % 30], third[:12], first[: 5 + number % 11]]
        said = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
        rows.append(json.dumps({"conversations": said}) + "\n")
    path.write_text("".join(rows))
    return path


def tiny_config(data: Path, **changes: Any) -> TuneConfig:
    """Some ten steps on the CPU, of one thread."""
    settings: dict[str, Any] = {
        **{"data": str(data), "template": "vicuna_v1_1", "seq_len": 128, "batch_size": 8, "micro_batch_size": 4},
        **{"epochs": 2, "lr": 1e-3, "heldout": 0.1, "threads": 1, "device": "cpu"},
    }
    return TuneConfig(**{**settings, **changes})
