"""Every planted fault is caught by the check that is there for it, and by no check that has no business with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismoe.errors import InputError, NumericalError
from prismoe.folder import Manifest, hash_files
from prismoe.verify import Certificate
from tests.conversions import check, converted

MIXTRAL_LAYER = "model.layers.1.block_sparse_moe"
Weights = dict[str, torch.Tensor]


def plant(folder: Path, change: Callable[[Weights], None], *, remember: bool = True) -> None:
    """Change tensors of the folder; `remember` makes the manifest agree, so that only deeper checks can find it."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if remember:
        sign(folder)


def plant_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    sign(folder)


def sign(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    Manifest(
        kind=manifest.kind,
        parents=manifest.parents,
        config=manifest.config,
        files=hash_files(folder, manifest.files),
        key=manifest.key,
    ).write(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for case in ("llama to mixtral", "llama with a shared expert", "qwen3, odd layers", "llama upcycled"):
        made[case] = converted(tmp_path_factory.mktemp("original"), case).parent
    return made


@pytest.fixture
def copy_of(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a converted folder beside its source, free to be damaged."""
    return lambda case: Path(shutil.copytree(originals[case], tmp_path / "copy")) / "moe"


def failed(folder: Path) -> set[str]:
    """Names of the checks that fail; the error is numerical (exit 5) and the certificate is written before it."""
    with pytest.raises(NumericalError) as caught:
        check(folder)
    assert caught.value.exit_code == 5
    certificate = Certificate.read(folder)
    assert certificate is not None
    assert not certificate.passed
    names = [check.name for check in certificate.checks if not check.passed]
    assert f"check '{names[0]}' failed" in str(caught.value)
    return set(names)


def flip(name: str) -> Callable[[Weights], None]:
    """Turn the sign of the largest weight of a tensor."""

    def change(weights: Weights) -> None:
        flat = weights[name].view(-1)
        flat[flat.abs().argmax()] *= -1

    return change


def swap(first: str, second: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[first], weights[second] = weights[second].clone(), weights[first].clone()

    return change


def test_a_flipped_weight_is_seen_by_its_hash(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant(folder, flip(f"{MIXTRAL_LAYER}.experts.2.w3.weight"), remember=False)
    assert failed(folder) == {"files", "recipes", "plan", "all_experts", "logits"}


def test_a_flipped_weight_that_the_manifest_agrees_with(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant(folder, flip(f"{MIXTRAL_LAYER}.experts.2.w3.weight"))
    assert failed(folder) == {"recipes", "plan", "all_experts", "logits"}
    certificate = Certificate.read(folder)
    assert certificate is not None
    where = {check.name: check.where for check in certificate.checks}
    assert where["recipes"] == f"{MIXTRAL_LAYER}.experts.2.w3.weight"
    assert where["plan"] == where["all_experts"] == "layer 1"
    assert certificate.layers[0].plan < 5e-6


def test_a_weight_off_by_one_bit(copy_of: Callable[[str], Path]) -> None:
    """Too small for any sum to show: only the bits tell."""
    folder = copy_of("llama to mixtral")

    def change(weights: Weights) -> None:
        weights[f"{MIXTRAL_LAYER}.experts.7.w2.weight"].view(torch.int32)[5, 5] ^= 1

    plant(folder, change)
    assert failed(folder) == {"recipes"}


def test_swapped_rows_inside_an_expert(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")

    def change(weights: Weights) -> None:
        name = f"{MIXTRAL_LAYER}.experts.0.w1.weight"
        weights[name] = weights[name][[1, 0, *range(2, len(weights[name]))]].clone()

    plant(folder, change)
    assert failed(folder) == {"recipes", "plan", "all_experts", "logits"}


def test_swapped_experts_pass_with_all_experts_on_but_not_against_the_plan(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    for part in ("w1", "w2", "w3"):
        plant(folder, swap(f"{MIXTRAL_LAYER}.experts.0.{part}.weight", f"{MIXTRAL_LAYER}.experts.1.{part}.weight"))
    assert failed(folder) == {"recipes", "plan"}


def test_swapped_gate_and_up(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant(folder, swap(f"{MIXTRAL_LAYER}.experts.3.w1.weight", f"{MIXTRAL_LAYER}.experts.3.w3.weight"))
    assert failed(folder) == {"recipes", "plan", "all_experts", "logits"}


def test_a_wrong_scale(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    before = check(folder).layers[1].norm_ratio

    def change(weights: Weights) -> None:
        for expert in range(8):
            weights[f"{MIXTRAL_LAYER}.experts.{expert}.w2.weight"] *= 0.5

    plant(folder, change)
    assert failed(folder) == {"recipes", "plan", "all_experts", "logits"}
    certificate = Certificate.read(folder)
    assert certificate is not None
    row = certificate.layers[1]
    assert (row.plan, row.all_experts) == (pytest.approx(0.5, abs=1e-5), pytest.approx(0.5, abs=1e-5))
    assert row.norm_ratio == pytest.approx(before / 2, rel=1e-4)


def test_a_wrong_shared_expert(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama with a shared expert")
    plant(folder, lambda weights: weights["model.layers.0.shared_mlp.output_linear.weight"].mul_(2))
    assert failed(folder) == {"recipes", "plan", "all_experts", "logits"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")

    def change(weights: Weights) -> None:
        weights[f"{MIXTRAL_LAYER}.experts.0.w2.weight"][0, 0] = value

    plant(folder, change)
    assert {"recipes", "plan", "all_experts", "logits"} <= failed(folder)


def test_one_altered_copy_of_an_upcycled_expert(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama upcycled")
    plant(folder, flip(f"{MIXTRAL_LAYER}.experts.1.w1.weight"))
    assert failed(folder) == {"recipes", "plan", "upcycled", "logits"}


def test_an_altered_router_passes_everything_but_the_recipes(copy_of: Callable[[str], Path]) -> None:
    """Any router is a router; only the recipe knows which rows it should have."""
    folder = copy_of("llama to mixtral")
    plant(folder, flip(f"{MIXTRAL_LAYER}.gate.weight"))
    assert failed(folder) == {"recipes"}


def test_an_altered_attention_weight(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant(folder, flip("model.layers.2.self_attn.v_proj.weight"))
    assert failed(folder) == {"recipes", "carried", "input", "logits"}


def test_an_altered_layer_that_stayed_dense(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen3, odd layers")
    plant(folder, flip("model.layers.2.mlp.up_proj.weight"))
    assert failed(folder) == {"recipes", "carried", "plan", "logits"}


def test_a_missing_key(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")

    def change(weights: Weights) -> None:
        del weights["model.layers.1.input_layernorm.weight"]

    plant(folder, change)
    assert failed(folder) == {"recipes", "carried", "loading"}
    certificate = Certificate.read(folder)
    assert certificate is not None
    loading = next(check for check in certificate.checks if check.name == "loading")
    assert (loading.measured, loading.where) == (1, "missing model.layers.1.input_layernorm.weight")
    assert len(certificate.layers) == 1  # nothing is measured on a layer with drawn weights


def test_a_missing_expert(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")

    def change(weights: Weights) -> None:
        del weights[f"{MIXTRAL_LAYER}.experts.5.w2.weight"]

    plant(folder, change)
    assert failed(folder) == {"recipes", "loading"}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.rotary.weight"])
def test_an_unexpected_key(name: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant(folder, lambda weights: weights.update({name: torch.zeros(96, 64)}))
    assert failed(folder) == {"recipes", "loading"}


def test_a_vocabulary_of_another_size(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant_config(folder, vocab_size=130)
    assert failed(folder) == {"loading"}


@pytest.mark.parametrize(
    ("case", "keys", "checks"),
    [
        ("llama to mixtral", {"rope_theta": 1e6, "rope_parameters": None}, {"input", "logits"}),
        ("llama to mixtral", {"rms_norm_eps": 1e-2}, {"input", "logits"}),
        ("llama to mixtral", {"num_experts_per_tok": 3}, {"routing"}),
        ("llama to mixtral", {"hidden_act": "gelu"}, {"plan", "all_experts", "logits"}),
        ("qwen3, odd layers", {"norm_topk_prob": False}, {"plan"}),
        ("llama with a shared expert", {"attention_multiplier": 0.5}, {"input", "logits"}),
        ("llama with a shared expert", {"residual_multiplier": 0.9}, {"input", "logits"}),
        ("llama with a shared expert", {"logits_scaling": 1.01}, {"logits"}),
    ],
)
def test_a_wrong_config(case: str, keys: dict[str, Any], checks: set[str], copy_of: Callable[[str], Path]) -> None:
    """Every bit of every tensor is right and the model is still another one."""
    folder = copy_of(case)
    plant_config(folder, **keys)
    assert checks <= failed(folder)


@pytest.mark.parametrize("keys", [{"model_type": "nonesuch"}, {"hidden_size": "many"}])
def test_a_config_that_transformers_cannot_read(keys: dict[str, Any], copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama to mixtral")
    plant_config(folder, **keys)
    with pytest.raises(InputError, match=r"config\.json: stock transformers cannot read it: "):
        check(folder)
