"""Training against a loop written by hand, stock folders in and out, and everything that must be refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prismoe.checkpoint import Checkpoint
from prismoe.data.mixture import Mixture
from prismoe.data.shards import Domain
from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.train.engine import Engine
from prismoe.train.engine.layout import Layout
from prismoe.train.metrics import read_metrics
from prismoe.train.model import load_model, place_model, save_model
from prismoe.train.origin import Origin
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.schedule import learning_rate
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

SHORT = {"steps": 4, "seq_len": 32, "batch_size": 6, "warmup_steps": 2, "lr": 1e-3, "max_epochs": 50.0, "threads": 1}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe")


@pytest.fixture(scope="module")
def domains(moe, tmp_path_factory):
    base = tmp_path_factory.mktemp("domains")
    return [domain_folder(base / name, tokenizer=moe / "tokenizer.json", seed=i) for i, name in enumerate("ab")]


def alone():
    return Engine(Layout(), rank=0, device=torch.device("cpu"))


def by_hand(folder, config, domains, *, steps):
    """A plain float32 loop: whole batches, unfused AdamW, the loss by definition: weights, losses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mixture = Mixture(
        [Domain.open(domain) for domain in domains],
        weights="proportional",
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_epochs=50,
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=config.steps, peak=config.lr, warmup_steps=config.warmup_steps, min_ratio=0.1
            )
        batch = mixture.batch(step)
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        output = model(input_ids=ids, output_router_logits=model.config.model_type != "llama")
        log_probability = output.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        keep = labels[:, 1:] != -100
        loss = -(log_probability * keep).sum() / keep.sum()
        losses.append(loss.item())
        for logits in output.router_logits if hasattr(output, "router_logits") else []:
            top = logits.topk(2).indices.flatten()
            share = torch.bincount(top, minlength=4) / len(top)
            loss = loss + 0.01 * 4 * (share * logits.softmax(-1).mean(0)).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_training_is_the_plain_loop(tmp_path, domains, moe, family):
    source = moe if family == "mixtral" else tiny_dense(tmp_path / "dense")
    config = PretrainConfig(**SHORT, experts="grouped_mm")  # what the model by hand computes with
    trained = pretrain(source, config, domains=domains, out=tmp_path / "out")
    expected, losses = by_hand(source, config, domains, steps=4)
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["event"] == "step"]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    found = load_model(trained.model).state_dict()
    for name, tensor in expected.items():
        # AdamW moves every weight by about lr a step: a wrong sign, rate, decay group or clip would show at 1e-4.
        assert (found[name] - tensor).abs().max() < 2e-5, name


def test_the_function_of_the_experts_changes_the_order_of_sums_only(tmp_path, domains, moe):
    losses = {}
    for experts in ("auto", "sorted", "eager", "grouped_mm"):
        trained = pretrain(moe, PretrainConfig(**SHORT, experts=experts), domains=domains, out=tmp_path / experts)
        used = "sorted" if experts == "auto" else experts
        assert trained.runtime == {"experts": used, "fast_matmul": False, "keep_memory": False}
        lines = read_metrics(tmp_path / experts / "metrics.jsonl")
        losses[experts] = [line["loss"] for line in lines if line["event"] == "step"]
        assert losses[experts] == pytest.approx(losses["auto"], rel=1e-5)
    assert losses["sorted"] == losses["auto"]


def test_micro_batches_and_bf16_change_the_arithmetic_only(tmp_path, domains):
    source = tiny_dense(tmp_path / "dense")
    losses = {}
    for name, change in {"whole": {}, "micro": {"micro_batch_size": 2}, "bf16": {"precision": "bf16"}}.items():
        config = PretrainConfig(**{**SHORT, **change})
        pretrain(source, config, domains=domains, out=tmp_path / name)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses["micro"] == pytest.approx(losses["whole"], rel=1e-6)
    assert losses["bf16"] == pytest.approx(losses["whole"], rel=2e-2)
    assert losses["bf16"] != pytest.approx(losses["whole"], rel=1e-6), "autocast was off"


def test_from_the_config_alone_it_learns_the_grammar(tmp_path, domains):
    source = tiny_dense(tmp_path / "dense")
    (source / "model.safetensors").unlink()
    settings = {**SHORT, "steps": 60, "seq_len": 64, "batch_size": 8, "lr": 5e-3, "warmup_steps": 5}
    with pytest.raises(InputError, match="no weights") as caught:
        pretrain(source, PretrainConfig(**settings), domains=domains, out=tmp_path / "out")
    assert "pretrain.init=random" in str(caught.value)
    config = PretrainConfig(**settings, init="random", eval_every=30)
    trained = pretrain(source, config, domains=domains, out=tmp_path / "out")
    for name in "ab":
        # Random weights know nothing (ln 128 = 4.85); the grammar's own entropy is about ln 4 = 1.39.
        assert trained.heldout_before[name] == pytest.approx(np.log(128), abs=0.1)
        assert trained.heldout_after[name] < 3.0
    assert trained.router is None
    evals = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["event"] == "eval"]
    assert [line["step"] for line in evals] == [0, 30, 60]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoeshared"])
def test_a_mixture_comes_out_as_it_went_in(tmp_path, domains, model_type):
    """Same file names, tensor names, shapes and config bytes; every weight has moved."""
    source = tiny_moe(tmp_path / "source", model_type)
    trained = pretrain(source, PretrainConfig(**SHORT, eval_every=2), domains=domains, out=tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(trained.model / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (trained.model / name).read_bytes() == (source / name).read_bytes(), name
    assert trained.router == "switch"
    assert 0 < trained.router_gradient_norm[0] <= trained.router_gradient_norm[1]
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    layers = [layer for line in lines if line["event"] == "eval" for layer in line["load"]]
    assert len(layers) == 3 * 2
    assert all(sum(layer) == pytest.approx(1.0, abs=1e-4) for layer in layers)
    # 2 layers, coefficient 0.01: balanced gives 0.02, collapsed 0.08; it is not part of the loss.
    assert all(0.0199 < line["router_loss"] < 0.08 for line in lines if line["event"] == "step")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoeshared", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_read_back_bit_for_bit(tmp_path, model_type, dtype):
    if model_type == "llama":
        source = tiny_dense(tmp_path / "source", dtype=dtype, tie_word_embeddings=True)
    else:
        source = tiny_moe(tmp_path / "source", model_type)
        path = source / "model.safetensors"
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    origin, engine = Origin.folder(Checkpoint.open(source)), alone()
    model = place_model(origin, engine)
    for name, tensor in load_model(source).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    files = save_model(model, origin, tmp_path / "out", engine=engine)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(getattr(torch, dtype))), name
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert set(written) == set(load_file(source / "model.safetensors"))


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, moe):
    model = load_model(moe)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: has a value that is not finite"):
        save_model(model, Origin.folder(Checkpoint.open(moe)), tmp_path / "out", engine=alone())
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_left_alone(tmp_path, domains, moe):
    config = PretrainConfig(**SHORT)
    first = pretrain(moe, config, domains=domains, out=tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "prismoe.json"}
    again = pretrain(moe, config, domains=domains, out=tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in stamps if path.is_file()} == {
        path: stamp for path, stamp in stamps.items() if path.is_file()
    }
    assert (again.resumed_from, again.seconds) == (4, None)
    assert again.heldout_after == first.heldout_after
    json.dumps(again.to_dict(), allow_nan=False)
    with pytest.raises(ResourceError, match=r"holds a different job \(pretrain\.lr was 0\.001, is 0\.002\)") as caught:
        pretrain(moe, PretrainConfig(**{**SHORT, "lr": 2e-3}), domains=domains, out=tmp_path / "out")
    assert caught.value.exit_code == 4
    forced = pretrain(moe, PretrainConfig(**{**SHORT, "lr": 2e-3}), domains=domains, out=tmp_path / "out", force=True)
    assert forced.heldout_after != first.heldout_after


def test_dry_run_checks_and_writes_nothing(tmp_path, domains, moe):
    assert pretrain(moe, PretrainConfig(**SHORT), domains=domains, out=tmp_path / "out", dry_run=True) is None
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_training(tmp_path, domains, moe):
    def refused(error, source=moe, **change):
        with pytest.raises(error) as caught:
            pretrain(source, PretrainConfig(**{**SHORT, **change}), domains=domains, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert refused(InputError, seq_len=300).endswith("config.json: 256 positions; needed seq_len 300 or more")
    other = shutil.copytree(moe, tmp_path / "other")
    (other / "tokenizer.json").write_bytes((moe / "tokenizer.json").read_bytes() + b"\n")
    assert "prepared with another tokenizer than the model's" in refused(InputError, source=other)
    small = tiny_dense(tmp_path / "small", vocab_size=100)
    assert "ids up to 127; needed below vocab_size 100" in refused(InputError, source=small)
    assert "over max_epochs 1 " in refused(UsageError, steps=400, max_epochs=1.0)
    assert "of memory available; needed about" in refused(ResourceError, batch_size=600_000_000, max_epochs=1e12)
    assert "unknown 'noisy'" in refused(UsageError, router="noisy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "pretrain.steps: 0: no steps; needed 1 or more, or pretrain.tokens"),
        ({"lr": float("nan")}, "pretrain.lr: nan: Input should be"),
        ({"betas": (0.9, 1.0)}, "pretrain.betas: (0.9, 1.0): Input should be less than 1"),
        ({"precision": "fp16"}, "pretrain.precision: 'fp16': Input should be 'fp32' or 'bf16'"),
        ({"warmup_steps": 4}, "pretrain.warmup_steps: 4 warm-up steps of 4 steps; needed fewer than steps"),
        ({"micro_batch_size": 4}, "pretrain.micro_batch_size: 4 does not divide batch_size 6"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(UsageError) as caught:
        PretrainConfig(**{**SHORT, **change})
    assert str(caught.value).startswith(message)


def test_a_weight_that_is_not_finite_is_refused_where_it_is(tmp_path, domains):
    source = tiny_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        pretrain(source, PretrainConfig(**SHORT), domains=domains, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_divergence_is_an_error_and_not_a_model(tmp_path, domains):
    config = PretrainConfig(**{**SHORT, "steps": 20, "lr": 1e18, "warmup_steps": 0})
    with pytest.raises(NumericalError, match=r"step \d+: (loss|gradient norm) is (nan|inf)"):
        pretrain(tiny_dense(tmp_path / "dense"), config, domains=domains, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_a_router_that_cannot_learn_is_an_error(tmp_path, domains):
    """Top-1 with renormalised weights multiplies by exactly 1: no word of the text reaches the router."""
    source = tiny_moe(tmp_path / "source", top_k=1)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate: top_k = 1 with renormalised weights"):
        pretrain(source, PretrainConfig(**SHORT), domains=domains, out=tmp_path / "out")
    trained = pretrain(
        source, PretrainConfig(**SHORT, router="frozen"), domains=domains, out=tmp_path / "out", force=True
    )
    assert trained.router_gradient_norm == (0.0, 0.0)


def test_a_receipt_warns(tmp_path, domains):
    """A balance loss that is off, and an expert that no token reaches (its router row points away from everything)."""
    source = tiny_moe(tmp_path / "source")
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    # With every other logit at 0 and three of four rows equal, the last row decides; a tie takes the first experts.
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    settings = {**SHORT, "lr": 1e-12, "arguments": {"coefficient": 0.0}}
    trained = pretrain(source, PretrainConfig(**settings), domains=domains, out=tmp_path / "out")
    assert trained.warnings[0] == "the balance loss of router policy 'switch' is off (coefficient 0)"
    assert "experts got no token of the held-out text (mixture layers 1)" in trained.warnings[1]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_source_that_lacks_a_tensor_is_refused(tmp_path, domains, moe, name):
    broken = shutil.copytree(moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"tensors missing: 1, such as {name}"):
        pretrain(broken, PretrainConfig(**SHORT), domains=domains, out=tmp_path / "out")


def test_a_source_that_lacks_one_expert_is_refused(tmp_path, domains, moe):
    broken = shutil.copytree(moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for part in ("w1", "w2", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="broken"):
        pretrain(broken, PretrainConfig(**SHORT), domains=domains, out=tmp_path / "out")
