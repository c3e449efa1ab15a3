"""`recover`: its arithmetic against float64 NumPy, the folder it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismoe.calibrate.states import States
from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.data.shards import Domain
from prismoe.errors import InputError, InterruptedRun, ResourceError, UsageError
from prismoe.plan import make_plan
from prismoe.recover import RecoverConfig, Recovered, recover
from prismoe.recover.block import Block, down_keys, layer_keys
from prismoe.recover.choice import choose_top_k
from prismoe.recover.learn import Lesson, measure, squared_error
from prismoe.targets import find_target
from prismoe.train.model import load_model
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.verify.stock import find_router
from tests.tiny import tiny_dense
from tests.training import domain_folder

SMALL: dict[str, Any] = {"seq_len": 16, "tokens": 16 * 40, "batch_tokens": 64, "epochs": 3, "lr": 5e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dense(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def domain(dense: Path) -> Domain:
    return Domain.open(domain_folder(dense.parent / "text", tokenizer=dense / "tokenizer.json", documents=12))


@pytest.fixture(scope="module")
def moe(dense: Path) -> Path:
    return mixture(dense, "mixtral")


def mixture(dense: Path, target: str, *, top_k: int = 2, **arguments: Any) -> Path:
    out = dense.parent / f"{target}-{top_k}-{'-'.join(map(str, arguments.values()))}"
    if not out.exists():
        plan = make_plan(dense, top_k=top_k, **{"num_experts": 4, "router_std": 0.3, **arguments})
        convert(dense, plan, target=target, out=out, pad_to=8)
    return out


def work(dense: Path, moe: Path, domain: Domain, out: Path, **changed: Any) -> Recovered:
    own = {name: changed.pop(name) for name in ("dry_run", "force", "on_progress") if name in changed}
    config = RecoverConfig(**{**SMALL, **changed})
    return recover(dense, moe, config=config, domains=[domain], out=out, **own)


def same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


# The arithmetic


class Reference:
    """A Mixtral layer in float64: softmax over the kept logits, experts of silu(gate)·up."""

    def __init__(self, moe: Path, layer: int) -> None:
        found = Checkpoint.open(moe)
        block = f"model.layers.{layer}.block_sparse_moe"
        self.router_ED = np.float64(found.array(f"{block}.gate.weight"))
        self.gate, self.down, self.up = (
            np.stack([np.float64(found.array(f"{block}.experts.{e}.w{n}.weight")) for e in range(4)]) for n in (1, 2, 3)
        )

    def forward(self, x_SD: Any, k: int) -> tuple[Any, Any, Any]:
        logits_SE = x_SD @ self.router_ED.T
        chosen_SK = np.argsort(-logits_SE, axis=1)[:, :k]
        kept = np.exp(np.take_along_axis(logits_SE, chosen_SK, 1))
        weights_SK = kept / kept.sum(1, keepdims=True)
        out_SKD = np.stack([[self.expert(x, e) for e in chosen] for x, chosen in zip(x_SD, chosen_SK, strict=True)])
        return (weights_SK[:, :, None] * out_SKD).sum(1), chosen_SK, (weights_SK, out_SKD)

    def expert(self, x_D: Any, e: int) -> Any:
        g = self.gate[e] @ x_D
        return self.down[e] @ (g / (1 + np.exp(-g)) * (self.up[e] @ x_D))


def draws(tokens: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(tokens, 64)), rng.normal(size=(tokens, 64))


def test_error_and_gradient_are_those_of_the_formula(moe: Path) -> None:
    target = find_target("mixtral")
    keys = layer_keys(target, 1, num_experts=4, train="router+experts")
    block = Block(Checkpoint.open(moe), 1, keys, device=torch.device("cpu"))
    x_SD, y_SD = draws(9)
    error = squared_error(block, *(torch.tensor(a, dtype=torch.float32) for a in (x_SD, y_SD)), energy=3.0)
    error.backward()
    truth = Reference(moe, 1)
    out_SD, chosen_SK, (weights_SK, out_SKD) = truth.forward(x_SD, 2)
    assert error.item() == pytest.approx(((out_SD - y_SD) ** 2).sum() / (9 * 3.0), rel=1e-5)
    # ∂/∂logit of Σ_k w_k (r·o_k): w_k (r·o_k - Σ_j w_j r·o_j), r = 2 (out - y) / (S·energy)
    r_SD = 2 * (out_SD - y_SD) / (9 * 3.0)
    slope_SK = np.einsum("sd,skd->sk", r_SD, out_SKD)
    slope_SK = weights_SK * (slope_SK - (weights_SK * slope_SK).sum(1, keepdims=True))
    router_ED, down_EDW = np.zeros_like(truth.router_ED), np.zeros_like(truth.down)
    for s, (chosen, slope, weights) in enumerate(zip(chosen_SK, slope_SK, weights_SK, strict=True)):
        for e, value, weight in zip(chosen, slope, weights, strict=True):
            router_ED[e] += value * x_SD[s]
            g = truth.gate[e] @ x_SD[s]
            h = g / (1 + np.exp(-g)) * (truth.up[e] @ x_SD[s])
            down_EDW[e] += weight * np.outer(r_SD[s], h)
    router, _, down = block.parameters
    np.testing.assert_allclose(router.grad, router_ED, atol=2e-5 * np.abs(router_ED).max())
    np.testing.assert_allclose(down.grad, down_EDW, atol=2e-5 * np.abs(down_EDW).max())


def test_only_the_router_learns_where_that_is_asked_for(moe: Path) -> None:
    keys = layer_keys(find_target("mixtral"), 0, num_experts=4, train="router")
    block = Block(Checkpoint.open(moe), 0, keys, device=torch.device("cpu"))
    assert [tuple(parameter.shape) for parameter in block.parameters] == [(4, 64)]
    assert [name for name, p in block.model.named_parameters() if p.requires_grad] == ["model.layers.0.mlp.gate.weight"]


def lesson(folder: Path, x_SD: Any, y_SD: Any) -> Lesson:
    files = []
    for name, values in (("x", x_SD), ("y", y_SD)):
        files.append(States(folder / name, shape=(1, *values.shape), dtype=torch.float32, made=False))
        files[-1].write(0, torch.tensor(values, dtype=torch.float32)[None])
    return Lesson(*files, np.arange(len(x_SD)), torch.device("cpu"))


def test_what_is_measured_is_what_the_formula_gives(moe: Path, tmp_path: Path) -> None:
    block = Block(Checkpoint.open(moe), 0, [], device=torch.device("cpu"))
    x_SD, y_SD = draws(40)
    found = measure(block, lesson(tmp_path, x_SD, y_SD), top_k=2)
    truth = Reference(moe, 0)
    for k in range(1, 5):
        out_SD, chosen_SK, _ = truth.forward(x_SD, k)
        factor = 1.0 if k == 2 else (out_SD * y_SD).sum() / (out_SD**2).sum()
        factor = factor if factor > 0 else 1.0
        error = np.linalg.norm(factor * out_SD - y_SD) / np.linalg.norm(y_SD)
        assert found.errors[k - 1] == pytest.approx(error, rel=1e-5)
        assert found.factors[k - 1] == pytest.approx(factor, rel=1e-4)
        if k == 2:
            load = np.bincount(chosen_SK.ravel(), minlength=4) / chosen_SK.size
            np.testing.assert_allclose(found.load, load)
    scores = np.exp(x_SD @ truth.router_ED.T)
    shares = -np.sort(-scores / scores.sum(1, keepdims=True), axis=1)
    np.testing.assert_allclose(found.mass, shares.cumsum(1).mean(0), rtol=1e-5)


# The folder


CASES = {
    "mixtral": ("mixtral", {}, {}),
    "router": ("mixtral", {}, {"train": "router", "lr": 0.05}),
    "shared": ("granitemoeshared", {"shared": 32}, {}),
    "sigmoid": ("glm4_moe", {"shared": 16}, {}),
    "gated shared": ("qwen2_moe", {"shared": 32}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_fall_and_the_folder_holds_what_the_receipt_says(
    dense: Path, domain: Domain, tmp_path: Path, case: str
) -> None:
    target, arguments, changed = CASES[case]
    moe = mixture(dense, target, **arguments)
    found = work(dense, moe, domain, tmp_path / "out", **changed)
    assert [layer.layer for layer in found.layers] == [0, 1]
    for layer in found.layers:
        assert layer.after < layer.before, layer
        assert layer.top_k == 2 == found.learning_k
    before, after = Checkpoint.open(moe), Checkpoint.open(tmp_path / "out")
    learned = {key for n in (0, 1) for key in layer_keys(find_target(target), n, num_experts=4, train=found.train)}
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        same = before.array(name).tobytes() == after.array(name).tobytes()
        assert same == (name not in learned), name
    assert before.config == after.config
    assert json.loads((tmp_path / "out" / "recovery.json").read_bytes())["layers"][1]["after"] == found.layers[1].after
    # The stock classes with both folders' weights: layer 0 sees the same, so its error is that of the FFN's output.
    ids = held_out_of_learning(domain, found)
    own, parent = (outputs(load_model(folder), ids) for folder in (tmp_path / "out", dense))
    assert distance(own[0][0], parent[0][0]) == pytest.approx(found.layers[0].after, rel=1e-4)
    # Layer 1 was asked for what leads from its own stream to the dense model's.
    output, state = own[1]
    assert distance(output, output + parent[1][1] - state) == pytest.approx(found.layers[1].after, rel=1e-3)


def held_out_of_learning(domain: Domain, found: Recovered) -> torch.Tensor:
    from prismoe.calibrate.text import draw_text

    text = draw_text(
        [domain], weights="proportional", seq_len=16, max_tokens=640, sample_tokens=0, start_token=False, seed=0
    )
    windows = found.held_tokens // 16
    return torch.from_numpy(text.ids(len(text) - windows, len(text)))


def outputs(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer what its FFN gives, routed and shared experts together, and the state behind it."""
    found = []
    for layer in model.model.layers:
        seen: list[torch.Tensor] = []
        parts = [getattr(layer, "block_sparse_moe", None) or layer.mlp, getattr(layer, "shared_mlp", None), layer]
        for part in filter(None, parts):
            part.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        found.append(seen)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [(torch.stack(parts).sum(0), state) for *parts, state in found]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_each_layer_by_itself(dense: Path, moe: Path, domain: Domain, tmp_path: Path) -> None:
    found = work(dense, moe, domain, tmp_path / "out", inputs="dense")
    parent, seen = load_model(dense), []
    parent.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
    with torch.no_grad():
        parent(input_ids=held_out_of_learning(domain, found), use_cache=False)
        output = load_model(tmp_path / "out").model.layers[1].mlp(seen[0])
    assert distance(output, seen[1]) == pytest.approx(found.layers[1].after, rel=1e-4)


def test_one_seed_gives_one_result_however_it_is_stopped(
    dense: Path, moe: Path, domain: Domain, tmp_path: Path
) -> None:
    whole = work(dense, moe, domain, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if "layer 1" in what and done > total // 2 + 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        work(dense, moe, domain, tmp_path / "stopped", on_progress=stop)
    assert (tmp_path / "stopped" / "scratch" / "layer-00000.safetensors").is_file()
    first = (tmp_path / "stopped" / "scratch" / "layer-00000.safetensors").stat().st_mtime_ns
    seen: list[str] = []
    again = work(dense, moe, domain, tmp_path / "stopped", on_progress=lambda what, *_: seen.append(what))
    assert first
    assert not any("layer 0" in what for what in seen)
    assert again.layers == whole.layers
    same_files(tmp_path / "whole", tmp_path / "stopped")
    assert work(dense, moe, domain, tmp_path / "whole").state == "already complete"
    other = work(dense, moe, domain, tmp_path / "other", seed=1)
    assert other.layers != whole.layers


def test_dense_layers_between_do_not_lose_the_thread(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "model", "qwen3", num_hidden_layers=4)
    domain = Domain.open(domain_folder(tmp_path / "text", tokenizer=dense / "tokenizer.json", documents=12))
    moe = mixture(dense, "qwen3_moe", layers="odd")
    whole = work(dense, moe, domain, tmp_path / "whole")
    assert [layer.layer for layer in whole.layers] == [1, 3]

    def stop(what: str, done: int, total: int) -> None:
        if "layer 3" in what:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        work(dense, moe, domain, tmp_path / "stopped", on_progress=stop)
    names = {path.name for path in (tmp_path / "stopped" / "scratch").iterdir()}
    # Never more of the text's states than the disk was asked for: what leaves layer 3 is written while it is learned.
    streams = {f"{stream}-{layer}.bin" for stream in ("hidden", "own") for layer in (2, 3, 4)}
    assert names - {"layer-00001.safetensors"} == streams | {"inputs.bin", "outputs.bin"}
    work(dense, moe, domain, tmp_path / "stopped")
    same_files(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("budget", [None, 3])
def test_copies_are_left_as_they_are(dense: Path, domain: Domain, tmp_path: Path, budget: int | None) -> None:
    moe = mixture(dense, "mixtral", method="upcycle")
    found = work(dense, moe, domain, tmp_path / "out", budget=budget)
    assert [layer.learned for layer in found.layers] == [False, False]
    assert [layer.factor for layer in found.layers] == [1.0, 1.0]
    assert found.learning_k == (budget or 2)
    assert max(layer.after for layer in found.layers) < 1e-5
    assert not any("did not lower" in text for text in found.warnings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (moe / "model.safetensors").read_bytes()


def test_what_did_not_learn_another_k_is_as_it_was_but_for_its_factor(
    dense: Path, moe: Path, domain: Domain, tmp_path: Path
) -> None:
    found = work(dense, moe, domain, tmp_path / "out", budget=3, lr=3.0)
    assert [layer.learned for layer in found.layers] == [False, False]
    assert max(layer.after for layer in found.layers) < 1.1
    before, after = Checkpoint.open(moe), Checkpoint.open(tmp_path / "out")
    scaled = {key for n in (0, 1) for key in down_keys(find_target("mixtral"), n, num_experts=4)}
    for name in before.tensors:
        old, new = before.array(name), after.array(name)
        factor = float((new * old).sum() / (old * old).sum()) if name in scaled else 1.0
        np.testing.assert_allclose(new, factor * old, rtol=1e-5, err_msg=name)
        assert (name in scaled) == (factor != 1.0)
    ids = held_out_of_learning(domain, found)
    own, parent = (outputs(load_model(folder), ids) for folder in (tmp_path / "out", dense))
    assert distance(own[0][0], parent[0][0]) == pytest.approx(found.layers[0].after, rel=1e-4)


def test_a_budget_by_layer_where_the_architecture_has_one(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "model", "hunyuan_v1_dense", num_hidden_layers=2)
    domain = Domain.open(domain_folder(tmp_path / "text", tokenizer=dense / "tokenizer.json", documents=12))
    moe = mixture(dense, "hunyuan_v1_moe")
    first = work(dense, moe, domain, tmp_path / "first", error=9.0)
    assert [layer.top_k for layer in first.layers] == [1, 1]
    # Between the errors of the two layers with one expert: one of them needs more, the other does not.
    rows = [layer.errors for layer in first.layers]
    limit = (rows[0][0] + rows[1][0]) / 2
    found = work(dense, moe, domain, tmp_path / "out", error=limit)
    ks = [layer.top_k for layer in found.layers]
    assert sorted(ks)[0] == 1 < sorted(ks)[1]
    assert tuple(ks) == choose_top_k(rows, error=limit, by_layer=True)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["moe_topk"] == ks
    assert "num_experts_per_tok" not in config
    assert not (tmp_path / "out" / "moe.plan").exists()
    assert [warning.partition(":")[0] for warning in found.warnings[-2:]] == [
        f"layer {ks.index(1)} gives a token one expert",
        "moe.plan was left behind",
    ]
    model = load_model(tmp_path / "out")
    assert [find_router(layer)[0].top_k for layer in model.model.layers] == ks
    own, parent = (outputs(one, held_out_of_learning(domain, found)) for one in (model, load_model(dense)))
    assert distance(own[0][0], parent[0][0]) == pytest.approx(found.layers[0].after, rel=1e-4)
    settings = PretrainConfig(steps=2, seq_len=16, batch_size=2, warmup_steps=0, router="frozen", device="cpu")
    trained = pretrain(tmp_path / "out", settings, domains=[domain], out=tmp_path / "trained")
    assert trained is not None
    assert json.loads((trained.model / "config.json").read_bytes())["moe_topk"] == ks
    spent = work(dense, moe, domain, tmp_path / "spent", budget=1.5)
    assert sum(layer.top_k for layer in spent.layers) <= 3


def test_one_k_for_all_where_it_has_only_that(dense: Path, moe: Path, domain: Domain, tmp_path: Path) -> None:
    wide = work(dense, moe, domain, tmp_path / "wide", budget=3.7)
    assert wide.learning_k == 3
    assert {layer.top_k for layer in wide.layers} <= {1, 2, 3}
    k = wide.layers[0].top_k
    config = json.loads((tmp_path / "wide" / "config.json").read_bytes())
    assert config["num_experts_per_tok"] == k
    ids = held_out_of_learning(domain, wide)
    own, parent = (outputs(load_model(folder), ids) for folder in (tmp_path / "wide", dense))
    assert distance(own[0][0], parent[0][0]) == pytest.approx(wide.layers[0].after, rel=1e-4)


# What is refused


def test_what_is_wrong_is_told_before_the_first_step(
    dense: Path, moe: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    other = tiny_dense(tmp_path / "other", num_hidden_layers=2, seed=4)
    with pytest.raises(InputError, match="was made of another checkpoint"):
        recover(other, moe, config=RecoverConfig(**SMALL), domains=[domain], out=out)
    with pytest.raises(InputError, match="a dense model"):
        work(dense, dense, domain, out)
    with pytest.raises(UsageError, match=r"recover\.budget: 5"):
        work(dense, moe, domain, out, budget=5)
    with pytest.raises(UsageError, match=r"recover\.error: a budget and a largest error"):
        work(dense, moe, domain, out, budget=2, error=0.1)
    with pytest.raises(UsageError, match="top_k = 1"):
        work(dense, moe, domain, out, budget=1)
    with pytest.raises(UsageError, match=r"recover\.tokens"):
        work(dense, moe, domain, out, tokens=16)
    with pytest.raises(UsageError, match="no sequence of 16"):
        work(dense, moe, domain, out, tokens=8)
    monkeypatch.setattr("prismoe.room.shutil.disk_usage", lambda path: (2000, 1000, 1000))
    with pytest.raises(ResourceError, match="disk free"):
        work(dense, moe, domain, out)
    assert not out.exists()


def test_a_dry_run_estimates_and_writes_nothing(dense: Path, moe: Path, domain: Domain, tmp_path: Path) -> None:
    found = work(dense, moe, domain, tmp_path / "out", dry_run=True)
    assert found.state == "dry run"
    assert found.layers == ()
    # Four times the hidden states of the text, the layer files and the folder are on disk at once.
    states = 4 * found.tokens * 64 * 4
    assert found.disk_bytes > states + (moe / "model.safetensors").stat().st_size
    assert found.tokens == 640
    assert not (tmp_path / "out").exists()
