"""Distillation: the divergence against NumPy in float64, on stock classes, and in whole runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prismoe.checkpoint import Checkpoint
from prismoe.config import load_config
from prismoe.data.prepare import DomainSource, prepare
from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.plan import make_plan
from prismoe.run import STAGES
from prismoe.train import logits
from prismoe.train.engine.layout import Layout
from prismoe.train.forecast import forecast
from prismoe.train.head import text_loss
from prismoe.train.lesson import divergence, divergence_top, top_words
from prismoe.train.metrics import read_metrics
from prismoe.train.model import empty_model, load_model
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.speed import flops_per_token
from prismoe.train.teacher import Teacher
from tests.runs import workplace
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

BASE = {
    **{"steps": 3, "seq_len": 32, "batch_size": 6, "micro_batch_size": 3, "warmup_steps": 1, "lr": 1e-3},
    **{"max_epochs": 50.0, "threads": 1, "eval_tokens": 200},
}


def softmax(logits_RV):
    shifted = np.exp(logits_RV - logits_RV.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def by_definition(student_RV, teacher_RV, temperature, top):
    """KL of each row from probabilities: of all words, or of the teacher's `top` likeliest and all others as one."""
    q_RV, p_RV = softmax(student_RV / temperature), softmax(teacher_RV / temperature)
    if top:
        order_RV = np.argsort(-teacher_RV, axis=1)
        kept, rest = order_RV[:, :top], order_RV[:, top:]

        def grouped(given):
            others = np.take_along_axis(given, rest, 1).sum(axis=1, keepdims=True)
            return np.concatenate([np.take_along_axis(given, kept, 1), others], axis=1)

        q_RV, p_RV = grouped(q_RV), grouped(p_RV)
    return (p_RV * (np.log(p_RV) - np.log(q_RV))).sum(axis=1)


@pytest.mark.parametrize("top", [0, 1, 4, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_slope_are_their_definition_in_float64(temperature, top):
    """The slope against central differences of T² · KL, which know nothing of the formula."""
    draw = np.random.default_rng(0)
    student, teacher = 3 * draw.standard_normal((2, 5, 7))
    given = torch.from_numpy(teacher.copy())
    if top:
        words = top_words(given, top, temperature=temperature)
        nats_R, slopes_RV = divergence_top(torch.from_numpy(student), words, temperature=temperature)
    else:
        nats_R, slopes_RV = divergence(torch.from_numpy(student), given, temperature=temperature)
    np.testing.assert_allclose(nats_R.numpy(), by_definition(student, teacher, temperature, top), rtol=1e-12)
    if top:
        assert (nats_R.numpy() <= by_definition(student, teacher, temperature, 0) + 1e-12).all()
    step, found = 1e-5, np.empty_like(student)
    for word in range(7):
        moved = step * np.eye(7)[word]
        up, down = (by_definition(student + sign * moved, teacher, temperature, top) for sign in (1, -1))
        found[:, word] = temperature**2 * (up - down) / (2 * step)
    np.testing.assert_allclose(slopes_RV.numpy(), found, rtol=1e-6, atol=1e-8)


def test_one_word_that_is_all_there_is_leaves_nothing_undefined():
    """Logits so far apart that the others have no probability in float32, in the teacher or in the student."""
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 200.0, 0.0, 0.0]])
    for student in (sure, other, torch.zeros(1, 4)):
        nats_1, slopes_1V = divergence_top(student, top_words(sure.clone(), 1, temperature=1.0), temperature=1.0)
        expected = by_definition(student.double().numpy(), sure.double().numpy(), 1.0, 1)
        assert nats_1.item() == pytest.approx(expected[0], rel=1e-6)
        np.testing.assert_allclose(
            slopes_1V.numpy(), softmax(student.double().numpy()) - softmax(sure.double().numpy()), atol=1e-6
        )


SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 53},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def model_of(model_type, seed, **more):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **more))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    return model.double()


CLASSES = {
    "llama": {"tie_word_embeddings": False},
    "granite": {"logits_scaling": 6.0},
    "gemma2": {"final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize("top", [0, 5])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(("student", "teacher"), [("llama", "granite"), ("granite", "gemma2"), ("gemma2", "llama")])
def test_loss_and_gradients_on_stock_classes(monkeypatch, student, teacher, rows, top):
    """Whole and five tokens at a time: the weighted sum and every parameter's gradient, by autograd of whole logits."""
    if rows:
        monkeypatch.setattr(logits, "LARGEST", 0)
        monkeypatch.setattr(logits, "ROWS", rows)
    learner, known = model_of(student, 0, **CLASSES[student]), model_of(teacher, 1, **CLASSES[teacher])
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 53, (3, 11), generator=draw)
    labels_BT = ids_BT.clone()
    labels_BT[0, 4:7] = labels_BT[2, -1] = -100
    settings = {"text_weight": 0.3, "teacher_weight": 0.7, "teacher_temperature": 2.0, "teacher_top": top}
    lesson = Teacher(known.eval(), PretrainConfig(teacher="source", **settings)).lesson(ids_BT)
    asked, said = [], lesson.said
    if not top:
        lesson.said = lambda part: asked.append(part.stop - part.start) or said(part)
    total, loss_BT = text_loss(learner, ids_BT, labels_BT, num_tokens=17.0, lesson=lesson)
    total.backward()
    got = {name: parameter.grad for name, parameter in learner.named_parameters()}
    learner.zero_grad()
    logits_TV = learner(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        known_TV = known(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    labels_T = labels_BT[:, 1:].flatten()
    counted = labels_T != -100
    text = torch.nn.functional.cross_entropy(logits_TV[counted], labels_T[counted], reduction="sum")
    log_q_TV, log_p_TV = ((given[counted] / 2.0).log_softmax(dim=1) for given in (logits_TV, known_TV))
    if top:
        kept = torch.zeros_like(log_p_TV).scatter(1, log_p_TV.topk(top, dim=1).indices, 1.0)
        log_q_TV, log_p_TV = (
            torch.cat([g.where(kept > 0, 0.0), (g.exp() * (1 - kept)).sum(dim=1, keepdim=True).log()], dim=1)
            for g in (log_q_TV, log_p_TV)
        )
        weight_TV = torch.cat([log_p_TV[:, :-1].exp() * kept, log_p_TV[:, -1:].exp()], dim=1)
    else:
        weight_TV = log_p_TV.exp()
    nats = (weight_TV * (log_p_TV - log_q_TV)).sum()
    expected = (0.3 * text + 0.7 * 4 * nats) / 17.0
    expected.backward()
    in_parts = rows and student != "gemma2"
    assert asked == ([] if top else [5] * 7 if in_parts else [33])
    rel = 1e-6  # norms of stock classes compute in float32
    assert total.item() == pytest.approx(expected.item(), rel=rel)
    assert lesson.total().item() == pytest.approx(nats.item(), rel=rel)
    assert loss_BT.sum().item() == pytest.approx(text.item(), rel=rel)
    for name, parameter in learner.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert float((got[name] - parameter.grad).abs().max()) <= 2e-6 * scale, name
    assert all(parameter.grad is None for parameter in known.parameters())


def test_documents_are_apart_for_the_teacher_too(tmp_path):
    model = load_model(tiny_dense(tmp_path / "dense")).eval().requires_grad_(False)
    teacher = Teacher(model, PretrainConfig(teacher="source"))
    first, second = torch.arange(3, 11)[None], torch.arange(40, 50)[None]
    positions = torch.cat([torch.arange(8), torch.arange(10)])[None]
    together = teacher.lesson(torch.cat([first, second], dim=1), position_ids=positions)
    alone = teacher.lesson(second, position_ids=torch.arange(10)[None])
    torch.testing.assert_close(together.said(slice(8, 18)), alone.said(slice(0, 10)), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A dense model, and a domain of its ids."""
    base = tmp_path_factory.mktemp("ground")
    dense = tiny_dense(base / "dense", num_hidden_layers=2)
    domain_folder(base / "a", tokenizer=dense / "tokenizer.json")
    return base


def trained(ground, out, plan=None, source="dense", **settings):
    return pretrain(ground / source, PretrainConfig(**{**BASE, **settings}), domains=[ground / "a"], out=out, plan=plan)


def steps(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if line["event"] == "step"]


def test_a_mixture_with_all_experts_on_begins_as_its_teacher(ground, tmp_path):
    """A partition with K = E, equal scores and scale E; copies, with any router. Half of the experts does not."""
    whole = make_plan(ground / "dense", method="random", num_experts=4, top_k=4, scale="mean", router="zero")
    copies = make_plan(ground / "dense", method="upcycle", num_experts=4, top_k=2)
    half = make_plan(ground / "dense", method="random", num_experts=4, top_k=2)
    found = {}
    for name, plan in {"whole": whole, "copies": copies, "half": half}.items():
        trained(ground, tmp_path / name, plan, teacher="source", steps=2)
        found[name] = steps(tmp_path / name)
    assert abs(found["whole"][0]["teacher_loss"]) < 1e-6
    assert abs(found["copies"][0]["teacher_loss"]) < 1e-6
    assert found["half"][0]["teacher_loss"] > 0.1


def test_a_weight_of_zero_is_no_teacher_and_the_text_is_counted_as_before(ground, tmp_path):
    plan = make_plan(ground / "dense", method="random", num_experts=4, top_k=2)
    settings = {"none": {}, "zero": {"teacher": "source", "teacher_weight": 0.0}, "on": {"teacher": "source"}}
    settings["scratch"] = {"teacher": "source", "init": "random"}
    receipts = {name: trained(ground, tmp_path / name, plan, **more) for name, more in settings.items()}
    files = ("model/model.safetensors", "metrics.jsonl")
    none, zero, on, _ = ([(tmp_path / name / file).read_bytes() for file in files] for name in settings)
    assert none == zero
    assert none[0] != on[0]
    assert steps(tmp_path / "on")[0]["loss"] == steps(tmp_path / "none")[0]["loss"]
    assert receipts["none"].teacher_loss is receipts["zero"].teacher_loss is None
    lines = steps(tmp_path / "on")
    assert receipts["on"].teacher_loss == (lines[0]["teacher_loss"], lines[-1]["teacher_loss"])
    assert receipts["scratch"].teacher_loss[0] > 1.0
    assert receipts["on"].heldout_before == receipts["none"].heldout_before


def test_a_stopped_run_gives_the_same_bytes_wherever_the_teacher_lies_then(ground, tmp_path):
    settings = {"teacher": str(ground / "dense"), "teacher_top": 9, "save_every": 1}
    plan = make_plan(ground / "dense", method="random", num_experts=4, top_k=2)
    trained(ground, tmp_path / "through", plan, **settings)
    with pytest.raises(InterruptedRun):
        trained(ground, tmp_path / "stopped", plan, **settings, max_steps=1)
    elsewhere = shutil.copytree(ground / "dense", tmp_path / "elsewhere")
    done = trained(ground, tmp_path / "stopped", plan, **{**settings, "teacher": str(elsewhere)})
    assert done.resumed_from == 1
    for file in ("model/model.safetensors", "metrics.jsonl", "model/manifest.json", "manifest.json"):
        assert (tmp_path / "through" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes(), file
    with pytest.raises(Exception, match=r"pretrain.teacher was \"[0-9a-f]{40,}, is \"\""):
        trained(ground, tmp_path / "stopped", plan)


def test_what_cannot_teach_is_refused_before_the_first_step(ground, tmp_path):
    tiny_dense(tmp_path / "other", vocab_size=160)
    tiny_dense(tmp_path / "short", max_position_embeddings=16)
    spelt = tiny_dense(tmp_path / "spelt")
    (spelt / "tokenizer.json").write_text((spelt / "tokenizer.json").read_text() + "\n")
    bad = tiny_dense(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(ground / "dense" / "config.json", bare)
    cases = {
        "other": (InputError, "config.json: a teacher's vocabulary of 160; needed 128, the model's"),
        "short": (InputError, "config.json: a teacher's 16 positions; needed seq_len 32"),
        "spelt": (InputError, "tokenizer.json: a teacher's other tokenizer; needed the one of the prepared text"),
        "bad": (InputError, "model.layers.1.mlp.up_proj.weight"),
        "bare": (InputError, "bare: no weights; needed those of a teacher"),
        "absent": (InputError, "absent"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind) as caught:
            trained(ground, tmp_path / "out", teacher=str(tmp_path / name))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out/*/*"))
    with pytest.raises(UsageError, match=r"pretrain.teacher_top: 128 of 128 words; needed fewer, or 0 for all"):
        trained(ground, tmp_path / "out", teacher="source", teacher_top=128)
    moe = tiny_moe(tmp_path / "moe")
    with pytest.raises(UsageError, match=r"pretrain.teacher: source, but a mixture is trained as it is"):
        pretrain(moe, PretrainConfig(**BASE, teacher="source"), domains=[ground / "a"], out=tmp_path / "out")


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(UsageError, match=r"pretrain.teacher_top: 8 without a teacher"):
        PretrainConfig(teacher_top=8)
    with pytest.raises(
        UsageError, match=r"text_weight: 0, and teacher_weight 0 too: .*; needed one of them above 0 \(hint"
    ):
        PretrainConfig(teacher="source", text_weight=0.0, teacher_weight=0.0)
    with pytest.raises(UsageError, match=r"pretrain.teacher_temperature: 0"):
        PretrainConfig(teacher="source", teacher_temperature=0.0)


def test_a_run_is_decided_by_what_its_teacher_is(tmp_path):
    """Not by where it lies; and without one finished runs of earlier versions are what they were."""
    decides, written = STAGES["pretrain"].decides, workplace(tmp_path)
    assert not [key for key in decides(load_config(written))["pretrain"] if "teach" in key]
    first, second = tiny_dense(tmp_path / "first"), tiny_dense(tmp_path / "second")
    other = tiny_dense(tmp_path / "other", seed=1)
    named = [
        decides(load_config(written, overrides=[f"pretrain.teacher={folder}"]))["pretrain"]
        for folder in (first, second, other)
    ]
    assert named[0] == named[1] != named[2]
    assert named[0]["teacher"] == Checkpoint.open(first).fingerprint


def test_a_forecast_counts_the_teacher(ground):
    dense = json.loads((ground / "dense" / "config.json").read_text())
    config = PretrainConfig(batch_size=8, seq_len=64, teacher="source")
    model = empty_model(dense, where="test")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    alone, taught = (
        forecast(dense, config, Layout(), where="test", command="", teacher=teacher) for teacher in (None, dense)
    )
    assert taught.teacher_bytes == 4 * numbers
    assert taught.memory_bytes - alone.memory_bytes == 4 * numbers + 12 * 8 * 64 * 128
    assert taught.flops_per_token - alone.flops_per_token == flops_per_token(model, seq_len=64) / 3
    two = [forecast(dense, config, Layout(2), where="test", command="", teacher=t).sent_bytes for t in (None, dense)]
    assert two[1]["all_gather"] == 1.5 * two[0]["all_gather"]
    assert two[1]["reduce_scatter"] == two[0]["reduce_scatter"]


def test_a_real_teacher_is_come_nearer_to(shared: Path, tmp_path):
    """stories260K in four experts, two of them on: in twelve steps from the teacher alone, text unseen by either."""
    source, stories = shared / "models/stories260K", shared / "corpora/tinystories"
    text = DomainSource(train=(str(next(stories.glob("train*"))),), heldout=(str(stories / "heldout.jsonl.zst"),))
    prepare({"stories": text}, tokenizer=source, out=tmp_path / "data")
    settings = {"teacher": "source", "text_weight": 0.0, "teacher_top": 32, "steps": 12, "lr": 2e-3}
    done = pretrain(
        source,
        PretrainConfig(**{**BASE, **settings, "seq_len": 128, "batch_size": 8, "micro_batch_size": 0}),
        domains=[tmp_path / "data/stories"],
        out=tmp_path / "out",
        plan=make_plan(source, method="random", num_experts=4, top_k=2),
    )
    assert done.teacher_loss[1] < 0.7 * done.teacher_loss[0]
    assert done.heldout_after["stories"] < done.heldout_before["stories"] - 0.3
