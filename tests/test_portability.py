"""What is said of other engines: each measured trap, the choice of a target, and the words of a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from prismoe.checkpoint.family import DenseConfig, dense_config
from prismoe.cli import main
from prismoe.errors import UsageError
from prismoe.plan import PlanShape
from prismoe.portability import ENGINES, RUNS, TRAPS, choose_target, portability, width_warnings
from prismoe.targets import PREFERRED, all_targets, holder
from tests import golden, matrix
from tests.runs import finished
from tests.test_targets import LLAMA, SHAPE

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BIASED = {"qkv_bias": True}
WINDOW = {"sliding_window": 8, "sliding_layers": (0, 1, 2)}


def model(**changes: Any) -> DenseConfig:
    return replace(dense_config(LLAMA), **changes)


def verdicts(target: str, shape: PlanShape = SHAPE, **changes: Any) -> dict[str, str]:
    return {row.engine: row.verdict for row in portability(model(**changes), shape, target)}


@pytest.mark.parametrize(
    ("target", "changes", "engine", "verdict"),
    [
        # Every pair that was run, or read in an engine's source, and came out otherwise than "runs".
        ("mixtral", {}, "gguf", "runs"),
        ("mixtral", {}, "mlx", "runs"),
        ("mixtral", {"rope_scaling": LLAMA3_ROPE}, "gguf", "runs"),
        ("mixtral", {"rope_scaling": LLAMA3_ROPE}, "vllm", "runs"),
        ("mixtral", {"rope_scaling": LLAMA3_ROPE}, "mlx", "wrong"),
        ("mixtral", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "gguf", "runs"),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "gguf", "unknown"),
        ("glm4_moe", {"tie_embeddings": True}, "mlx", "refused"),
        ("qwen3_moe", BIASED, "mlx", "refused"),
        ("qwen2_moe", {"rope_scaling": LLAMA3_ROPE}, "mlx", "refused"),
        ("hunyuan_v1_moe", {}, "gguf", "refused"),
        ("mixtral", WINDOW, "gguf", "wrong"),
        ("mixtral", WINDOW, "mlx", "wrong"),
        ("mixtral", WINDOW, "vllm", "runs"),
        ("mixtral", {"head_dim": 32}, "mlx", "refused"),
        ("granitemoe", BIASED, "vllm", "refused"),
        ("granitemoe", BIASED, "gguf", "runs"),
        ("granitemoe", {"rope_scaling": LLAMA3_ROPE}, "sglang", "wrong"),
        ("granitemoe", {"rope_scaling": LLAMA3_ROPE}, "gguf", "refused"),
        ("granitemoe", {"rope_scaling": LLAMA3_ROPE}, "mlx", "runs"),
        ("granitemoeshared", {}, "mlx", "refused"),
        ("granitemoehybrid", {"rope_scaling": LLAMA3_ROPE}, "mlx", "wrong"),
        ("granitemoe_swa", {"rope_scaling": LLAMA3_ROPE}, "gguf", "runs"),
        ("granitemoe_swa", {}, "transformers4", "refused"),
        ("qwen2_moe", {}, "gguf", "wrong"),
        ("qwen2_moe", {}, "mlx", "wrong"),
        ("qwen2_moe", {"tie_embeddings": True}, "gguf", "refused"),
        ("qwen2_moe", BIASED, "vllm", "runs"),
        ("qwen3_moe", {}, "gguf", "runs"),
        ("flex_olmo", {}, "gguf", "refused"),
        ("ernie4_5_moe", {"rope_scaling": LLAMA3_ROPE}, "gguf", "wrong"),
        ("glm4_moe", {}, "gguf", "refused"),
        ("cohere2_moe", {}, "gguf", "refused"),
        ("qwen3_moe", BIASED, "gguf", "refused"),
        ("glm4_moe", {}, "mlx", "runs"),
    ],
)
def test_what_was_measured(target: str, changes: dict[str, Any], engine: str, verdict: str) -> None:
    assert verdicts(target, **changes)[engine] == verdict


def test_every_verdict_says_how_we_know() -> None:
    for target in PREFERRED:
        for row in portability(model(), SHAPE, target):
            assert bool(row.evidence) == (row.verdict != "unknown"), row
            if row.engine in ("gguf", "mlx"):
                assert not row.evidence or row.evidence.startswith("measured with ")
            if row.engine in ("vllm", "sglang"):
                assert not row.evidence or row.evidence.endswith("not run")


def test_kept_weights_of_all_experts_need_no_renormalising() -> None:
    every = replace(SHAPE, top_k=SHAPE.num_experts)
    assert verdicts("qwen2_moe", every)["gguf"] == "runs"


def test_layers_that_stay_dense_are_a_trap_of_their_own() -> None:
    mixed = replace(SHAPE, moe_layers=(1, 2))
    assert verdicts("qwen3_moe", mixed)["gguf"] == "refused"
    assert verdicts("ernie4_5_moe", mixed)["gguf"] == "runs"
    assert verdicts("qwen2_moe", mixed)["sglang"] == "refused"


def test_the_table_names_targets_and_engines_that_there_are() -> None:
    mixtures = {name for name, target in all_targets().items() if target.router}
    assert set(PREFERRED) == mixtures
    assert set(RUNS) == set(ENGINES)
    for engine, targets in RUNS.items():
        assert set(targets) <= mixtures, engine
    for trap in TRAPS:
        assert set(trap.engines) <= set(ENGINES)
        assert set(trap.targets) <= mixtures
    refused = {trap.targets for trap in TRAPS if trap.engines == ("transformers4",)}
    assert refused == {golden.ONLY_5}


@pytest.mark.parametrize(
    ("changes", "shared", "engines", "chosen"),
    [
        ({}, 0, ENGINES, "mixtral"),
        ({}, 32, ["vllm", "gguf"], "granitemoeshared"),
        ({}, 32, ["mlx", "gguf"], "granitemoehybrid"),
        ({"rope_scaling": LLAMA3_ROPE}, 32, ["gguf"], "granitemoe_swa"),
        (BIASED, 0, ["gguf", "mlx"], "granitemoe"),
        (BIASED, 32, ["vllm", "sglang"], "qwen2_moe"),
        (BIASED, 32, ["vllm", "mlx"], "glm4_moe"),
    ],
)
def test_the_first_target_that_is_right_everywhere(
    changes: dict[str, Any], shared: int, engines: list[str], chosen: str
) -> None:
    assert choose_target(model(**changes), replace(SHAPE, shared_width=shared), engines=engines) == chosen


def test_a_refusal_says_why_of_every_target() -> None:
    with pytest.raises(UsageError) as caught:
        choose_target(
            model(rope_scaling=LLAMA3_ROPE), replace(SHAPE, shared_width=32), engines=["gguf", "transformers4"]
        )
    text = str(caught.value)
    assert "granitemoeshared: gguf refused (its converter has no rope scaling for it (Missing ROPE_FREQS))" in text
    assert "granitemoe_swa: transformers4 refused (the class is in transformers 5 alone)" in text
    assert text.endswith("(hint: convert.absorb=true puts the shared neurons into every expert)")
    with pytest.raises(UsageError, match=r"^convert.engines: mixtral: shared_width is 32, needs 0"):
        choose_target(model(), replace(SHAPE, shared_width=32), engines=["vllm"], target="mixtral")
    with pytest.raises(UsageError, match=r"^convert.engines: unknown engine 'vlm'; .*did you mean vllm"):
        portability(model(), SHAPE, "mixtral", engines=["vlm"])


def test_for_chooses_and_the_receipt_says_what_runs_where(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(finished()[0] / "dense")
    plan = ["plan", source, "plan.num_experts=4", "plan.shared=32"]
    assert main([*plan, "--for", "vllm,gguf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["account"]["target"] == "granitemoeshared"
    assert {row["engine"]: row["verdict"] for row in found["portability"]}["mlx"] == "refused"
    assert main([*plan, "--for", "vllm,gguf", "convert.target=mixtral"]) == 2
    assert "mixtral: shared_width is 32, needs 0" in capsys.readouterr().err
    assert main([*plan, "--for", "mlx", "convert.target=mixtral", "convert.absorb=true"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mixtral in other engines" in out
    assert "note: the 32 shared neurons stand in every expert: computed 2 times for a token and stored 4 times" in out


def test_for_gguf_warns_of_widths_that_k_quants_do_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(finished()[0] / "dense"), "plan.num_experts=4", "--json"]
    warned = {}
    for name, more in {
        "gguf": ["--for", "gguf"],
        "gguf 256": ["--for", "vllm,gguf", "convert.pad_to=256"],
        "vllm": ["--for", "vllm"],
        "nobody": [],
    }.items():
        assert main([*plan, *more]) == 0
        found = json.loads(capsys.readouterr().out)["warnings"]
        warned[name] = [line for line in found if "K-quants" in line]
    assert warned == {"gguf": [warned["gguf"][0]], "gguf 256": [], "vllm": [], "nobody": []}
    assert warned["gguf"][0].startswith("experts stored 32 wide: ")
    assert "convert.pad_to=256" in warned["gguf"][0]
    wide = replace(SHAPE, expert_width=512, shared_width=40)
    assert width_warnings(wide, "granitemoeshared", engines=["gguf"], pad_to=32)[0].startswith("experts stored 64 wide")
    assert width_warnings(wide, "granitemoeshared", engines=["gguf"], pad_to=256) == ()


def test_the_page_of_targets_is_current() -> None:
    assert matrix.PAGE.read_text() == matrix.page(), "python -m tests.matrix"
    assert matrix.README.read_text() == matrix.readme(), "python -m tests.matrix"


@pytest.mark.parametrize(
    ("changes", "shape", "found"),
    [
        ({}, {}, "convert.target=mixtral"),
        ({"qk_norm": True}, {}, "convert.target=qwen3_moe"),
        ({"block": "post-norm", "qk_norm": True}, {}, "convert.target=flex_olmo"),
        ({"block": "post-norm", "qk_norm": True}, {"shared_width": 8}, "convert.target=flex_olmo convert.absorb=true"),
        ({"multipliers": {"of_its_own": 2.0}}, {}, ""),
    ],
)
def test_the_holder_of_a_plan_is_named(changes: dict[str, Any], shape: dict[str, Any], found: str) -> None:
    assert holder(replace(dense_config(LLAMA), **changes), replace(SHAPE, **shape)) == found
