"""Writes docs/targets.md and its short form in README.md from the golden cases and from the tables of the product.

A test asserts that both are current.

`python -m tests.matrix` writes them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prismoe.checkpoint.families import REFUSED
from prismoe.checkpoint.family import DenseConfig, dense_config
from prismoe.plan import PlanShape
from prismoe.portability import ENGINES, portability
from prismoe.targets import PREFERRED, find_target
from tests import golden

PAGE = Path(__file__).parents[1] / "docs" / "targets.md"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python -m tests.matrix -->\n", "<!-- end -->\n"
KINDS = {"partition": "partition", "shared": "shared", "upcycle": "copies", "absorbed": "absorbed"}

HEAD = """\
# What holds what

Written by `python -m tests.matrix` from the cases of `tests/golden.py`; a test fails when it is not current.

Each ✓ is a conversion that a test loads with the stock class of transformers 5.23, and of 4.57 unless it says "5 only":
no key missing or left over, logits within 2e-5 of an independent formula where they reach about 7 (float32), and 20
greedy tokens equal. "shared" is a partition with an always-on expert, "copies" is upcycling (equal to the dense model),
"absorbed" has the shared neurons in every expert (`convert.absorb`). Where there is no ✓ the note says what a target
needs; "not tested" is a pair that would be written and that no test covers.
"""

WIDTHS = """\
## Widths

An expert is stored as wide as the next multiple of `convert.pad_to`; the neurons added are zero, so the model computes
the same (a test converts one plan at 32 and at 256).

| `convert.pad_to` | for |
|---|---|
| 32, the default | stock transformers on a CPU (8 in 16 bit), llama.cpp's Q8_0 |
| 256 | llama.cpp's K-quants (Q4_K_M, …): other widths fall back to blocks of 32; `--for gguf` warns |
| 128 × tensor-parallel ranks | block-wise FP8 in vLLM and SGLang, whose blocks of 128 are split over the ranks |
"""


def model(source: str) -> DenseConfig:
    """What a source's config.json says, read without making its weights."""
    from transformers import AutoConfig

    from tests.tiny import tiny_settings

    found = golden.SOURCES[source]
    config = AutoConfig.for_model(found.family, **{**tiny_settings(found.family), **found.overrides}).to_dict()
    return replace(dense_config(config), dtype="float32")


def _shape(layers: int, shared: int = 0) -> PlanShape:
    return PlanShape(layers, tuple(range(layers)), 8, 2, 8, shared, (4.0,))


def _kind(name: str) -> str:
    words = [word for key, word in KINDS.items() if key in name]
    return words[-1] if words else "partition"


def page() -> str:
    """The whole of docs/targets.md."""
    return "\n".join([HEAD, *_sources(), "", *_engines(), "", WIDTHS, *_refused(), ""])


def readme() -> str:
    """README.md with its table made anew: ✓ for a pair that a golden test holds, else the field that forbids it."""
    families = {"LLaMA 2, 3.0": "llama2", "LLaMA 3.1+, tied": "llama3.1 tied", "Mistral": "mistral"}
    families |= {"Mistral, window": "mistral window", "Qwen2, 2.5": "qwen2 tied", "Qwen3": "qwen3", "Phi-3": "phi3"}
    families |= {"OLMo 2": "olmo2", "Granite": "granite", "Ernie 4.5": "ernie4_5", "Cohere2": "cohere2"}
    families |= {"HunYuan": "hunyuan"}
    tested = {(source, target) for source, target, _ in golden.CASES.values()}
    lines = ["| | " + " | ".join(PREFERRED) + " |", "|---|" + "---|" * len(PREFERRED)]
    for shown, source in families.items():
        dense = model(source)
        cells = []
        for target in PREFERRED:
            objections = find_target(target).objections(dense, _shape(dense.num_layers))
            blank = objections[0].field if objections else ""
            cells.append("✓" if (source, target) in tested else blank)
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def _sources() -> list[str]:
    """A row for each source, a column for each target; what forbids a pair is numbered below."""
    tested: dict[tuple[str, str], dict[str, None]] = {}
    for case, (source, target, _) in golden.CASES.items():
        tested.setdefault((source, target), {})[_kind(case.partition(", ")[2])] = None
    only = {name: f"{name} (5 only)" if name in golden.ONLY_5 else name for name in PREFERRED}
    lines = ["## Sources and targets", "", "| source | " + " | ".join(only.values()) + " |"]
    lines.append("|---|" + "---|" * len(only))
    notes = _Notes()
    for source in golden.SOURCES:
        dense = model(source)
        cells = []
        for target in PREFERRED:
            objections = find_target(target).objections(dense, _shape(dense.num_layers))
            found = tested.get((source, target))
            forbidden = ", ".join(notes.mark(f"{row.field}: {row.needed}") for row in objections)
            cells.append("✓ " + ", ".join(found) if found else forbidden or "not tested")
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    return [*lines, "", *notes.lines]


class _Notes(dict[str, int]):
    """Texts that repeat, numbered in the order of their first use."""

    def mark(self, text: str) -> str:
        return f"[{self.setdefault(text, len(self) + 1)}]"

    @property
    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self.items()]


def _engines() -> list[str]:
    """What each engine makes of each target, for the sources that differ in what they need."""
    names = {"llama2": "Llama 2, 3.0", "llama3.1 tied": "Llama 3.1+", "mistral window": "Mistral with a window"}
    names |= {"qwen2 tied": "Qwen2", "qwen3": "Qwen3", "olmo2": "OLMo2", "granite": "Granite", "ernie4_5": "Ernie 4.5"}
    names |= {"cohere2": "Cohere2", "hunyuan": "HunYuan"}
    lines = ["## Engines", "", "With a shared expert where the target has one, 8 experts, top-2, every layer.", ""]
    lines += ["| source | target | " + " | ".join(ENGINES) + " |", "|---|---|" + "---|" * len(ENGINES)]
    notes = _Notes()
    for source, shown in names.items():
        dense = model(source)
        for target in PREFERRED:
            shape = _shape(dense.num_layers, 32 if find_target(target).shared else 0)
            if find_target(target).objections(dense, shape):
                continue
            rows = portability(dense, shape, target)
            cells = [("✓ " if row.verdict == "runs" else f"{row.verdict} ") + notes.mark(row.why) for row in rows]
            lines.append(f"| {shown} | {target} | " + " | ".join(cells) + " |")
    return [*lines, "", *notes.lines]


def _refused() -> list[str]:
    return ["## Refused by name", "", *(f"- {name}: {why}" for name, why in REFUSED.items())]


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
