"""Released LLaMA-MoE checkpoints, rebuilt small from the documented layout, against an evaluation of their formula."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import header_bytes
from prismoe.cli import main
from prismoe.convert.layout import recipe_tensor
from prismoe.errors import InputError, PrismoeError, UsageError
from prismoe.importing import Imported, import_checkpoint
from prismoe.importing.llama_moe import layout, mixtral_recipes, read_llama_moe
from prismoe.target import padded
from tests.golden import load
from tests.llama_moe import LAYERS, RELEASED, SMALL, D, E, K, Reference, documented, released, weights
from tests.training import domain_folder


def text(tmp: Path, tokenizer: Path) -> Path:
    return domain_folder(tmp / "text", tokenizer=tokenizer / "tokenizer.json", documents=80)


def run(tmp: Path, source: Path, **options: Any) -> Imported:
    settings = {"domains": [tmp / "text"], "seq_len": 64, "fit_tokens": 4096, "heldout_tokens": 512, **options}
    return import_checkpoint(source, out=tmp / "moe", **settings)


def windows(tmp: Path, length: int = 64, most: int = 8) -> torch.Tensor:
    """The held-out windows: the start token and `length` - 1 ids, evenly spaced."""
    tokens = np.fromfile(tmp / "text/heldout.tokens", "<u2").astype(np.int64)
    available = len(tokens) // (length - 1)
    chosen = sorted({int(x) for x in np.linspace(0, available - 1, min(most, available))})
    return torch.stack([torch.tensor([1, *tokens[n * (length - 1) : (n + 1) * (length - 1)].tolist()]) for n in chosen])


def routers(folder: Path) -> dict[int, torch.Tensor]:
    made = Checkpoint.open(folder)
    return {
        layer: torch.from_numpy(np.array(made.array(f"model.layers.{layer}.block_sparse_moe.gate.weight"), np.float32))
        for layer in range(LAYERS)
    }


@pytest.mark.parametrize(
    ("experts", "top_k", "scale", "count", "parameters"),
    [(8, 2, 4.0, 1091, 6_740_514_816), (16, 2, 8.0, 1859, 6_742_618_112), (16, 4, 4.0, 1859, 6_742_618_112)],
)
def test_the_released_sizes(
    tmp_path: Path, experts: int, top_k: int, scale: float, count: int, parameters: int
) -> None:
    """Released indices have 1091 keys with 8 experts, 1859 with 16; headers of full size in a sparse file."""
    names = documented(experts)
    assert len(names) == count
    assert sum(math.prod(shape) for name, shape in names.items() if "inv_freq" not in name) == parameters
    config = {
        **RELEASED,
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "num_experts": experts, "num_selects": top_k},
        **{"size_experts": [[11008 // experts] * experts] * 32, "score_scale_factor": scale},
        **{"max_position_embeddings": 4096, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = header_bytes(((name, "BF16", shape) for name, shape in names.items()), metadata={})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(math.prod(shape) for shape in names.values()))
    checkpoint = Checkpoint.open(tmp_path)
    model = read_llama_moe(checkpoint)
    assert layout(model) == names
    assert (model.num_experts, model.top_k, model.scales) == (experts, top_k, (scale,) * 32)
    width = padded(11008 // experts)
    made = {
        key: recipe_tensor(recipe, checkpoint.tensors, key=key)[1]
        for key, recipe in mixtral_recipes(checkpoint, model, None, width=width).items()
    }
    assert len(made) == 3 + 32 * (2 + 4 + 1 + 3 * experts)
    assert made["model.layers.31.block_sparse_moe.experts.0.w2.weight"] == (4096, width)
    assert made["model.layers.31.block_sparse_moe.gate.weight"] == (experts, 4096)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size_experts": [[24, 16, 40, 16], [24] * 4]},
        {"score_scale_factor": [2.0, 4.0]},
        {"score_scale_factor": 1.7},
    ],
    ids=["plain", "unequal experts", "scale by layer", "odd scale"],
)
def test_the_import_is_the_original_with_the_fitted_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stock Mixtral on the written folder against the formula on the original tensors, both with the fitted rows."""
    source = released(tmp_path / "source", **changes)
    text(tmp_path, source)
    receipt = run(tmp_path, source)
    model, misfits = load(tmp_path / "moe")
    assert not any(misfits.values())
    reference = Reference({**SMALL, **changes}, weights({**SMALL, **changes}))
    reference.routers = routers(tmp_path / "moe")
    ids = windows(tmp_path)[0]
    wanted = reference(ids)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    assert float((logits - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()) / 7)
    assert receipt.bit_exact == (changes.get("score_scale_factor") != 1.7)
    assert (receipt.num_experts, receipt.top_k, receipt.made_from) == (E, K, "llama_moe")
    assert sum("inv_freq" in name for name in receipt.dropped) == LAYERS
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("curve", [0.02, 1.0])
def test_what_the_fit_changes_is_measured(tmp_path: Path, curve: float) -> None:
    source = released(tmp_path / "source", curve=curve)
    text(tmp_path, source)
    measured = run(tmp_path, source).measured
    assert measured is not None
    original, fitted = (Reference(SMALL, weights(SMALL, curve=curve)) for _ in range(2))
    fitted.routers = routers(tmp_path / "moe")
    losses, common, same, count = np.zeros(2), np.zeros(LAYERS), np.zeros(LAYERS), 0
    for ids in windows(tmp_path):
        losses += [float(cross_entropy(model(ids)[:-1], ids[1:], reduction="sum")) for model in (original, fitted)]
        count += len(ids)
        for layer, x in enumerate(original.inputs):
            pairs = zip(*(model.router(x, layer).topk(K).indices for model in (original, fitted)), strict=True)
            shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in pairs]
            common[layer] += sum(shared) / K
            same[layer] += sum(number == K for number in shared)
    assert measured["heldout_tokens"] == count
    perplexity = np.exp(losses / (count - len(windows(tmp_path))))
    assert measured["perplexity_original"] == pytest.approx(perplexity[0], rel=1e-4)
    assert measured["perplexity_fitted"] == pytest.approx(perplexity[1], rel=1e-4)
    # A tie that rounding breaks may go either way for a token or two.
    np.testing.assert_allclose(measured["agreement"], common / count, atol=2 / count)
    np.testing.assert_allclose(measured["same_choice"], same / count, atol=2 / count)
    if curve < 0.1:  # W₂·tanh(W₁·x) is W₂·W₁·x there
        assert measured["mean_agreement"] > 0.99
        assert measured["perplexity_fitted"] == pytest.approx(measured["perplexity_original"], rel=0.01)
    else:
        assert 0.6 < measured["mean_agreement"] < 0.99


def test_a_straight_network_gives_its_own_product(tmp_path: Path) -> None:
    source = released(tmp_path / "source", curve=0.001)
    text(tmp_path, source)
    run(tmp_path, source, ridge=1e-9)
    found = weights(SMALL, curve=0.001)
    for layer, rows in routers(tmp_path / "moe").items():
        first, second = (found[f"model.layers.{layer}.mlp.gate.gate_network.{n}.weight"] for n in (0, 2))
        product = second @ first
        product -= product.mean(axis=0)  # what no softmax sees
        assert np.abs(rows.numpy() - product).max() <= 1e-3 * np.abs(product).max()


def test_a_linear_router_needs_no_text(tmp_path: Path) -> None:
    source = released(tmp_path / "source", gate_network="linear")
    receipt = import_checkpoint(source, out=tmp_path / "moe")
    assert receipt.measured is None
    config = {**SMALL, "gate_network": "linear"}
    ids = torch.arange(3, 60)
    with torch.no_grad():
        logits = load(tmp_path / "moe")[0](input_ids=ids[None], use_cache=False).logits[0]
    wanted = Reference(config, weights(config))(ids)
    assert float((logits - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()) / 7)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights(SMALL).items()}
    source = released(tmp_path / "source", tensors=tensors, torch_dtype="bfloat16")
    text(tmp_path, source)
    assert run(tmp_path, source).bit_exact
    made = Checkpoint.open(tmp_path / "moe")
    for e in range(E):
        stored = made.array(f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight")
        own = tensors[f"model.layers.1.mlp.calculator.experts.weight_down.{e}"]
        assert stored.shape == (D, 32)
        assert (stored[:, :24] == own * ml_dtypes.bfloat16(2)).all()
        assert not stored[:, 24:].any()
    assert made.tensors["model.layers.0.block_sparse_moe.gate.weight"].dtype == "BF16"


def test_a_stopped_import_continues_with_the_rows_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = released(tmp_path / "source")
    text(tmp_path, source)
    run(tmp_path, source)
    shutil.copytree(tmp_path / "moe", tmp_path / "first")
    assert run(tmp_path, source).state == "already complete"
    shutil.rmtree(tmp_path / "moe")
    with monkeypatch.context() as patched:
        patched.setattr("prismoe.importing.write_output", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source)
    assert {path.name for path in (tmp_path / "moe").iterdir()} == {"prismoe.json", "routers.fitted"}
    with monkeypatch.context() as patched:  # the rows are there: no second fit
        patched.setattr("prismoe.importing.fit.fit_routers", None)
        run(tmp_path, source)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "moe").iterdir()}
    assert "routers.fitted" not in names
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "moe" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "llama", "auto_map": None}, "model_type 'llama'; needed llama_moe"),
        ({"gate_type": "SwitchBalancedGate"}, "gate_type: 'SwitchBalancedGate'; needed 'TopKBalancedNoisyGate'"),
        ({"gate_use_softmax": False}, "gate_use_softmax: False; needed True"),
        ({"add_weight_norm": True}, "add_weight_norm: True; needed False"),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps: missing"),
        ({"num_selects": 5}, "num_selects: 5 of 4 experts"),
        ({"size_experts": [[24] * E]}, "size_experts: "),
        ({"score_scale_factor": [2.0]}, "score_scale_factor: "),
        ({"gate_network": "deep"}, "gate_network: 'deep'; needed 'mlp' or 'linear'"),
    ],
)
def test_a_config_that_mixtral_cannot_hold(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    source = released(tmp_path / "source", tensors=weights(SMALL), **changes)
    with pytest.raises(PrismoeError) as raised:
        import_checkpoint(source, out=tmp_path / "moe")
    assert found in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "moe").exists()


def test_tensors_and_files_that_do_not_fit(tmp_path: Path) -> None:
    found = weights(SMALL)
    key = "model.layers.1.mlp.calculator.experts.weight_down.2"
    missing = released(tmp_path / "missing", tensors={name: array for name, array in found.items() if name != key})
    with pytest.raises(InputError, match=f"missing tensor {key}"):
        import_checkpoint(missing, out=tmp_path / "moe")
    extra = released(tmp_path / "extra", tensors={**found, "model.layers.0.mlp.extra": found[key]})
    with pytest.raises(InputError, match=r"unexpected tensor model\.layers\.0\.mlp\.extra"):
        import_checkpoint(extra, out=tmp_path / "moe")
    turned = released(tmp_path / "turned", tensors={**found, key: found[key].T.copy()})
    with pytest.raises(InputError, match=r"shape \[24, 64\]; needed \[64, 24\]"):
        import_checkpoint(turned, out=tmp_path / "moe")
    pickled = released(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickle weights .* safe_serialization"):
        import_checkpoint(pickled, out=tmp_path / "moe")
    with pytest.raises(UsageError, match="tanh networks; needed text"):
        import_checkpoint(released(tmp_path / "source"), out=tmp_path / "moe")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = released(tmp_path / "source")
    text(tmp_path, source)
    command = ["import", str(source), f"domains=[{tmp_path / 'text'}]", "seq_len=64", "fit_tokens=2048"]
    assert main([*command, "--out", str(tmp_path / "moe"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verb"], found["state"]) == ("import", "written")
    assert len(found["measured"]["agreement"]) == LAYERS
    assert main([*command, "--out", str(tmp_path / "moe")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["import", str(source), "--out", str(tmp_path / "x")]) == 2
    assert "text to fit linear ones on" in capsys.readouterr().err
