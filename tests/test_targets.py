"""Every target in stock transformers 5 and 4.57, against the dense model with the formula in place of its MLP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import dense_config
from prismoe.cli import main
from prismoe.convert import convert
from prismoe.errors import InputError, UsageError
from prismoe.lowering import lower
from prismoe.plan import Plan, PlanShape, make_plan, plan_shape
from prismoe.recipe import Copy, Fill, Stack, Take
from prismoe.target import check_rows, moe_config, padded
from prismoe.targets import all_targets, find_target
from prismoe.verify import verify
from tests import golden
from tests.tiny import tiny_dense

TOLERANCE = 2e-5  # max |Δlogit| in float32 where logits reach about 7


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
SHAPE = PlanShape(3, (0, 1, 2), 8, 2, 12, 0, (4.0,))


OLD_CASES = [case for case, (_, target, _) in golden.CASES.items() if target not in golden.ONLY_5]


@dataclass(frozen=True)
class Made:
    """One converted case and what its reference computes."""

    source: Path
    folder: Path
    logits: np.ndarray
    greedy: np.ndarray
    dense_logits: np.ndarray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case of `golden.CASES`, converted once."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("golden")
    sources: dict[str, Path] = {}
    cases: dict[str, Made] = {}
    for number, (case, (source, target, arguments)) in enumerate(golden.CASES.items()):
        if source not in sources:
            sources[source] = golden.make_source(root / f"dense{len(sources)}", source)
        folder = root / f"case{number}"
        plan = make_plan(sources[source], **{key: value for key, value in arguments.items() if key != "absorb"})
        routers = build(sources[source], plan, target, folder, absorb=arguments.get("absorb", False))
        logits, greedy = golden.compute(golden.reference(sources[source], plan, routers, gate=find_target(target).gate))
        dense = AutoModelForCausalLM.from_pretrained(sources[source], dtype="float32").eval()
        cases[case] = Made(sources[source], folder, logits, greedy, golden.compute(dense)[0])
    return cases


def build(source: Path, plan: Plan, target: str, out: Path, *, absorb: bool) -> dict[int, np.ndarray]:
    """Convert into `out`; returns the router rows of each MoE layer."""
    convert(source, plan, target=target, out=out, absorb=absorb)
    written, key = Checkpoint.open(out), find_target(target).router
    return {index: np.array(written.array(key.format(l=index)), np.float32) for index in plan_shape(plan).moe_layers}


@pytest.fixture(scope="module")
def old_transformers(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same folders in transformers 4.57, in a process of its own."""
    library = os.environ.get("PRISMOE_TF4", "")
    if not Path(library, "transformers").is_dir():
        pytest.skip("PRISMOE_TF4 does not name a folder with transformers 4.57 (make test installs it)")
    out = tmp_path_factory.mktemp("old") / "found.npz"
    command = [sys.executable, golden.__file__, str(out), *(str(made[case].folder) for case in OLD_CASES)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": library}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as found:
        assert str(found["version"]).startswith("4.57.")
        return {key: found[key] for key in found.files}


@pytest.mark.parametrize("case", golden.CASES)
def test_stock_transformers_5_computes_the_formula(made: dict[str, Made], case: str) -> None:
    expected = made[case]
    model, misfits = golden.load(expected.folder)
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    logits, greedy = golden.compute(model)
    assert 4 < np.abs(expected.logits).max() < 40
    assert np.abs(logits - expected.logits).max() <= TOLERANCE
    assert greedy.tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("case", OLD_CASES)
def test_transformers_4_57_computes_the_same(
    made: dict[str, Made], old_transformers: dict[str, Any], case: str
) -> None:
    expected, name = made[case], made[case].folder.name
    misfits = json.loads(str(old_transformers[f"{name}/misfits"]))
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert np.abs(old_transformers[f"{name}/logits"] - expected.logits).max() <= TOLERANCE
    assert old_transformers[f"{name}/greedy"].tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("case", golden.CASES)
def test_upcycled_is_the_dense_model_and_a_partition_is_not(made: dict[str, Made], case: str) -> None:
    difference = np.abs(made[case].logits - made[case].dense_logits).max()
    if golden.CASES[case][2]["method"] == "upcycle":
        assert difference <= TOLERANCE
    else:
        assert difference > 0.1


@pytest.mark.parametrize("layer", [0, 1])
def test_the_comparison_sees_a_thousandth_of_one_weight(made: dict[str, Made], layer: int) -> None:
    """Cohere2's mixed case agrees with the formula to the last bit (both add the same products in the same order):
    layer 0 has experts, layer 1 is dense, and neither is left out of the comparison.
    """
    import torch

    expected = made["cohere2 -> cohere2_moe, middle layers dense"]
    model, _ = golden.load(expected.folder)
    assert model.config.mlp_layer_types == ["sparse", "dense", "dense", "sparse"]
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        for weight in (mlp.down_proj.weight,) if layer else mlp.experts.down_proj:
            weight[0, 0] *= 1.001
    assert np.abs(golden.compute(model)[0] - expected.logits).max() > 5 * TOLERANCE


@pytest.mark.parametrize("target", sorted(name for name, found in all_targets().items() if found.router))
def test_config_spells_out_every_key_of_both_generations(
    made: dict[str, Made], old_transformers: dict[str, Any], target: str
) -> None:
    """transformers 4 and 5 declare different keys; whatever either knows is written, null included."""
    from transformers import AutoConfig

    case = next(case for name, case in made.items() if golden.CASES[name][1] == target)
    written = json.loads((case.folder / "config.json").read_text())
    new = type(AutoConfig.for_model(target)).__annotations__
    own = {"vocab_size", "hidden_size", "num_key_value_heads", "tie_word_embeddings"}
    assert own <= set(new)
    assert set(new) - {"model_type", "keys_to_ignore_at_inference", "attribute_map", "default_theta"} <= set(written)
    if target not in golden.ONLY_5:
        old = set(old_transformers[f"{case.folder.name}/keys"].tolist())
        assert {"rope_theta", "num_key_value_heads"} <= old
        assert old <= set(written)
    assert {"num_experts", "num_local_experts", "rope_theta", "rope_scaling", "dtype", "torch_dtype"} <= set(written)


CERTIFIED = {target: case for case, (_, target, _) in golden.CASES.items()}
CERTIFIED |= {case: case for case in golden.CASES if case.startswith(("phi3 ->", "granite ->", "cohere2", "ernie4_5"))}


@pytest.mark.parametrize("case", dict.fromkeys(CERTIFIED.values()))
def test_every_target_is_certified(made: dict[str, Made], case: str) -> None:
    """The checks of `verify` know fused sources, factors, gates, and layers that are dense."""
    assert verify(made[case].folder, source=made[case].source, tokens=32).passed


def test_rope_is_written_in_both_spellings() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    dense = dense_config({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    config = moe_config(dense, SHAPE, find_target("mixtral"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    plain = moe_config(dense_config(LLAMA), SHAPE, find_target("mixtral"))
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e4, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("target", "changes", "shape", "fields"),
    [
        ("mixtral", {}, {}, []),
        ("mixtral", {"sliding_window": 8, "sliding_layers": (0, 1, 2)}, {}, []),
        ("mixtral", {"head_dim": 32}, {}, []),
        ("mixtral", {"sliding_window": 8, "sliding_layers": (0,)}, {}, ["sliding_layers"]),
        ("mixtral", {"qkv_bias": True, "o_bias": True}, {}, ["qkv_bias", "o_bias"]),
        ("mixtral", {"qk_norm": True}, {"shared_width": 8}, ["qk_norm", "shared_width"]),
        ("mixtral", {}, {"moe_layers": (0, 2)}, ["dense_layers"]),
        ("granitemoeshared", {}, {"shared_width": 8}, []),
        ("granitemoeshared", {"qkv_bias": True}, {}, []),
        ("granitemoeshared", {"head_dim": 32}, {}, ["head_dim"]),
        ("granitemoeshared", {"sliding_window": 8, "sliding_layers": (0, 1, 2)}, {}, ["sliding_window"]),
        ("granitemoeshared", {"qk_norm": True}, {"moe_layers": (1,)}, ["qk_norm", "dense_layers"]),
        ("qwen3_moe", {}, {}, ["qk_norm"]),
        ("qwen3_moe", {"qk_norm": True, "head_dim": 32}, {"moe_layers": (1,)}, []),
        ("qwen3_moe", {"qk_norm": True, "qkv_bias": True}, {}, ["qkv_bias"]),
        ("qwen3_moe", {"qk_norm": True, "sliding_window": 8, "sliding_layers": (1,)}, {}, ["sliding_layers"]),
        ("qwen3_moe", {"qk_norm": True}, {"shared_width": 8}, ["shared_width"]),
    ],
)
def test_objections_name_the_fields(
    target: str, changes: dict[str, Any], shape: dict[str, Any], fields: list[str]
) -> None:
    dense = replace(dense_config(LLAMA), **changes)
    found = find_target(target).objections(dense, replace(SHAPE, **shape))
    assert [objection.field for objection in found] == fields


def test_lower_refuses_with_every_field(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_dense(tmp_path, "qwen2"))
    plan = make_plan(checkpoint, num_experts=4, shared=16, layers="odd")
    with pytest.raises(UsageError) as caught:
        lower(checkpoint, plan, find_target("mixtral"))
    assert str(caught.value) == (
        f"{tmp_path}: target mixtral: qkv_bias is True, needs False: its attention has no bias; "
        "dense_layers is [0, 2], needs []: every layer has experts; "
        "shared_width is 16, needs 0: it has no shared expert (hint: convert.target=qwen2_moe holds it)"
    )
    with pytest.raises(UsageError, match=r"^target: unknown 'mixtrl'; needed one of .*did you mean mixtral"):
        find_target("mixtrl")


def test_lower_refuses_a_plan_for_another_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_dense(tmp_path / "a"))
    other = make_plan(tiny_dense(tmp_path / "b", intermediate_size=64))
    with pytest.raises(InputError) as caught:
        lower(checkpoint, other, find_target("mixtral"))
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: a plan for (layers, neurons, hidden) = (3, 64, 64); "
        "needed (3, 96, 64) (hint: make a new plan)"
    )


def test_recipes_of_a_layer(tmp_path: Path) -> None:
    """Rows without a factor, columns with the scale, zero slots up to the padded width; copies when upcycling."""
    checkpoint = Checkpoint.open(tiny_dense(tmp_path, intermediate_size=172))
    plan = make_plan(checkpoint, num_experts=4, seed=3)
    recipes = lower(checkpoint, plan, find_target("mixtral"))
    experts, prefix = plan.layers[1].experts, "model.layers.1.block_sparse_moe"  # type: ignore[union-attr]
    for part, key, axis, factor in (("gate", "w1", 0, 1.0), ("up", "w3", 0, 1.0), ("down", "w2", 1, 2.0)):
        take = recipes[f"{prefix}.experts.2.{key}.weight"]
        assert isinstance(take, Take)
        assert take.source == f"model.layers.1.mlp.{part}_proj.weight"
        assert (take.axis, take.factor, take.pad) == (axis, factor, 64 - 43)
        np.testing.assert_array_equal(take.index, experts[2])
    router = recipes[f"{prefix}.gate.weight"]
    assert isinstance(router, Fill)
    assert (router.shape, router.dtype, router.std, router.key) == ((4, 64), "F32", 0.02, (3, 1))
    unpadded = lower(checkpoint, make_plan(checkpoint, method="upcycle"), find_target("mixtral"), pad_to=4)
    experts_3 = [recipe for key, recipe in unpadded.items() if ".experts.3." in key]
    assert all(isinstance(recipe, Copy) for recipe in experts_3)
    assert len(experts_3) == 9
    fused = lower(checkpoint, plan, find_target("granitemoeshared"))[
        "model.layers.1.block_sparse_moe.input_linear.weight"
    ]
    assert isinstance(fused, Stack)
    assert fused.shape == (4, 128, 64)
    assert [part.source.split(".")[-2] for part in fused.parts if isinstance(part, Take)] == [
        "gate_proj",
        "up_proj",
    ] * 4


def test_zero_biases_fill_what_granite_wants_and_qwen2_lacks(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_dense(tmp_path, "qwen2"))
    recipes = lower(checkpoint, make_plan(checkpoint), find_target("granitemoeshared"))
    for name in "qkv":
        assert isinstance(recipes[f"model.layers.0.self_attn.{name}_proj.bias"], Copy)
    zeros = recipes["model.layers.0.self_attn.o_proj.bias"]
    assert isinstance(zeros, Fill)
    assert (zeros.shape, zeros.std, zeros.rows) == ((64,), 0.0, None)


def test_absorbed_neurons_stand_behind_those_of_every_expert(tmp_path: Path) -> None:
    """Rows of up carry the scale of the routed neurons alone; a down matrix has one factor, one."""
    checkpoint = Checkpoint.open(tiny_dense(tmp_path))
    plan = make_plan(checkpoint, num_experts=8, shared=32)
    recipes = lower(checkpoint, plan, find_target("mixtral"), absorb=True)
    prefix, layer = "model.layers.1.block_sparse_moe.experts.3", plan.layers[1]
    assert layer is not None
    for key, factor in (("w1", 1.0), ("w3", 4.0)):
        stack = recipes[f"{prefix}.{key}.weight"]
        assert isinstance(stack, Stack)
        routed, shared = stack.parts
        assert isinstance(routed, Take)
        assert isinstance(shared, Take)
        assert (routed.factor, routed.pad, shared.factor, shared.pad) == (factor, 0, 1.0, 64 - 40)
        np.testing.assert_array_equal(shared.index, layer.shared)
    down = recipes[f"{prefix}.w2.weight"]
    assert isinstance(down, Take)
    assert (down.factor, down.pad) == (1.0, 64 - 40)
    np.testing.assert_array_equal(down.index, [*layer.experts[3], *layer.shared])
    changed = make_plan(checkpoint, method="upcycle", num_experts=2, noise=0.1)
    with pytest.raises(UsageError, match="absorb with experts that were changed; needed experts of the base"):
        lower(checkpoint, changed, find_target("mixtral"), absorb=True)


@pytest.mark.parametrize(("target", "pad_to"), [("mixtral", 256), ("granitemoeshared", 256), ("glm4_moe", 384)])
def test_wider_padding_computes_the_same(tmp_path: Path, target: str, pad_to: int) -> None:
    """256 for K-quants, 128 for each of 3 ranks: zeros end every expert, and the logits are those of 32."""
    dense = tiny_dense(tmp_path / "dense")
    plan = make_plan(dense, num_experts=4, shared=0 if target == "mixtral" else 32, router_std=0.3)
    logits = {}
    for width in (32, pad_to):
        convert(dense, plan, target=target, out=tmp_path / str(width), pad_to=width)
        model, misfits = golden.load(tmp_path / str(width))
        assert not any(misfits.values())
        logits[width] = golden.compute(model)
    assert np.abs(logits[32][0] - logits[pad_to][0]).max() <= 2e-5
    assert np.array_equal(logits[32][1], logits[pad_to][1])
    made = {width: Checkpoint.open(tmp_path / str(width)) for width in logits}
    for slot in find_target(target).experts:
        if slot.parts == ("down",):
            key = slot.key.format(l=1, e=2)
            narrow, wide = (made[width].array(key) for width in logits)
            assert wide.shape[-1] == pad_to
            assert np.array_equal(wide[..., : narrow.shape[-1]], narrow)
            assert not wide[..., narrow.shape[-1] :].any()


@pytest.mark.parametrize(
    ("width", "pad_to", "wanted"), [(43, 32, 64), (64, 32, 64), (1, 8, 8), (0, 32, 0), (12, 1, 12)]
)
def test_padded(width: int, pad_to: int, wanted: int) -> None:
    assert padded(width, pad_to) == wanted


def test_widths_that_stock_matrix_products_cannot_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's grouped_mm: rows of 16 bytes. What passes here is run below, and what does not is run in test_verify."""
    for dtype, step in (("float32", 4), ("bfloat16", 8), (None, 8)):
        dense = replace(dense_config(LLAMA), dtype=dtype)
        for width in (*range(1, 17), 24):
            if width % step == 0:
                check_rows(dense, find_target("mixtral"), width)
                continue
            with pytest.raises(UsageError, match=rf"^convert.pad_to: experts {width} wide .* multiple of {step} "):
                check_rows(dense, find_target("mixtral"), width)
        check_rows(dense, find_target("dense"), 43)
    source = tiny_dense(tmp_path / "dense", intermediate_size=172)
    arguments = [str(source), "plan.num_experts=4", "convert.pad_to=1"]
    for verb in (["plan"], ["convert", "--out", str(tmp_path / "run")]):
        assert main([*verb, *arguments]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("prismoe: ")
        assert "experts 43 wide in float32: stock transformers loads them and cannot run them" in line
        assert "needed a multiple of 4 (hint: convert.pad_to=32; zero neurons change nothing)" in line
    assert not (tmp_path / "run" / "moe").exists()
    convert(source, make_plan(source, num_experts=4), pad_to=4, out=tmp_path / "moe")
    assert verify(tmp_path / "moe", source=source).passed


@pytest.mark.parametrize("case", ["llama2 -> mixtral, partition", "llama2 -> granitemoeshared, shared"])
def test_stock_balance_loss_works_on_what_we_write(made: dict[str, Made], case: str) -> None:
    """Granite's stock loss reads `num_experts`, which its own config class does not have: our config.json brings it."""
    model, _ = golden.load(made[case].folder)
    found = model(input_ids=golden.prompt(), labels=golden.prompt(), output_router_logits=True)
    assert float(found.aux_loss.detach()) == pytest.approx(2.0, rel=0.5)  # top_k when perfectly balanced


@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "parent-4m"])
@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared"])
def test_real_checkpoints_upcycle_exactly(shared: Path, tmp_path: Path, name: str, target: str) -> None:
    from transformers import AutoModelForCausalLM

    source = shared / "models" / name
    convert(source, make_plan(source, method="upcycle", num_experts=4), target=target, out=tmp_path / "moe")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    model, misfits = golden.load(tmp_path / "moe")
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    (logits, greedy), (wanted, wanted_greedy) = golden.compute(model), golden.compute(dense)
    assert np.abs(logits - wanted).max() <= 1e-4
    assert greedy.tolist() == wanted_greedy.tolist()
