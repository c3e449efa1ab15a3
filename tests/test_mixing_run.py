"""Training under a dynamic rule: weights move by measured losses, a killed run ends with the same bytes; reference
losses; attention within documents."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prismoe.data.mixture import Mixture
from prismoe.data.reference import Reference, resolve_reference
from prismoe.data.shards import Domain
from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.evaluate import evaluate
from prismoe.reference import find_domains, reference_loss
from prismoe.train.documents import check_apart
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from tests.test_resume import SignalAt, contents
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

DYNAMIC = {
    **{"steps": 12, "seq_len": 32, "batch_size": 6, "warmup_steps": 3, "lr": 1e-3, "save_every": 5, "threads": 1},
    **{"max_epochs": 50.0, "eval_tokens": 600, "mixing": "sheared", "mixing_every_tokens": 4 * 6 * 32},
    "mixing_arguments": {"eta": 100.0},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe")


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    base = tmp_path_factory.mktemp("run") / "data"
    for number, name in enumerate("ab"):
        domain_folder(base / name, tokenizer=source / "tokenizer.json", seed=number)
    return base


@pytest.fixture(scope="module")
def reference(source, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    reference_loss(source, find_domains(data), out=path, seq_len=32, max_tokens=600)
    return path


@pytest.fixture(scope="module")
def unstopped(source, data, reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("unstopped") / "out"
    config = PretrainConfig(**DYNAMIC, reference=str(reference))
    return pretrain(source, config, domains=find_domains(data), weights="uniform", out=out), contents(out)


def test_reference_losses_are_those_of_evaluate(source, data, reference) -> None:
    found = Reference.read(reference)
    scores = evaluate({"it": source}, find_domains(data), seq_len=32, max_tokens=600)
    for name in "ab":
        score, entry = scores.of("it", name), found.losses[name]
        assert (entry.loss, entry.standard_error, entry.scored_tokens) == (
            score.loss,
            score.standard_error,
            score.scored_tokens,
        )
    assert found.model["fingerprint"] == scores.models["it"]["fingerprint"]
    assert Reference.read(reference) == found
    assert [domain.name for domain in find_domains(data.parent)] == ["a", "b"]  # a run folder
    assert [domain.name for domain in find_domains(data / "a")] == ["a"]


def test_weights_move_by_the_formula(unstopped, reference) -> None:
    receipt, files = unstopped
    lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    moves = [line for line in lines if line["event"] == "mixing"]
    assert [line["step"] for line in moves] == [4, 8, 12]
    heldout = {line["step"]: line["heldout"] for line in lines if line["event"] == "eval"}
    measured = {name: entry.loss for name, entry in Reference.read(reference).losses.items()}
    assert heldout[0]["a"]["loss"] == pytest.approx(measured["a"], abs=1e-6)  # the model itself is the reference
    before = {"a": 0.5, "b": 0.5}
    for move in moves:
        assert move["before"] == pytest.approx(before, abs=1e-15)
        raw = {n: before[n] * math.exp(100 * (heldout[move["step"]][n]["loss"] - measured[n])) for n in before}
        total = sum(raw.values())
        before = {n: (1 - 1e-4) * raw[n] / total + 1e-4 / 2 for n in raw}
        assert move["after"] == pytest.approx(before, abs=1e-12)
        assert abs(before["a"] - 0.5) > 1e-4
    assert [entry["step"] for entry in receipt.weight_history] == [0, 4, 8, 12]
    assert receipt.weights == receipt.weight_history[-1]["weights"]


def test_stopped_after_weights_moved_ends_with_the_same_bytes(tmp_path, source, data, reference, unstopped) -> None:
    """SIGTERM at step 6 and at step 8, where the update that is due is the resumed run's."""
    config = PretrainConfig(**DYNAMIC, reference=str(reference))
    settings = {"domains": find_domains(data), "weights": "uniform", "out": tmp_path / "out"}
    for done in (6, 8):
        with pytest.raises(InterruptedRun):
            pretrain(source, config, **settings, on_progress=SignalAt(signal.SIGTERM, "train step", done))
    resumed = pretrain(source, config, **settings)
    assert resumed.resumed_from == 8
    assert contents(tmp_path / "out") == unstopped[1]


def test_a_domain_used_up_under_moved_weights_loses_no_step(tmp_path, source, data, reference, unstopped) -> None:
    """Half of the rows of the 12 steps are all that is allowed of each domain; moved weights want more of one."""
    receipt, files = unstopped
    share = max(receipt.mixture, key=lambda share: share["sequences"])
    assert share["sequences"] > 37
    windows = share["sequences"] / share["epochs"]
    config = PretrainConfig(**{**DYNAMIC, "save_every": 0, "max_epochs": 36.5 / windows}, reference=str(reference))
    settings = {"domains": find_domains(data), "weights": "uniform", "out": tmp_path / "out"}
    with pytest.raises(UsageError) as caught:
        pretrain(source, config, **settings)
    assert f"domain {share['name']}: " in str(caught.value)
    assert str(caught.value).endswith("the same command with a larger pretrain.max_epochs continues)")
    resumed = pretrain(source, PretrainConfig(**DYNAMIC, reference=str(reference)), **settings)
    assert 4 <= resumed.resumed_from < 12
    assert contents(tmp_path / "out") == files


def test_sigkill_after_weights_moved_ends_with_the_same_bytes(tmp_path, source, data, reference, unstopped) -> None:
    """Nothing is saved at the moment of a SIGKILL: the run goes back to step 5, whose weights have moved once."""
    config = PretrainConfig(**DYNAMIC, reference=str(reference))
    script = f"""
import os, signal
from prismoe.reference import find_domains
from prismoe.train.pretrain import PretrainConfig, pretrain
def kill(what, done, total):
    if what.startswith("train step") and done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain({str(source)!r}, PretrainConfig(**{ {**DYNAMIC, "reference": str(reference)}!r}),
         domains=find_domains({str(data)!r}), weights="uniform", out={str(tmp_path / "out")!r}, on_progress=kill)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert len([line for line in read_metrics(tmp_path / "out/metrics.jsonl") if line["event"] == "mixing"]) == 1
    resumed = pretrain(source, config, domains=find_domains(data), weights="uniform", out=tmp_path / "out")
    assert resumed.resumed_from == 5
    assert contents(tmp_path / "out") == unstopped[1]


def test_reference_files_that_do_not_fit(tmp_path, source, data, reference) -> None:
    domains = find_domains(data)
    losses, warnings = resolve_reference(reference, domains, seq_len=32, max_tokens=600)
    assert set(losses) == {"a", "b"}
    assert warnings == []
    _, warnings = resolve_reference(reference, domains, seq_len=64, max_tokens=600)
    assert warnings == ["the reference losses were measured on windows of 32, training's are of 64"]
    _, warnings = resolve_reference(reference, domains, seq_len=32, max_tokens=700)
    assert "up to 600 tokens a domain, training's on up to 700" in warnings[0]
    other = domain_folder(tmp_path / "a", tokenizer=source / "config.json")
    with pytest.raises(InputError, match="measured with another tokenizer than domain a was prepared with"):
        resolve_reference(reference, [Domain.open(other)], seq_len=32, max_tokens=600)
    moved = domain_folder(tmp_path / "moved" / "a", tokenizer=source / "tokenizer.json", seed=9)
    _, warnings = resolve_reference(reference, [Domain.open(moved)], seq_len=32, max_tokens=600)
    assert warnings == ["the reference losses of a were measured on other held-out text"]
    for name, text in (("no.json", None), ("bad.json", "{"), ("plan.json", '{"kind": "plan"}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=r"prismoe reference-loss MODEL DATA"):
            Reference.read(tmp_path / name)
    with pytest.raises(InputError, match="no prepared domain"):
        find_domains(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="the name of a file"):
        reference_loss(source, domains, out=tmp_path)


@pytest.mark.parametrize("make", [tiny_dense, tiny_moe])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_sequence_is_its_documents_run_alone(tmp_path: Path, data: Path, make, attention: str) -> None:
    folder = make(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    domain = find_domains(data)[0]
    mixture = Mixture([domain], weights="uniform", seq_len=240, batch_size=2, max_epochs=9, attend="document")
    batch = mixture.batch(0)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.inference_mode():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        across = model(input_ids=ids, use_cache=False).logits
    pieces = 0
    for row in range(2):
        starts = [0, *(np.flatnonzero(batch.position_ids[row][1:] == 0) + 1).tolist()]
        after_end = np.flatnonzero(batch.input_ids[row][:-1] == domain.end_token) + 1
        assert starts[1:] == after_end.tolist()
        assert (batch.labels[row][starts[1:]] == -100).all()
        assert (batch.labels[row] == -100).sum() == len(starts) - 1
        for first, last in zip(starts, [*starts[1:], 240], strict=True):
            with torch.inference_mode():
                alone = model(input_ids=ids[row : row + 1, first:last], use_cache=False).logits
            assert (alone[0] - packed[row, first:last]).abs().max() <= 1e-5
            pieces += 1
    assert pieces >= 5
    assert (across - packed).abs().max() > 0.1


def test_attention_within_documents_trains(tmp_path, source, data) -> None:
    """The loss of the first step is that of the packed documents, not that of one long sequence."""
    common = {"steps": 1, "seq_len": 240, "batch_size": 2, "warmup_steps": 0, "threads": 1, "eval_tokens": 200}
    found = {}
    for attend in ("sequence", "document"):
        out = tmp_path / attend
        config = PretrainConfig(**common, attend=attend, max_epochs=50.0)
        found[attend] = pretrain(source, config, domains=find_domains(data), weights="uniform", out=out).first_loss
    mixture = Mixture(
        find_domains(data), weights="uniform", seq_len=240, batch_size=2, max_epochs=50, attend="document"
    )
    batch = mixture.batch(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,  # with a cache, stock models do not look for packed documents
        ).logits
    labels = torch.from_numpy(batch.labels)[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    assert found["document"] == pytest.approx(float(expected), abs=2e-6)
    assert abs(found["sequence"] - found["document"]) > 1e-4


RECURRENT = {
    **{"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_expand": 2},
    **{"shared_intermediate_size": 32, "position_embedding_type": "rope", "time_step_limit": [0.0, 1e9]},
}


@pytest.mark.parametrize("layers", [["mamba", "attention"], ["attention", "attention"]])
def test_a_class_that_does_not_keep_documents_apart_is_refused(tmp_path, data, layers) -> None:
    """It is measured: this class lets documents mix with and without a recurrent layer."""
    source = tiny_moe(tmp_path / "model", "granitemoehybrid", layer_types=layers, **RECURRENT)
    common = {"steps": 1, "seq_len": 32, "batch_size": 2, "warmup_steps": 0, "threads": 1, "max_epochs": 50.0}
    with pytest.raises(UsageError) as caught:
        pretrain(source, PretrainConfig(**common, attend="document"), domains=find_domains(data), out=tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("pretrain.attend: document, but in GraniteMoeHybridForCausalLM one document moves the")
    assert message.endswith("(hint: pretrain.attend=sequence)")
    assert "\n" not in message
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "qwen3_moe"])
def test_classes_that_keep_documents_apart_pass(tmp_path, kind) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_moe(tmp_path / "model", kind), dtype=torch.float32).train()
    check_apart(model, seq_len=32)
    assert model.training
    for layer in model.model.layers:  # without positions that begin anew it attends to everything
        layer.self_attn.register_forward_pre_hook(_attend_to_all, with_kwargs=True)
    with pytest.raises(UsageError, match="moves the logits of the next"):
        check_apart(model, seq_len=32)


def _attend_to_all(module, arguments, keywords):
    return arguments, {**keywords, "attention_mask": None}
