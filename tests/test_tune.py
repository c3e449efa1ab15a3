"""Tuning: a stock folder in, one out; what trains is said, and what fails quietly elsewhere stops the run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismoe.cli import main
from prismoe.convert import convert
from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import make_plan
from prismoe.train.model import load_model
from prismoe.train.routers import Policy, attach_policy
from prismoe.train.routing import watch
from prismoe.train.scoring import token_losses
from prismoe.tune import rows as rows_module
from prismoe.tune import training, tune
from prismoe.tune.heldout import laid_out
from prismoe.tune.render import Rendered
from prismoe.tune.rows import Rows, open_tokenizer, read_rows
from prismoe.tune.text import TextReceipt, TuneText
from tests.training import tiny_moe
from tests.tuning import conversations, tiny_config

EXPERTS = ("experts gate", "experts up", "experts down")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return conversations(tmp_path_factory.mktemp("data") / "talk.jsonl")


@pytest.fixture(scope="module")
def tuned(source, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, tune(source, tiny_config(data), out=out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def read(source, config) -> Rows:
    from prismoe.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(source)
    return read_rows(config, checkpoint, open_tokenizer(checkpoint), offline=True, on_progress=lambda *_: None)


def test_a_weight_that_is_not_finite_is_named_before_anything_is_computed_with_it(source, data, tmp_path):
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = weights(damaged)
    tensors[name][3, 5] = float("inf")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name}: holds NaN or infinity"):
        tune(damaged, tiny_config(data), out=tmp_path / "out")


def test_a_stock_folder_comes_out_and_the_receipt_says_what_was_done(source, tuned):
    out, receipt = tuned
    assert receipt.state == "tuned"
    assert receipt.heldout_after["loss"] < receipt.heldout_before["loss"] - 0.3
    assert receipt.warnings == []
    found = json.loads(json.dumps(receipt.to_dict()))
    assert found["steps"] == receipt.steps == len(losses(out))
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".json", ".jsonl", ".jinja", ".safetensors"}
    for folder in (out, out / "model"):
        Manifest.read(folder).check(folder)
    before, after = weights(source), weights(out / "model")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert (out / "model/config.json").read_bytes() == (source / "config.json").read_bytes()
    load_model(out / "model")
    # The template that it was tuned with is its own one now.
    tokenizer = open_tokenizer(rows_module.Checkpoint.open(out / "model"))
    assert "ASSISTANT" in tokenizer.chat_template


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_the_table_names_every_parameter_once(source, tuned):
    _, receipt = tuned
    rows = {row["role"]: row for row in receipt.roles}
    assert set(rows) == {"embeddings", "attention", "router", *EXPERTS, "norms", "router noise"}
    counted = sum(row["parameters"] for row in rows.values()) - rows["router noise"]["parameters"]
    assert counted == sum(tensor.numel() for tensor in weights(source).values()) == receipt.parameters
    assert all(row["trainable"] == row["parameters"] and row["gradient_norm"] > 0 for row in rows.values())
    # Two layers, four experts of 64 x 32 each.
    assert [rows[role]["parameters"] for role in EXPERTS] == [2 * 4 * 64 * 32] * 3
    tokens = sum(map(sum, receipt.expert_tokens))
    assert tokens == 2 * 2 * 2 * receipt.tokens_per_epoch  # layers, top-2, epochs


def test_gradients_of_a_step_are_those_of_the_formula(source, data, tmp_path):
    """Mean loss over all supervised tokens of the batch, and each micro-batch's balance loss by its share of them."""
    config = tiny_config(
        data, batch_size=64, micro_batch_size=1, epochs=1, router="switch", arguments={"coefficient": 0.5}
    )
    receipt = tune(source, config, out=tmp_path / "out")
    assert receipt.steps == 1
    model = load_model(source)
    with watch(model) as routers:
        policy = attach_policy("switch", routers, arguments={"coefficient": 0.5})
        each = [laid_out([row]) for row in read(source, config).text.train]
        total = sum(int((batch["labels"] != -100).sum()) for batch in each)
        whole = 0.0
        for batch in each:
            labels = batch.pop("labels")
            loss = token_losses(model.train()(**batch, use_cache=False).logits, labels).sum() / total
            loss = loss + policy.loss() * (int((labels != -100).sum()) / total)
            loss.backward()
            whole += float(loss.detach())
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[1])
    assert line["loss"] + line["router_loss"] == pytest.approx(whole, rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    table = {row["role"]: row["gradient_norm"] for row in receipt.roles}
    layers = model.model.layers
    router = sum(float(layer.mlp.gate.weight.grad.double().square().sum()) for layer in layers) ** 0.5
    gate = sum(float(layer.mlp.experts.gate_up_proj.grad[:, :32].double().square().sum()) for layer in layers) ** 0.5
    assert table["router"] == pytest.approx(router, rel=1e-4)
    assert table["experts gate"] == pytest.approx(gate, rel=1e-4)


def test_a_packed_conversation_gets_the_loss_that_it_has_alone(source, data):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    packed = read(source, tiny_config(data, packing=True))
    rows = [packed.dataset[number] for number in range(2)]
    assert all(len(row["seq_lengths"]) > 1 for row in rows)
    assert sum(map(sum, packed.dataset["seq_lengths"])) == packed.tokens
    model = load_model(source)
    add_fused_lm_head(model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with torch.no_grad():
        together = model(**collate(rows), fused_lm_head=True).log_probs[0]
        begin = 0
        for row in rows:
            inside = 0
            for length in row["seq_lengths"]:
                ids = torch.tensor([row["input_ids"][inside : inside + length]])
                labels = torch.tensor([row["labels"][inside : inside + length]])
                alone = -token_losses(model(input_ids=ids, use_cache=False).logits, labels)[0]
                assert float((together[begin : begin + length - 1] - alone).abs().max()) < 1e-5
                # What follows a conversation is not predicted from its last token.
                assert begin + length > len(together) or float(together[begin + length - 1]) == 0
                inside, begin = inside + length, begin + length


def test_packing_and_micro_batches_learn_the_same_tokens(source, data):
    alone, packed = (read(source, tiny_config(data, packing=packing)) for packing in (False, True))
    assert packed.count < alone.count
    labels = [
        sorted(label for row in rows.dataset["labels"] for label in row if label != -100) for rows in (alone, packed)
    ]
    assert labels[0] == labels[1]
    rows_module.check_dataset(packed)


def test_freezing_the_routers_freezes_nothing_else(source, data, tmp_path):
    receipt = tune(source, tiny_config(data, router_training="freeze", epochs=1), out=tmp_path / "out")
    before, after = weights(source), weights(tmp_path / "out/model")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith("block_sparse_moe.gate.weight")}
    assert len(same) == 2
    rows = {row["role"]: row for row in receipt.roles}
    assert (rows["router"]["trainable"], rows["router noise"]["trainable"]) == (0, 0)
    assert all(rows[role]["trainable"] == rows[role]["parameters"] for role in EXPERTS)
    assert receipt.router == "noisy_topk + frozen"


def test_routers_first_then_everything(source, data, tmp_path):
    out = tmp_path / "out"
    config = tiny_config(data, router_training="warmup:3", epochs=1, save_every=1, warmup_ratio=0.0, max_steps=3)
    with pytest.raises(Exception, match="stopped by max_steps after step 3"):
        tune(source, config, out=out)
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    kept = {}
    for file in checkpoint.glob("*.safetensors"):
        kept |= load_file(file)
    before = dict(load_model(source).named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(kept[f"model.{name}"], tensor)}
    assert moved == {name for name in before if name.endswith("mlp.gate.weight")}
    receipt = tune(source, replace(config, max_steps=0), out=out)
    assert receipt.resumed_from == 3
    assert not any(torch.equal(weights(source)[name], tensor) for name, tensor in weights(out / "model").items())


# The quiet failures


def made(supervised: bool, ends: int) -> Rendered:
    ids_T = np.arange(3, 13, dtype=np.int32)
    return Rendered(ids_T, np.full(10, supervised), truncated=False, num_end_of_turn_supervised=ends)


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ([made(False, 0)], [made(True, 1)], "all labels are masked"),
        ([made(True, 0)], [made(True, 1)], "no end of turn is supervised"),
        ([made(True, 1)], [], "no conversation is held out"),
    ],
)
def test_text_that_teaches_nothing(data, train, heldout, message):
    text = TuneText(train, heldout, TextReceipt("made", "", 128, 0.1, 0, ()))
    rows = Rows(text=text, config=tiny_config(data), parents={}, files={}, template_sha256="")
    with pytest.raises(InputError, match=message):
        rows_module._check(rows, "talk.jsonl")


def loading(monkeypatch, change):
    """Tune a model that something was done to after it was read."""

    def load(folder):
        model = load_model(folder)
        change(model)
        return model

    monkeypatch.setattr(training, "load_model", load)


def test_experts_frozen_by_the_word_gate_are_told(source, data, tmp_path, monkeypatch):
    def freeze(model):  # as the published code does
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.requires_grad_(False)

    loading(monkeypatch, freeze)
    with pytest.raises(NumericalError, match=r"experts gate: 2 of 2 tensors are frozen, such as .*gate_up_proj"):
        tune(source, tiny_config(data, router_training="freeze"), out=tmp_path / "out")
    assert not (tmp_path / "out/model").exists()


def test_experts_that_the_loss_does_not_reach_are_told(source, data, tmp_path, monkeypatch):
    def cut(model):
        model.model.layers[1].mlp.experts.register_forward_hook(lambda module, inputs, output: output.detach())

    loading(monkeypatch, cut)
    with pytest.raises(NumericalError, match=r"experts (gate|up), step 1: the gradient of .*layers.1.* is zero"):
        tune(source, tiny_config(data), out=tmp_path / "out")


def test_a_balance_loss_that_is_off_is_told(source, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "attach_policy", lambda names, routers, arguments: Policy(routers))
    with pytest.raises(NumericalError, match="step 1: the router policy's loss is 0 although it was asked for"):
        tune(source, tiny_config(data), out=tmp_path / "out")
    monkeypatch.undo()
    config = tiny_config(data, epochs=1, router="switch", arguments={"coefficient": 0.0})
    receipt = tune(source, config, out=tmp_path / "off")
    assert receipt.warnings[0].startswith("no balance loss")


def test_a_router_that_does_not_run_is_told(source, data, tmp_path, monkeypatch):
    import types

    def replace_router(model):  # somebody's faster router in its place, which no hook sees
        layer = model.model.layers[0].mlp
        gate = layer.gate
        layer.forward = types.MethodType(
            lambda self, x: self.experts(x.flatten(0, 1), *reversed(gate.forward(x.flatten(0, 1))[1:])).view(x.shape),
            layer,
        )

    loading(monkeypatch, replace_router)
    with pytest.raises(NumericalError, match=r"layers.0.mlp.gate: the forward pass does not run this router"):
        tune(source, tiny_config(data), out=tmp_path / "out")


# Before the first byte


def test_a_dry_run_counts_and_writes_nothing(source, data, tmp_path):
    receipt = tune(source, tiny_config(data), out=tmp_path / "out", dry_run=True)
    assert (receipt.state, (tmp_path / "out").exists()) == ("checked", False)
    assert receipt.rows == 40 - receipt.text["files"][0]["heldout"]
    assert receipt.steps == 2 * -(-receipt.rows // 8)


def test_a_policy_whose_schedule_ends_with_the_run_or_not_at_all(source, data, tmp_path):
    """Its loss is below zero; the run of nine or ten steps ends with the model's own routing or does not begin."""
    config = tiny_config(data, router="dense_mi", arguments={"anneal": [1, 5]})
    assert tune(source, config, out=tmp_path / "out").last_loss > 0
    with pytest.raises(UsageError, match=r"tune\.anneal: experts are on until step 500 of"):
        tune(source, tiny_config(data, router="dense_mi"), out=tmp_path / "other", dry_run=True)


def test_a_finished_run_is_kept_and_another_one_refused(source, data, tuned):
    out, receipt = tuned
    again = tune(source, tiny_config(data, save_every=7), out=out)
    assert (again.state, again.heldout_after) == ("kept", receipt.heldout_after)
    with pytest.raises(ResourceError, match=r"tune.lr was 0.001, is 0.01"):
        tune(source, tiny_config(data, lr=1e-2), out=out)


def test_a_missing_library_is_one_line(source, data, tmp_path, monkeypatch):
    package = sys.modules["prismoe.tune.job"]
    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ResourceError, match=r"peft is not installed \(hint: pip install 'prismoe\[tune\]'\)"):
        tune(source, tiny_config(data, lora_rank=4), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_training": "warmup"}, "tune.router_training: 'warmup'; needed train, freeze or warmup:N"),
        ({"micro_batch_size": 3}, "3 does not divide batch_size 8"),
        ({"lora_rank": 2, "lora_targets": ()}, "nothing to adapt"),
        ({"lr": 0.0}, "tune.lr"),
    ],
)
def test_settings_that_cannot_be(data, changes, message):
    with pytest.raises(UsageError, match=message):
        tiny_config(data, **changes)


def test_longer_than_the_model_reads(source, data, tmp_path):
    with pytest.raises(InputError, match=r"256 positions; needed tune.seq_len 512 or more"):
        tune(source, tiny_config(data, seq_len=512), out=tmp_path / "out")


def test_several_processes_are_refused(source, data, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="2 processes"):
        tune(source, tiny_config(data), out=tmp_path / "out")


def test_real_conversations_on_a_cut_real_model(shared, tmp_path):
    parent = shared / "models/stories260K"
    plan = make_plan(parent, method="random", num_experts=4, top_k=2)
    convert(parent, plan, target="mixtral", out=tmp_path / "moe")
    config = tiny_config(
        shared / "sft/oasst_en_100.jsonl",
        **{"seq_len": 256, "max_refused": 0.5, "packing": True, "epochs": 1, "lr": 2e-3, "batch_size": 4},
    )
    receipt = tune(tmp_path / "moe", config, out=tmp_path / "out")
    assert receipt.text["files"][0]["rows"] == 100
    before, after = (found["loss"] for found in (receipt.heldout_before, receipt.heldout_after))
    assert after < before - 2 * receipt.heldout_before["standard_error"]


def test_bfloat16_and_recomputed_activations(source, data, tuned, tmp_path):
    """Compared with full precision where weights are still the same: loss and gradients of the first step."""
    config = tiny_config(data, epochs=1, precision="bf16", recompute=True)
    receipt, plain = tune(source, config, out=tmp_path / "out"), tuned[1]
    assert receipt.first_loss == pytest.approx(plain.first_loss, rel=2e-2)
    assert receipt.first_loss != plain.first_loss
    norms = [{row["role"]: row["gradient_norm"] for row in one.roles} for one in (receipt, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    assert receipt.heldout_after["loss"] < receipt.heldout_before["loss"]


def test_the_command_stops_goes_on_and_prints_a_table(source, data, tmp_path, capsys):
    settings = {"source": str(source), "out": str(tmp_path / "out"), "tune": {"data": str(data), "seq_len": 128}}
    settings["tune"] |= {"template": "vicuna_v1_1", "batch_size": 8, "epochs": 1, "coefficient": 0.02, "heldout": 0.1}
    path = tmp_path / "tune.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    assert main(["tune", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "checked"
    assert main(["tune", str(path), "--max-steps", "2"]) == 75
    assert "stopped by max_steps after step 2 of" in capsys.readouterr().err
    assert main(["tune", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("who trains", "experts gate", "ends of turn learned", "resumed from step"))
    assert main(["tune", str(path), "tune.coeficient=1"]) == 2


def test_what_the_shipped_configs_miss_is_told_with_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    configs = Path(__file__).parents[1] / "configs"
    monkeypatch.chdir(tmp_path)
    assert main(["tune", str(configs / "sft-stories260k.yaml"), "--dry-run"]) == 3
    told = capsys.readouterr().err
    assert f"source: no such folder; needed runs/stories260k/train/model (hint: prismoe run {configs}/stories" in told
    assert main(["tune", str(configs / "sft-llama-moe.yaml"), "source=x/train/model", "--dry-run"]) == 3
    assert "hint: prismoe run CONFIG --out x makes it" in capsys.readouterr().err
    assert main(["tune", str(configs / "sft-llama-moe.yaml"), "--dry-run"]) == 3  # the data, before a model is fetched
    assert "tune.data: no file deita-6k.jsonl (hint: looked for from" in capsys.readouterr().err
