"""Every statistic against plain autograd in float64 on the whole stock model, whatever the batches and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.data.prepare import DomainSource, prepare
from prismoe.data.shards import Domain
from prismoe.errors import InputError, UsageError
from tests.calibration import World, check_against, make_world, reference
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {"dtype": "bfloat16"}),
        ("granite", {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3}),
        ("cohere2", {}),
        ("phi3", {}),
        ("olmo2", {}),
    ],
)
def test_every_statistic_is_what_autograd_says(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    world = make_world(tmp_path, family, **overrides)
    text = world.text()
    truth = reference(world.model, text)
    for name, settings in {"whole": {}, "windows": {"layers_at_once": 2, "batch_size": 7}}.items():
        check_against(world.run(tmp_path / name, **settings), truth, text, marks=5)


@pytest.mark.parametrize("importance", ["square", "total", "total_square"])
def test_other_accumulations(world: World, tmp_path: Path, importance: str) -> None:
    text = world.text()
    found = world.run(tmp_path / "out", importance=importance, clusters="domains")
    np.testing.assert_array_equal(found.sequences().clusters, text.domain_ids)
    assert found.cluster_domains == tuple(tuple(row) for row in np.diag(np.bincount(text.domain_ids)).tolist())
    check_against(found, reference(world.model, text), text, marks=5, importance=importance)


def test_on_a_trained_model_with_its_own_text(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories260K"
    names = ("tinystories", "github")
    sources = {name: DomainSource((str(shared / "corpora" / name / "heldout.jsonl.zst"),)) for name in names}
    prepare(sources, tokenizer=model, out=tmp_path / "data")
    world = World(model, tuple(Domain.open(tmp_path / "data" / name) for name in names))
    settings = {"clusters": 2, "seq_len": 128, "max_tokens": 128 * 24, "marks_per_token": 10, "start_token": True}
    text = world.text(**settings)
    assert (text.ids(0, len(text))[:, 0] == 1).all()
    found = world.run(tmp_path / "out", **settings)
    check_against(found, reference(model, text), text, marks=10)
    # Stories and code are so unlike that the model's own states tell them apart without a label.
    composition = np.array(found.cluster_domains)
    assert sorted(composition.tolist()) == [[0, 12], [12, 0]]


def tiny_encoder(folder: Path) -> Path:
    """A real encoder with random weights: BERT, hidden 16, two layers."""
    import torch
    from safetensors.numpy import save_file
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    weights = {name: tensor.numpy() for name, tensor in BertModel(config).state_dict().items()}
    weights["embeddings.position_ids"] = np.arange(40)[None]  # as many encoders of before 2023 have it
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tiny_tokenizer(folder)


def test_clusters_of_sentence_embeddings(world: World, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    from prismoe.calibrate.embedder import sentence_vectors

    encoder, text = tiny_encoder(tmp_path / "encoder"), world.text()
    found = sentence_vectors(
        encoder, text, source=world.model, device="cpu", batch_size=4, on_progress=lambda *report: None
    )
    # One text at a time, so that nothing is padded.
    model = BertModel.from_pretrained(encoder).eval()
    own, other = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (world.model, encoder))
    for vector, row in zip(found, text.ids(0, len(text)).tolist(), strict=True):
        ids = other.encode(own.decode(row)).ids[:38]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-5)
    run = world.run(tmp_path / "out", encoder=str(encoder))
    assert run.num_clusters == 3
    check_against(run, reference(world.model, text), text, marks=5)
    labels = run.sequences().clusters
    distances = [((found - found[labels == c].mean(axis=0)) ** 2).sum(axis=1) for c in range(3)]
    assert (np.argmin(distances, axis=0) == labels).all()


def test_an_encoder_that_is_not_whole_is_refused(world: World, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    encoder = tiny_encoder(tmp_path / "encoder")
    path = encoder / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder .*: missing keys: 1, such as encoder.layer.1.output.dense.weight"):
        world.run(tmp_path / "out", encoder=str(encoder))
    path.unlink()
    with pytest.raises(InputError, match=r"encoder .*: no model.safetensors; needed config.json, model.safetensors"):
        world.run(tmp_path / "out2", encoder=str(encoder))
    assert not (tmp_path / "out2").exists()
    with pytest.raises(UsageError, match=r"calibrate.clusters: 'domains' with an encoder; needed a number above 1"):
        world.run(tmp_path / "out", encoder=str(encoder), clusters="domains")
