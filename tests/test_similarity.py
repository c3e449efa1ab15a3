"""How alike experts are: against formulas in float64 on the files, on copies, partitions and moved weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.convert import convert
from prismoe.errors import InputError
from prismoe.folder import unchecked
from prismoe.plan import make_plan
from prismoe.routing import neurons
from prismoe.routing.similarity import Similarity, similarity
from tests.tiny import tiny_dense

LAYER = "model.layers.1.block_sparse_moe"


def partition(folder: Path, **plan: Any) -> tuple[Path, Path]:
    parent = tiny_dense(folder / "parent")
    made = make_plan(parent, **{"num_experts": 4, **plan})
    convert(parent, made, target="granitemoeshared" if "shared" in plan else "mixtral", out=folder / "moe")
    return parent, folder / "moe"


def expert(state: dict[str, np.ndarray[Any, Any]], number: int, *, scale: float = 1.0) -> list[np.ndarray[Any, Any]]:
    """Gate [W, D], up [W, D] and down [W, D] of an expert of layer 1 of a Mixtral, in float64."""
    gate, down, up = (state[f"{LAYER}.experts.{number}.w{part}.weight"].astype(np.float64) for part in (1, 2, 3))
    return [gate, up, down.T / scale]


def test_cosines_are_those_of_the_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, moe = partition(tmp_path)
    whole = similarity(moe)
    state = load_file(moe / "model.safetensors")
    flat = np.stack([np.concatenate(expert(state, e, scale=2.0)).ravel() for e in range(4)])  # E/K is folded into down
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(whole.cosine_LEE[1], flat @ flat.T, atol=1e-12)
    monkeypatch.setattr(neurons, "BLOCK", 200)  # three rows at a time
    np.testing.assert_allclose(similarity(moe).cosine_LEE, whole.cosine_LEE, atol=1e-12)
    np.testing.assert_allclose(similarity(moe).matched_LEE, whole.matched_LEE, atol=1e-6)


def test_matched_neurons_are_looked_for_everywhere(tmp_path: Path) -> None:
    """Against every pair of neurons one by one; the zero neurons that fill up a width count nowhere."""
    _, moe = partition(tmp_path)
    found = similarity(moe).matched_LEE[1]
    state = load_file(moe / "model.safetensors")
    rows = [np.concatenate(expert(state, e, scale=2.0), axis=1)[:24] for e in range(4)]  # 96 neurons in 4, 32 stored
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
    wanted = [[(a @ b.T).max(axis=1).mean() for b in unit] for a in unit]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - found.T)[0, 1] > 1e-4  # it has a direction


def test_a_permuted_copy_is_found_by_its_neurons_alone(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, method="upcycle", num_experts=3), out=tmp_path / "moe")
    state = load_file(tmp_path / "moe/model.safetensors")
    order = np.random.default_rng(0).permutation(96)
    for part, axis in ((1, 0), (2, 1), (3, 0)):
        name = f"{LAYER}.experts.2.w{part}.weight"
        state[name] = np.ascontiguousarray(np.take(state[name], order, axis=axis))
    save_file(state, tmp_path / "moe/model.safetensors", metadata={"format": "pt"})
    with unchecked():  # the files are not what the manifest says
        found = similarity(tmp_path / "moe")
    assert found.cosine_LEE[1, 0, 2] < 0.2
    np.testing.assert_allclose(found.matched_LEE[1], 1.0, atol=1e-6)
    assert [(row.layer, row.first, row.second) for row in found.duplicates] == [
        *((0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 0, 2), (2, 1, 2)),
    ]


@pytest.mark.parametrize(
    ("plan", "target", "absorb"),
    [
        ({"num_experts": 4}, "mixtral", False),
        ({"num_experts": 6, "top_k": 3, "scale": 1.7}, "mixtral", False),
        ({"method": "upcycle", "num_experts": 3}, "mixtral", False),
        ({"method": "upcycle", "num_experts": 4, "granularity": 2}, "mixtral", False),
        ({"num_experts": 4, "shared": 32}, "granitemoeshared", False),
        ({"num_experts": 4, "shared": 32}, "mixtral", True),
    ],
)
def test_an_untouched_expert_is_its_dense_neurons(
    tmp_path: Path, plan: dict[str, Any], target: str, absorb: bool
) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, **plan), target=target, absorb=absorb, out=tmp_path / "moe")
    found = similarity(tmp_path / "moe", dense=parent)
    assert found.dense_LE is not None
    np.testing.assert_allclose(found.dense_LE, 1.0, atol=1e-6)
    np.testing.assert_allclose(found.cosine_LEE.diagonal(axis1=1, axis2=2), 1.0)


def test_drift_and_the_dense_cosine_follow_what_was_added(tmp_path: Path) -> None:
    parent, moe = partition(tmp_path, num_experts=4)
    state = load_file(moe / "model.safetensors")
    before = {name: array.copy() for name, array in state.items()}
    draw = np.random.default_rng(1)
    for part in (1, 2, 3):
        name = f"{LAYER}.experts.2.w{part}.weight"
        state[name] += (0.05 * draw.standard_normal(state[name].shape) * (state[name] != 0)).astype(np.float32)
    state[f"{LAYER}.gate.weight"] *= 1.5
    (tmp_path / "now").mkdir()
    for path in moe.iterdir():
        (tmp_path / "now" / path.name).write_bytes(path.read_bytes())
    save_file(state, tmp_path / "now/model.safetensors", metadata={"format": "pt"})
    with unchecked():
        found = similarity(tmp_path / "now", dense=parent, before=moe)
    now, old = (np.concatenate(expert(part, 2, scale=2.0)) for part in (state, before))
    assert found.drift_LE is not None
    assert found.router_drift_L is not None
    assert found.dense_LE is not None
    wanted = np.zeros((3, 4))
    wanted[1, 2] = np.linalg.norm(now - old) / np.linalg.norm(old)
    np.testing.assert_allclose(found.drift_LE, wanted, rtol=1e-9)
    np.testing.assert_allclose(found.router_drift_L, [0, 0.5, 0], atol=1e-6)
    cosine = (now * old).sum() / np.linalg.norm(now) / np.linalg.norm(old)
    np.testing.assert_allclose(found.dense_LE[1, 2], cosine, rtol=1e-6)


def test_without_a_plan_copies_are_held_against_the_whole_ffn(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, method="upcycle", num_experts=2), out=tmp_path / "up")
    (tmp_path / "up/moe.plan").unlink()
    found = similarity(tmp_path / "up", dense=parent).dense_LE
    assert found is not None
    np.testing.assert_allclose(found, 1.0)
    convert(parent, make_plan(parent, num_experts=4), out=tmp_path / "cut")
    (tmp_path / "cut/moe.plan").unlink()
    with pytest.raises(InputError, match=r"no moe\.plan.*experts of all 96 neurons \(they have 32\)"):
        similarity(tmp_path / "cut", dense=parent)


def test_a_file_keeps_everything_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    parent, moe = partition(tmp_path)
    found = similarity(moe, dense=parent, before=moe, out=tmp_path / "run/similarity")
    again = Similarity.open(tmp_path / "run")
    assert again.to_bytes() == found.to_bytes() == (tmp_path / "run/similarity/similarity.safetensors").read_bytes()
    assert again.to_dict() == found.to_dict()
    assert similarity(moe, dense=parent, before=moe, out=tmp_path / "run/similarity").to_bytes() == found.to_bytes()
    json.dumps(replace(found, drift_LE=np.full((3, 4), np.nan)).to_dict(), allow_nan=False)
    broken = replace(found, drift_LE=np.zeros((2, 4)))
    (tmp_path / "broken.safetensors").write_bytes(broken.to_bytes())
    with pytest.raises(InputError, match=r"drift_LE: shape \[2, 4\]; needed \[3, 4\]"):
        Similarity.open(tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match="not a similarity"):
        Similarity.open(moe / "model.safetensors")


def test_models_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    parent, moe = partition(tmp_path)
    with pytest.raises(InputError, match="model_type 'llama' has no router that we know"):
        similarity(parent)
    with pytest.raises(InputError, match="is not the checkpoint that the mixture was cut from"):
        similarity(moe, dense=tiny_dense(tmp_path / "other", seed=1))
    convert(parent, make_plan(parent, num_experts=6, top_k=3), out=tmp_path / "six")
    with pytest.raises(InputError, match=r"a mixtral of 6 experts 32 wide in 3 layers; needed an earlier checkpoint"):
        similarity(moe, before=tmp_path / "six")


def test_the_verb_tells_dense_from_earlier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent, moe = partition(tmp_path)
    assert main(["similarity", str(moe), str(parent), str(moe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["provenance"]["dense"]["fingerprint"] == Checkpoint.open(parent).fingerprint
    assert found["drift_LE"] == [[0.0] * 4] * 3
    assert main(["similarity", str(moe), str(parent)]) == 0
    out = capsys.readouterr().out
    assert "duplicates (cosine above 0.999): none" in out
    assert "1.0000" in out
    assert main(["similarity", str(moe), "keep=3"]) == 2
