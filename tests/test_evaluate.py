"""Held-out loss against a loop written by hand, and against numbers published with the shared checkpoints."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prismoe.data.prepare import DomainSource, prepare
from prismoe.data.shards import Domain
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.evaluate import evaluate
from prismoe.folder import sha256_file
from prismoe.train.scoring import TextLoss
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

SEQ_LEN = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"dense": tiny_dense(base / "dense"), "moe": tiny_moe(base / "moe")}


@pytest.fixture(scope="module")
def domains(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("domains")
    tokenizer = models["dense"] / "tokenizer.json"
    return [domain_folder(base / name, tokenizer=tokenizer, seed=i, documents=70) for i, name in enumerate("ab")]


def by_hand(folder, domain):
    """[documents] nats and tokens: every document alone, windows of 39 new tokens opened by the start token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    opened = Domain.open(domain)
    tokens, ends = opened.tokens("heldout"), opened.ends("heldout")[:, 0]
    nats, counts = [], []
    for begin, end in zip([0, *ends[:-1]], ends - 1, strict=True):
        text, nat = np.array(tokens[begin:end], np.int64), 0.0
        for start in range(0, len(text), SEQ_LEN - 1):
            ids = torch.tensor([[1, *text[start : start + SEQ_LEN - 1]]])
            with torch.no_grad():
                log_probability = model(input_ids=ids).logits.log_softmax(-1)
            nat -= float(log_probability[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        nats.append(nat)
        counts.append(len(text))
    return np.array(nats), np.array(counts)


def test_scores_are_the_definition(models, domains):
    scores = evaluate(models, domains, seq_len=SEQ_LEN, max_tokens=None)
    assert [(score.model, score.domain) for score in scores.scores] == [
        ("dense", "a"),
        ("dense", "b"),
        ("moe", "a"),
        ("moe", "b"),
    ]
    for domain in domains:
        dense = by_hand(models["dense"], domain)[0]
        for name, folder in models.items():
            nats, counts = by_hand(folder, domain)
            score = scores.of(name, domain.name)
            loss = nats.sum() / counts.sum()
            assert score.loss == pytest.approx(loss, rel=1e-5)
            assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
            assert score.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / (3 * counts.sum()), rel=1e-5)
            assert (score.scored_tokens, score.documents, score.bytes) == (700, 7, 2100)
            assert score.windows == 7 * 3
            # Documents are of one length: the ratio estimator is the plain standard error of the mean.
            assert score.standard_error == pytest.approx(np.std(nats / counts, ddof=1) / math.sqrt(7), rel=1e-4)
            change = (nats - dense) / counts
            assert score.change == pytest.approx(change.mean(), rel=1e-3, abs=1e-5)
            assert score.change_standard_error == pytest.approx(
                np.std(change, ddof=1) / math.sqrt(7), rel=1e-3, abs=1e-9
            )


def test_batch_size_does_not_matter(models, domains):
    one, many = (evaluate(models, domains, seq_len=SEQ_LEN, batch_size=size) for size in (1, 64))
    for first, second in zip(one.scores, many.scores, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-6)


def test_max_tokens_takes_whole_documents(models, domains):
    scores = evaluate({"dense": models["dense"]}, domains, seq_len=SEQ_LEN, max_tokens=250)
    assert [(score.documents, score.scored_tokens) for score in scores.scores] == [(2, 200)] * 2
    single = evaluate({"dense": models["dense"]}, domains, seq_len=SEQ_LEN, max_tokens=101)
    assert [score.standard_error for score in single.scores] == [None, None]


def test_standard_error_of_a_ratio_covers_the_truth():
    """Over many drawn corpora of unequal documents the error of the loss has the size that is claimed."""
    draw = np.random.default_rng(0)
    errors, claimed = [], []
    for _ in range(2000):
        tokens = draw.integers(50, 500, 40)
        means = draw.normal(2.0, 0.5, 40)
        scores = TextLoss(nats=means * tokens, tokens=tokens)
        errors.append(scores.loss - 2.0)
        claimed.append(scores.standard_error)
    assert np.mean(claimed) == pytest.approx(np.std(errors), rel=0.05)


def test_the_receipt_says_what_was_measured(models, domains):
    scores = evaluate(models, domains, seq_len=SEQ_LEN)
    text = json.dumps(scores.to_dict(), allow_nan=False)
    assert json.loads(text)["domains"]["a"]["manifest"] == sha256_file(domains[0] / "manifest.json")
    parameters = sum(tensor.numel() for tensor in load_file(models["dense"] / "model.safetensors").values())
    assert scores.models["dense"]["parameters"] == parameters
    assert scores.models["moe"]["model_type"] == "mixtral"
    assert scores.versions["torch"] == torch.__version__


def test_progress_counts_windows(models, domains):
    seen = []
    evaluate(models, domains, seq_len=SEQ_LEN, on_progress=lambda what, done, total: seen.append((what, done, total)))
    assert seen[-1] == ("evaluate: moe on b", 4 * 21, 4 * 21)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_what_cannot_be_measured_is_refused(tmp_path, models, domains):
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate({}, domains, seq_len=SEQ_LEN)
    with pytest.raises(InputError, match="256 positions; needed seq_len 257 or more"):
        evaluate(models, domains, seq_len=257)
    bare = shutil.copytree(models["dense"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="bare: no weights"):
        evaluate({"bare": bare}, domains, seq_len=SEQ_LEN)
    broken = shutil.copytree(models["dense"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="broken on a: held-out loss is not finite"):
        evaluate({"broken": broken}, domains, seq_len=SEQ_LEN)


PUBLISHED = {
    ("stories260K", 512, "tinystories"): (1.4049, 4.075, 0.9816),
    ("stories260K", 512, "arxiv"): (7.4998, 1807.608, 7.8569),
    ("babyllama105", 256, "arxiv"): (5.4028, 222.016, 7.6631),
}


@pytest.mark.parametrize(("model", "seq_len", "domain"), list(PUBLISHED))
def test_published_losses_of_real_checkpoints(tmp_path, shared, model, seq_len, domain):
    """What the data's own page says, to its last digit: first 6,000 characters a document, 400 kB a domain."""
    import zstandard

    heldout, train, size = tmp_path / "heldout.jsonl", tmp_path / "train.jsonl", 0
    with (
        zstandard.open(shared / "corpora" / domain / "heldout.jsonl.zst", "rt", encoding="utf-8") as source,
        heldout.open("w") as file,
    ):
        for line in source:
            document = json.loads(line)
            text = (document.get("content") or document["text"])[:6000]
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size > 400_000:
                break
    train.write_text(json.dumps({"text": "not read here"}) + "\n")
    folder = shared / "models" / model
    source = DomainSource(train=(str(train),), heldout=(str(heldout),))
    prepared = prepare({domain: source}, tokenizer=folder, out=tmp_path / "data")
    domains = [made.folder for made in prepared.domains]
    score = evaluate({model: folder}, domains, seq_len=seq_len, max_tokens=None).of(model, domain)
    loss, perplexity, bits = PUBLISHED[model, seq_len, domain]
    assert score.loss == pytest.approx(loss, abs=6e-5)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert score.bits_per_byte == pytest.approx(bits, abs=6e-5)
