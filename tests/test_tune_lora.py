"""Adapters: experts really train, the merged folder is model and adapter, and a merge that is not is told."""

import pytest
import torch
from safetensors.torch import load_file

from prismoe.errors import NumericalError
from prismoe.train.experts import use_experts
from prismoe.train.model import load_model
from prismoe.train.routing import watch
from prismoe.tune import tune
from prismoe.tune.lora import adapted, merge
from prismoe.tune.watch import EXPERTS, Roles
from tests.training import tiny_moe
from tests.tuning import conversations, tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe", "granitemoeshared")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return conversations(tmp_path_factory.mktemp("data") / "talk.jsonl")


def test_adapters_train_experts_and_are_merged_into_a_stock_folder(source, data, tmp_path):
    out = tmp_path / "out"
    receipt = tune(source, tiny_config(data, lora_rank=4, lr=5e-3), out=out)
    assert receipt.heldout_after["loss"] < receipt.heldout_before["loss"] - 0.1
    rows = {row["role"]: row for row in receipt.roles}
    # A [4, in] and B [out, 4] for each of 4 experts in 2 layers; down is [64, 32], gate and up [32, 64] with one A.
    assert rows["experts down"]["trainable"] == 2 * 4 * 4 * (64 + 32)
    assert rows["experts gate"]["trainable"] == rows["experts up"]["trainable"] == 2 * 4 * 4 * 32
    assert rows["experts gate and up, A"]["trainable"] == 2 * 4 * 4 * 64
    assert all(rows[role]["gradient_norm"] > 0 for role in ("experts gate", "experts up", "experts down"))
    assert {role for role, row in rows.items() if not row["trainable"]} == {"embeddings", "norms"}
    assert rows["router"]["trainable"] == rows["router"]["parameters"]
    assert receipt.merged["logits"] < 1e-5
    assert receipt.merged["unchanged_used"] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name or "embed" in name}
    # The change that the receipt tells is the one on disk.
    name = next(name for name in before if "layers.1" in name and "input_linear" in name and "shared" not in name)
    other = name.replace("input_linear", "output_linear")
    change = [
        float(sum((after[n][e] - before[n][e]).double().square().sum() for n in (name, other)).sqrt())
        / float(sum(before[n][e].double().square().sum() for n in (name, other)).sqrt())
        for e in range(4)
    ]
    assert receipt.merged["change"][1] == pytest.approx(change, rel=1e-3)


@pytest.fixture
def trained(source):
    """An adapter after one step, with the ids that it saw."""
    model = load_model(source)
    use_experts(model)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with watch(model) as routers:
        wrapped = adapted(model, tiny_config("talk.jsonl", lora_rank=4), routers)
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2).step()
        yield wrapped, ids, routers


def test_a_merge_that_changes_nothing_is_told(trained, monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    wrapped, ids, _ = trained
    monkeypatch.setattr(ParamWrapper, "merge", lambda self, **_: None)
    with pytest.raises(NumericalError, match="merging changed it otherwise than its adapter says"):
        merge(wrapped, probe_BT=ids, load_LE=[[1] * 4] * 2)


def test_an_expert_that_had_tokens_and_did_not_change_is_told(trained):
    wrapped, ids, _ = trained
    for name, parameter in wrapped.named_parameters():
        if "layers.1" in name and "experts" in name and "lora_B" in name:
            with torch.no_grad():  # columns r·E of B: those of expert 2 stand E apart
                parameter.view(len(parameter), -1, 4)[:, :, 2] = 0
    with pytest.raises(NumericalError, match="1 experts that had tokens did not change"):
        merge(wrapped, probe_BT=ids, load_LE=[[1] * 4] * 2)


def test_an_adapter_that_does_not_train_is_told(trained):
    wrapped, _, routers = trained
    for name, parameter in wrapped.named_parameters():
        if "experts" in name and "lora_B" in name:
            parameter.requires_grad_(False)
    with pytest.raises(NumericalError, match=r"experts (gate|up|down): no adapter that trains"):
        Roles(wrapped, routers).check_trainable(["router"], adapted=("attention", "shared expert", *EXPERTS))


def test_attention_alone_leaves_the_experts_alone(source, data, tmp_path):
    config = tiny_config(data, lora_rank=2, lora_targets=("attention",), epochs=1, router_training="freeze")
    receipt = tune(source, config, out=tmp_path / "out")
    assert {row["role"] for row in receipt.roles if row["trainable"]} == {"attention"}
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out/model"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {n for n in before if "attn" in n}
