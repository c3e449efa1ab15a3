"""MoE → dense: the parent again where the plan is there, the sum of the experts where it is not, one line otherwise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.convert import convert
from prismoe.densify import densify
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import make_plan
from tests.golden import compute, load
from tests.tiny import tiny_dense

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
SOME = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
SMALL_COHERE = {"sliding_window": 8, "num_hidden_layers": 4}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.11, "logits_scaling": 1.7}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "mixtral": ("llama", {}, {"num_experts": 8}, "mixtral"),
    "padded": ("llama", {"intermediate_size": 172}, {"num_experts": 4}, "mixtral"),
    "window": ("mistral", {"sliding_window": 8}, {"num_experts": 4}, "mixtral"),
    "tied bfloat16": ("llama", {"tie_word_embeddings": True, "dtype": "bfloat16"}, {"num_experts": 8}, "mixtral"),
    "shared": ("llama", {}, {"num_experts": 4, "shared": 32}, "granitemoeshared"),
    "qwen2 biases": ("qwen2", {"tie_word_embeddings": True}, {"num_experts": 4}, "granitemoeshared"),
    "llama biases": ("llama", {"attention_bias": True}, {"num_experts": 4, "shared": 32}, "granitemoeshared"),
    "dense layers": ("qwen3", {}, {"num_experts": 4, "layers": "odd"}, "qwen3_moe"),
    "qwen3 window": ("qwen3", WINDOW, {"num_experts": 8}, "qwen3_moe"),
    "granitemoe": ("granite", GRANITE, {"num_experts": 4}, "granitemoe"),
    "hybrid": ("llama", {}, {"num_experts": 4, "shared": 32}, "granitemoehybrid"),
    "hybrid biases": ("qwen2", {}, {"num_experts": 4}, "granitemoehybrid"),
    "swa": ("llama", {"tie_word_embeddings": True}, {"num_experts": 4, "shared": 32}, "granitemoe_swa"),
    "swa window": ("mistral", {"sliding_window": 8}, {"num_experts": 4}, "granitemoe_swa"),
    "swa some windows": ("qwen2", SOME, {"num_experts": 4}, "granitemoe_swa"),
    "qwen2_moe": ("qwen2", {"tie_word_embeddings": True}, {"num_experts": 4, "shared": 32}, "qwen2_moe"),
    "qwen2_moe some windows": ("qwen2", SOME, {"num_experts": 4, "layers": "odd"}, "qwen2_moe"),
    "qwen2_moe of llama": ("llama", {}, {"num_experts": 4}, "qwen2_moe"),
    "qwen2_moe of mistral": ("mistral", {"sliding_window": 8}, {"num_experts": 4, "shared": 32}, "qwen2_moe"),
    "glm4_moe": ("llama", {}, {"num_experts": 4, "shared": 32, "layers": "1-2"}, "glm4_moe"),
    "glm4_moe of qwen2": ("qwen2", {}, {"num_experts": 4}, "glm4_moe"),
    "glm4_moe of qwen3": ("qwen3", {}, {"num_experts": 4, "shared": 32}, "glm4_moe"),
    "flex_olmo": ("olmo2", {}, {"num_experts": 4}, "flex_olmo"),
    "ernie4_5_moe": ("ernie4_5", {}, {"num_experts": 4, "shared": 32, "layers": "1-2"}, "ernie4_5_moe"),
    "cohere2_moe": ("cohere2", SMALL_COHERE, {"num_experts": 4, "shared": 32, "layers": "0,3"}, "cohere2_moe"),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", {}, {"num_experts": 4, "shared": 16}, "hunyuan_v1_moe"),
}


def mixture(tmp: Path, case: str) -> tuple[Path, Path]:
    family, overrides, plan, target = CASES[case]
    parent = tiny_dense(tmp / "parent", family, **overrides)
    convert(parent, make_plan(parent, **plan), target=target, out=tmp / "moe")
    return parent, tmp / "moe"


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = Checkpoint.open(folder)
    return {name: (info.dtype, info.shape, found.array(name).tobytes()) for name, info in found.tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_untrained_mixture_is_its_parent_again(tmp_path: Path, case: str) -> None:
    parent, moe = mixture(tmp_path, case)
    receipt = densify(moe, out=tmp_path / "dense")
    assert receipt.bit_exact
    assert (receipt.neuron_order, receipt.warnings) == ("plan", ())
    assert receipt.parent == Checkpoint.open(parent).fingerprint
    assert bits(tmp_path / "dense") == bits(parent)
    (model, misfits), (own, _) = load(tmp_path / "dense"), load(parent)
    assert not any(misfits.values())
    (logits, greedy), (wanted, wanted_greedy) = compute(model), compute(own)
    assert np.array_equal(logits, wanted)
    assert np.array_equal(greedy, wanted_greedy)
    assert (tmp_path / "dense/tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()


def test_a_real_mixture_is_its_parent_again(tmp_path: Path, shared: Path) -> None:
    """stories260K in eight experts beside a shared one; without the plan its FFN has the parent's neurons reordered."""
    parent = shared / "models/stories260K"
    convert(parent, make_plan(parent, num_experts=8, shared=4), target="granitemoeshared", out=tmp_path / "moe")
    densify(tmp_path / "moe", out=tmp_path / "dense")
    own, found = bits(parent), bits(tmp_path / "dense")
    assert {name: found[name] for name in own} == own
    (tmp_path / "moe/moe.plan").unlink()
    densify(tmp_path / "moe", out=tmp_path / "stored", scale=4.0)
    for layer in range(5):
        pair = [Checkpoint.open(folder).ffn(layer) for folder in (parent, tmp_path / "stored")]
        neurons = [np.concatenate([ffn.gate_FD, ffn.up_FD, ffn.down_DF.T], axis=1) for ffn in pair]
        rows = [part[np.lexsort(part.T)] for part in neurons]
        assert np.array_equal(rows[0], rows[1])


def test_a_scale_that_is_no_power_of_two_is_undone_to_one_rounding(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, num_experts=6, top_k=3, scale=1.7), out=tmp_path / "moe")
    receipt = densify(tmp_path / "moe", out=tmp_path / "dense")
    assert (receipt.bit_exact, receipt.scales) == (False, (1.7,))
    found, own = Checkpoint.open(tmp_path / "dense"), Checkpoint.open(parent)
    for name in own.tensors:
        rounded = 2.0**-23 if name.endswith("down_proj.weight") else 0.0
        assert np.abs(found.array(name) - own.array(name)).max() <= rounded * np.abs(own.array(name)).max()


@pytest.mark.parametrize("case", ["mixtral", "padded", "shared", "dense layers"])
def test_without_a_plan_the_experts_lie_side_by_side(tmp_path: Path, case: str) -> None:
    parent, moe = mixture(tmp_path, case)
    (moe / "moe.plan").unlink()
    plain, scaled = densify(moe, out=tmp_path / "plain"), densify(moe, out=tmp_path / "scaled", scale=CASES_SCALE[case])
    assert plain.neuron_order == "stored"
    assert "summed as they are stored" in plain.warnings[0]
    assert scaled.warnings == ()
    # The sum of the experts is the parent but for the order of its neurons, so logits agree to rounding.
    wanted = compute(load(parent)[0])[0]
    assert np.abs(compute(load(tmp_path / "scaled")[0])[0] - wanted).max() <= 2e-5
    assert scaled.intermediate_size == Checkpoint.open(parent).config["intermediate_size"]
    own = Checkpoint.open(parent).array("model.layers.1.mlp.down_proj.weight")
    for folder, factor in (("plain", CASES_SCALE[case]), ("scaled", 1.0)):
        columns = Checkpoint.open(tmp_path / folder).array("model.layers.1.mlp.down_proj.weight")
        counted = np.sort(np.abs(columns).sum(axis=0, dtype=np.float64))
        shared = CASES[case][2].get("shared", 0)
        if not shared:
            np.testing.assert_allclose(counted, factor * np.sort(np.abs(own).sum(axis=0, dtype=np.float64)), rtol=1e-6)


CASES_SCALE = {"mixtral": 4.0, "padded": 2.0, "shared": 2.0, "dense layers": 2.0}  # E / K, the default of a partition


def test_a_trained_mixture_sums_its_experts(tmp_path: Path) -> None:
    """Weights that moved since: the dense FFN is shared + Σ experts / scale, computed here from the MoE's own files."""
    _, moe = mixture(tmp_path, "shared")
    from safetensors.torch import load_file, save_file

    state = load_file(moe / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if "block_sparse_moe" in name or "shared_mlp" in name:
            moved = tensor + 0.01 * torch.randn(tensor.shape, generator=generator) * (tensor != 0)
            state[name] = moved.contiguous()
    save_file(state, moe / "model.safetensors", metadata={"format": "pt"})
    Manifest.remove(moe)
    densify(moe, out=tmp_path / "dense")
    found = Checkpoint.open(tmp_path / "dense").ffn(2)
    x = np.random.default_rng(0).standard_normal((7, 64))

    def swiglu(gate: Any, up: Any, down: Any) -> Any:
        z = x @ np.asarray(gate, np.float64).T
        return (z / (1 + np.exp(-z)) * (x @ np.asarray(up, np.float64).T)) @ np.asarray(down, np.float64).T

    at = "model.layers.2"
    fused, out = (state[f"{at}.block_sparse_moe.{name}_linear.weight"].numpy() for name in ("input", "output"))
    wanted = swiglu(*np.split(state[f"{at}.shared_mlp.input_linear.weight"].numpy(), 2),
                    state[f"{at}.shared_mlp.output_linear.weight"].numpy())  # fmt: skip
    wanted = wanted + sum(swiglu(*np.split(fused[e], 2), out[e]) / 2.0 for e in range(4))
    got = swiglu(found.gate_FD, found.up_FD, found.down_DF)
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_neurons_that_no_expert_holds_are_left_out(tmp_path: Path) -> None:
    """64 of 96 neurons in 4 experts: the dense FFN has those 64, ascending."""
    parent = tiny_dense(tmp_path / "parent")
    whole = make_plan(parent, num_experts=6, scale=1.0)
    layers = tuple(replace(layer, experts=layer.experts[:4]) for layer in whole.layers if layer is not None)
    convert(parent, replace(whole, layers=layers), out=tmp_path / "moe")
    made = densify(tmp_path / "moe", out=tmp_path / "dense")
    assert made.warnings == ("the plan holds 64 of the parent's 96 neurons",)
    assert (made.intermediate_size, made.zero_neurons) == (64, 3 * 4 * (32 - 16))
    found, own = Checkpoint.open(tmp_path / "dense"), Checkpoint.open(parent)
    for layer, planned in enumerate(layers):
        ids = np.sort(planned.experts.ravel())
        assert np.array_equal(found.ffn(layer).up_FD, own.ffn(layer).up_FD[ids])
        assert np.array_equal(found.ffn(layer).down_DF, own.ffn(layer).down_DF[:, ids])


def test_the_same_command_continues_and_gives_the_same_bytes(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "mixtral")
    first = densify(moe, out=tmp_path / "a", max_shard_bytes=60_000)
    assert first.num_shards > 3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("manifest.json", "config.json", sorted(path.name for path in (tmp_path / "b").glob("model-*"))[1]):
        (tmp_path / "b" / name).unlink()
    again = densify(moe, out=tmp_path / "b", max_shard_bytes=60_000)
    assert again.kept_shards == first.num_shards - 1
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert densify(moe, out=tmp_path / "a", max_shard_bytes=60_000).state == "already complete"
    manifest = Manifest.read(tmp_path / "a")
    assert manifest is not None
    assert (manifest.kind, manifest.parents["source"]) == ("densify", Checkpoint.open(moe).fingerprint)
    with pytest.raises(ResourceError, match="a different job"):
        densify(moe, out=tmp_path / "a", max_shard_bytes=90_000)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "mixtral")
    receipt = densify(moe, out=tmp_path / "dense", dry_run=True)
    assert receipt.state == "dry run"
    assert not (tmp_path / "dense").exists()
    json.dumps(receipt.to_dict())


@pytest.mark.parametrize("planned", [True, False])
def test_copies_are_refused(tmp_path: Path, planned: bool) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, method="upcycle", num_experts=4), out=tmp_path / "moe")
    if not planned:
        (tmp_path / "moe/moe.plan").unlink()
    found = "neuron 0 is in 4 experts" if planned else "experts 0 and 1 of layer 0 share neurons or are copies"
    with pytest.raises(UsageError, match=found) as raised:
        densify(tmp_path / "moe", out=tmp_path / "dense")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("planned", [True, False])
def test_absorbed_neurons_are_refused(tmp_path: Path, planned: bool) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, num_experts=4, shared=32), out=tmp_path / "moe", absorb=True)
    if not planned:
        (tmp_path / "moe/moe.plan").unlink()
    with pytest.raises(UsageError, match="32 shared neurons are in every expert" if planned else "share neurons"):
        densify(tmp_path / "moe", out=tmp_path / "dense")


def test_noise_is_refused(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    plan = make_plan(parent, method="upcycle", num_experts=2, noise=0.01)
    convert(parent, plan, out=tmp_path / "moe")
    with pytest.raises(UsageError, match="changed by noise"):
        densify(tmp_path / "moe", out=tmp_path / "dense")


def test_what_is_no_mixture_of_ours_is_refused(tmp_path: Path) -> None:
    parent, moe = mixture(tmp_path, "mixtral")
    with pytest.raises(
        InputError, match=r"model_type 'llama'; needed a mixture: cohere2_moe, .*, mixtral, qwen2_moe, qwen3_moe"
    ):
        densify(parent, out=tmp_path / "dense")
    with pytest.raises(UsageError, match=r"scale: 4\.0 beside a plan"):
        densify(moe, out=tmp_path / "dense", scale=4.0)
    other = make_plan(tiny_dense(tmp_path / "other", num_hidden_layers=2), num_experts=8)
    with pytest.raises(InputError, match=r"a plan of 2 layers .* the plan is another model's"):
        densify(moe, plan=other, out=tmp_path / "dense")
    with pytest.raises(InputError, match="another plan than the one it was cut by"):
        densify(moe, plan=make_plan(parent, num_experts=8, seed=1), out=tmp_path / "dense")
    wide = make_plan(tiny_dense(tmp_path / "wide", intermediate_size=384), num_experts=8)
    with pytest.raises(InputError, match=r"experts of \[48\] neurons"):
        densify(moe, plan=wide, out=tmp_path / "dense")


def test_a_key_that_decides_the_arithmetic_must_be_there(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "mixtral")
    config = json.loads((moe / "config.json").read_text())
    del config["rms_norm_eps"]
    (moe / "config.json").write_text(json.dumps(config))
    Manifest.remove(moe)
    with pytest.raises(InputError, match="rms_norm_eps: missing"):
        densify(moe, out=tmp_path / "dense")


@pytest.mark.parametrize(
    ("case", "change", "found"),
    [
        ("glm4_moe", {"routed_scaling_factor": 2.5}, r"routed_scaling_factor: 2\.5; needed 1\.0"),
        ("glm4_moe", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0\.5; needed 1\.0"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "average"}, "'average'; needed 'sum'"),
        ("swa window", {"embedding_multiplier": 3.0}, "a sliding window beside Granite's factors"),
        ("hybrid", {"position_embedding_type": "nope"}, "'nope'; needed 'rope'"),
    ],
)
def test_what_no_dense_class_says_is_named(tmp_path: Path, case: str, change: dict[str, Any], found: str) -> None:
    _, moe = mixture(tmp_path, case)
    path = moe / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    Manifest.remove(moe)
    with pytest.raises(InputError, match=found) as raised:
        densify(moe, out=tmp_path / "dense")
    assert "config.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_training_added_is_not_lost_in_silence(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    _, moe = mixture(tmp_path / "sinks", "swa")
    state = load_file(moe / "model.safetensors")
    state["model.layers.1.self_attn.sinks"] = np.zeros_like(state["model.layers.1.self_attn.sinks"])
    save_file(state, moe / "model.safetensors")
    Manifest.remove(moe)
    with pytest.raises(InputError, match=r"unexpected tensor model\.layers\.1\.self_attn\.sinks"):
        densify(moe, out=tmp_path / "dense")
    _, moe = mixture(tmp_path / "gate", "qwen2_moe")
    state = load_file(moe / "model.safetensors")
    state["model.layers.1.mlp.shared_expert_gate.weight"][0, 3] = 0.2
    save_file(state, moe / "model.safetensors")
    Manifest.remove(moe)
    made = densify(moe, out=tmp_path / "dense")
    assert made.warnings == (
        "the shared expert's gate was trained: its sigmoid is taken for the one half it started from",
    )


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    _, moe = mixture(tmp_path, "mixtral")
    state = load_file(moe / "model.safetensors")
    Manifest.remove(moe)
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({name: array for name, array in state.items() if name != key}, moe / "model.safetensors")
    with pytest.raises(InputError, match=r"experts\.3\.w2\.weight: missing"):
        densify(moe, out=tmp_path / "dense")
    save_file({**state, "model.layers.1.extra.weight": state[key]}, moe / "model.safetensors")
    with pytest.raises(InputError, match=r"unexpected tensor model\.layers\.1\.extra\.weight"):
        densify(moe, out=tmp_path / "dense")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent, moe = mixture(tmp_path, "mixtral")
    assert main(["densify", str(moe), "--out", str(tmp_path / "dense"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verb"], found["state"], found["bit_exact"]) == ("densify", "written", True)
    assert bits(tmp_path / "dense") == bits(parent)
    assert main(["densify", str(moe), "--out", str(tmp_path / "dense")]) == 0
    assert "already complete" in capsys.readouterr().out
    assert main(["densify", str(moe)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["densify", str(moe), "scal=4", "--out", str(tmp_path / "x")]) == 2
    assert "did you mean scale?" in capsys.readouterr().err
    assert main(["densify", "--help"]) == 0
    assert "max_shard_bytes" in capsys.readouterr().out
