"""Experts removed by a trace: the masked whole on every target, the choice by formulas, later stages take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.convert import convert
from prismoe.densify import densify
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import Plan, make_plan
from prismoe.routing.choice import choose_experts
from prismoe.routing.masked import compare_masked
from prismoe.routing.prune_experts import prune_experts
from prismoe.routing.record import Kind, RoutingTrace
from prismoe.routing.similarity import expert_blocks
from prismoe.routing.trace import trace
from prismoe.train.pretrain import pretrain
from prismoe.train.settings import PretrainConfig
from tests.golden import compute, load
from tests.test_densify import CASES, mixture
from tests.tiny import tiny_dense
from tests.training import domain_folder

PER_TARGET = ("mixtral", "shared", "dense layers", "granitemoe", "hybrid", "swa", "qwen2_moe", "glm4_moe", "flex_olmo")
PER_TARGET += ("ernie4_5_moe", "cohere2_moe", "hunyuan_v1_moe", "tied bfloat16")


def counted(model: Path, load_GLE: Any, *, kinds: tuple[Kind, ...] = (), top_k: int = 2) -> RoutingTrace:
    """A trace of `model` with these loads, and importances that rank experts the other way round."""
    load_GLE = np.array(load_GLE, np.int64)
    checkpoint = Checkpoint.open(model)
    num_domains, num_layers, num_experts = load_GLE.shape
    coactivation = np.stack([np.diag(row) for row in load_GLE.sum(axis=0)])
    return RoutingTrace(
        domains=tuple(f"domain {number}" for number in range(num_domains)),
        kinds=kinds or ("train",) * num_domains,
        layers=tuple(expert_blocks(checkpoint)),
        num_experts=num_experts,
        top_k=top_k,
        tokens_G=load_GLE[:, 0].sum(axis=-1) // top_k,
        load_GLE=load_GLE,
        importance_GLE=load_GLE.max() + 1.0 - load_GLE,
        coactivation_LEE=coactivation,
        entropy_GL=np.zeros((num_domains, num_layers)),
        norm_GL=np.zeros((num_domains, num_layers)),
        sample_tokens_GS=np.zeros((num_domains, 0), np.int32),
        sample_experts_GSLK=np.zeros((num_domains, 0, num_layers, top_k), np.int16),
        sample_weights_GSLK=np.zeros((num_domains, 0, num_layers, top_k), np.float32),
        provenance={"model": {"fingerprint": checkpoint.fingerprint}},
    )


def uneven(model: Path) -> RoutingTrace:
    """Loads drawn anew for each layer, so that layers lose different experts."""
    blocks = expert_blocks(Checkpoint.open(model))
    count = next(iter(blocks.values())).num_experts
    draw = np.random.default_rng(0)
    return counted(model, [[draw.multinomial(2000, draw.dirichlet(np.ones(count))) for _ in blocks] for _ in range(2)])


@pytest.mark.parametrize("case", PER_TARGET)
def test_what_is_left_is_the_whole_model_with_the_others_masked(tmp_path: Path, case: str) -> None:
    _, moe = mixture(tmp_path, case)
    blocks = expert_blocks(Checkpoint.open(moe))
    count = next(iter(blocks.values())).num_experts
    if biased := [name for name in Checkpoint.open(moe).tensors if name.endswith("e_score_correction_bias")]:
        state = load_file(moe / "model.safetensors")
        for name in biased:  # a removed expert must not come back by its bias
            state[name] += np.linspace(0.3, -0.1, count, dtype=np.float32)
        save_file(state, moe / "model.safetensors", metadata={"format": "pt"})
        Manifest.remove(moe)
    made = prune_experts(moe, trace=uneven(moe), out=tmp_path / "out", keep=count - 1)
    assert made.proof is not None
    assert made.proof["ffn"] <= 1e-6
    assert made.proof["logits"] <= 1e-5
    assert (made.num_experts, made.proof["ties"]) == (count - 1, 0)
    whole, left = Checkpoint.open(moe), Checkpoint.open(tmp_path / "out")
    expert = sum(3 * 64 * block.width(0) + 64 + bool(biased) for block in blocks.values())
    assert made.parameters_saved == expert
    assert made.parameters == sum(int(np.prod(info.shape)) for info in left.tensors.values())
    model, misfits = load(tmp_path / "out")
    assert not any(misfits.values())
    assert np.isfinite(compute(model)[0]).all()
    assert {key for key in whole.config if whole.config[key] != left.config[key]} <= {
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    }
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.parents["source"] == whole.fingerprint
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (moe / "tokenizer.json").read_bytes()


def test_the_proof_sees_what_is_wrong(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "mixtral")
    prune_experts(moe, trace=uneven(moe), out=tmp_path / "out", keep=6)
    plan = Manifest.read(tmp_path / "out")
    assert plan is not None
    Manifest.remove(tmp_path / "out")
    kept = {int(layer): row for layer, row in plan.config["kept"].items()}
    state = load_file(tmp_path / "out/model.safetensors")
    at = "model.layers.2.block_sparse_moe"

    def compared() -> None:
        compare_masked(
            Checkpoint.open(moe), Checkpoint.open(tmp_path / "out"), kept, tokens=64, on_progress=lambda *_: None
        )

    compared()
    for name in (f"{at}.experts.1.w2.weight", f"{at}.gate.weight"):
        wrong = {**state, name: np.ascontiguousarray(state[name][::-1])}
        save_file(wrong, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NumericalError, match=r"masked|go to other experts"):
            compared()


def test_equal_logits_are_ties_and_no_fault(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, num_experts=4, router="zero"), out=tmp_path / "moe")
    made = prune_experts(tmp_path / "moe", trace=uneven(tmp_path / "moe"), out=tmp_path / "out", keep=3)
    assert made.proof is not None
    assert made.proof["ffn"] <= 1e-6


def test_each_domain_counts_alike_and_benchmarks_do_not(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "granitemoe")
    rows = [[10, 30, 20, 40], [600, 100, 200, 100], [0, 0, 0, 1000]]
    found = counted(moe, [[row] * 3 for row in rows], kinds=("train", "train", "benchmark"))
    choice = choose_experts(found, keep=2, threshold=None, criterion="load")
    shares = np.array([[0.1, 0.3, 0.2, 0.4], [0.6, 0.1, 0.2, 0.1]]).mean(axis=0)
    np.testing.assert_allclose(choice.mean_LE, np.tile(shares, (3, 1)))
    assert choice.kept.tolist() == [[0, 3]] * 3  # .35 .2 .2 .25
    np.testing.assert_allclose(choice.removed_GL, np.repeat([[0.5], [0.3], [0.0]], 3, axis=1))
    assert choose_experts(found, keep=3, threshold=None, criterion="load").kept.tolist() == [[0, 1, 3]] * 3
    assert (
        choose_experts(found, keep=2, threshold=None, criterion="importance").kept.tolist() == [[1, 3]] * 3
    )  # .194 .274 .259 .273


def test_a_threshold_keeps_what_the_neediest_layer_needs(tmp_path: Path) -> None:
    _, moe = mixture(tmp_path, "granitemoe")
    found = counted(moe, [[[700, 100, 100, 100], [300, 300, 300, 100], [999, 1, 0, 0]]])
    made = prune_experts(moe, trace=found, out=tmp_path / "out", threshold=0.5, dry_run=True)
    assert (made.num_experts, made.layers[2].kept) == (3, (0, 1, 2))
    assert made.warnings[0].startswith("1 to 3 experts of a layer reach the threshold and every layer keeps 3")
    assert [row.removed_share for row in made.layers] == [0.1, 0.1, 0.0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"all 4 experts have 0\.01 of a uniform share"):
        prune_experts(moe, trace=found, out=tmp_path / "out", threshold=0.01)


def test_virtual_groups_go_together(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    plan = make_plan(parent, method="upcycle", num_experts=6, granularity=2)
    convert(parent, plan, out=tmp_path / "moe")
    found = counted(tmp_path / "moe", [[[50, 10, 40, 40, 30, 30]] * 3])
    made = prune_experts(tmp_path / "moe", trace=found, out=tmp_path / "out", keep=4)
    assert made.layers[0].kept == (0, 1, 2, 3)  # 60, 80 and 60: of equal ones the first
    with pytest.raises(UsageError, match="a multiple of 2: its virtual groups"):
        prune_experts(tmp_path / "moe", trace=found, out=tmp_path / "x", keep=3)


def test_later_stages_take_the_folder(tmp_path: Path) -> None:
    """Traced, pruned, trained, traced and pruned again; densify gives the dense model of the neurons that are left."""
    parent, moe = mixture(tmp_path, "mixtral")
    text = domain_folder(tmp_path / "words", tokenizer=moe / "tokenizer.json")
    first = trace(moe, [text], seq_len=32)
    made = prune_experts(moe, trace=first, out=tmp_path / "six", keep=6, domains=[text], seq_len=32)
    assert made.perplexity["words"].keys() == {"before", "after"}
    assert made.perplexity["words"]["before"] != made.perplexity["words"]["after"]
    load_LE = first.load_GLE[0]
    for row, layer in zip(load_LE, made.layers, strict=True):
        assert min(row[list(layer.kept)]) >= max(row[list(layer.removed)])
        np.testing.assert_allclose(layer.removed_share, row[list(layer.removed)].sum() / row.sum())
    settings = PretrainConfig(steps=2, seq_len=32, batch_size=2, warmup_steps=0, max_epochs=50, threads=1)
    pretrain(tmp_path / "six", settings, domains=[text], weights={"words": 1.0}, out=tmp_path / "train")
    again = trace(tmp_path / "train/model", [text], seq_len=32)
    assert again.num_experts == 6
    assert prune_experts(tmp_path / "train/model", trace=again, out=tmp_path / "four", keep=4).num_experts == 4
    receipt = densify(tmp_path / "six", out=tmp_path / "dense")
    assert receipt.warnings == ("the plan holds 72 of the parent's 96 neurons",)
    for number, layer in enumerate(Plan.load(tmp_path / "six/moe.plan").layers):
        assert layer is not None
        neurons = np.sort(layer.experts.ravel())
        own, found = Checkpoint.open(parent).ffn(number), Checkpoint.open(tmp_path / "dense").ffn(number)
        assert np.array_equal(found.up_FD, own.up_FD[neurons])
        assert np.array_equal(found.down_DF, own.down_DF[:, neurons])


def test_draws_by_number_leave_the_plan_behind(tmp_path: Path) -> None:
    parent = tiny_dense(tmp_path / "parent")
    convert(parent, make_plan(parent, method="upcycle", num_experts=4, noise=0.01), out=tmp_path / "moe")
    made = prune_experts(tmp_path / "moe", trace=uneven(tmp_path / "moe"), out=tmp_path / "out", keep=3)
    assert "moe.plan was left behind" in made.warnings[-1]
    assert not (tmp_path / "out/moe.plan").exists()


def test_wrong_input_is_one_line_before_any_work(tmp_path: Path) -> None:
    parent, moe = mixture(tmp_path, "granitemoe")
    good, out = uneven(moe), tmp_path / "out"
    with pytest.raises(InputError, match="model_type 'granite' has no router that we know"):
        prune_experts(parent, trace=good, out=out, keep=3)
    with pytest.raises(InputError, match="no trace beside it"):
        prune_experts(moe, out=out, keep=3)
    convert(parent, make_plan(parent, num_experts=4, seed=1), target="granitemoe", out=tmp_path / "other")
    with pytest.raises(InputError, match="a trace of another model"):
        prune_experts(tmp_path / "other", trace=good, out=out, keep=3)
    for keep in (0, 1, 4, 5):
        with pytest.raises(UsageError, match=f"keep is {keep}; needed 2 to 3: 2 are chosen for a token"):
            prune_experts(moe, trace=good, out=out, keep=keep)
    with pytest.raises(UsageError, match="one number of experts for all layers"):
        prune_experts(moe, trace=good, out=out, keep=[3, 2, 3])
    with pytest.raises(UsageError, match="neither keep nor threshold"):
        prune_experts(moe, trace=good, out=out)
    with pytest.raises(UsageError, match="both set"):
        prune_experts(moe, trace=good, out=out, keep=3, threshold=0.5)
    assert not out.exists()
    _, glm = mixture(tmp_path / "glm", "glm4_moe")
    config = json.loads((glm / "config.json").read_text())
    (glm / "config.json").write_text(json.dumps({**config, "n_group": 2}))
    Manifest.remove(glm)
    with pytest.raises(UsageError, match=r"n_group: 2; needed 1: no groups of experts"):
        prune_experts(glm, trace=uneven(glm), out=out, keep=3)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, moe = mixture(tmp_path, "granitemoe")
    (tmp_path / "trace").mkdir()
    uneven(moe).save(tmp_path / "trace/trace.safetensors")
    assert main(["prune-experts", str(moe), "keep=3", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verb"], found["num_experts"], found["state"]) == ("prune-experts", 3, "written")
    assert json.loads((tmp_path / "out/pruning.json").read_text())["layers"] == found["layers"]
    assert main(["prune-experts", str(moe), "keep=3", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "already complete" in out
    assert "4 → 3 experts a layer by load" in out
    assert main(["prune-experts", str(moe), "kep=3", "--out", str(tmp_path / "x")]) == 2
    assert "did you mean keep?" in capsys.readouterr().err
    assert set(CASES) >= set(PER_TARGET)
