"""Every statistic against plain autograd in float64 on the whole stock model, whatever the batches and windows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.text import Text, draw_text
from prismoe.calibration import Calibration
from prismoe.data.prepare import DomainSource, prepare
from prismoe.data.shards import Domain
from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.progress import Progress, quiet
from tests.tiny import tiny_dense, tiny_tokenizer
from tests.training import domain_folder

EVERYTHING = ("activation", "importance", "marks", "coactivation", "inputs", "scores", "output")
SMALL: dict[str, Any] = {
    "quantities": EVERYTHING,
    "clusters": 3,
    "seq_len": 24,
    "max_tokens": 24 * 20,
    "sample_tokens": 50,
    "batch_size": 4,
    "marks_per_token": 5,
    "device": "cpu",
    "threads": 1,
}


@dataclass(frozen=True)
class World:
    """A model and three domains of text for it."""

    model: Path
    domains: tuple[Domain, ...]

    def run(self, out: Path, *, on_progress: Progress = quiet, force: bool = False, **settings: Any) -> Calibration:
        config = CalibrateConfig(**{**SMALL, **settings})
        return calibrate(self.model, config, domains=self.domains, out=out, on_progress=on_progress, force=force)

    def text(self, **settings: Any) -> Text:
        config = CalibrateConfig(**{**SMALL, **settings})
        return draw_text(
            self.domains,
            weights=config.weights,
            seq_len=config.seq_len,
            max_tokens=config.max_tokens,
            sample_tokens=config.sample_tokens,
            start_token=config.start_token,
            seed=config.seed,
        )


def make_world(folder: Path, family: str = "llama", **overrides: Any) -> World:
    model = tiny_dense(folder / "model", family, **overrides)
    names = ("arxiv", "books", "github")
    return World(
        model,
        tuple(
            Domain.open(domain_folder(folder / name, tokenizer=model / "tokenizer.json", documents=12, seed=seed))
            for seed, name in enumerate(names)
        ),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@dataclass(frozen=True)
class Reference:
    """What the whole stock model does in float64 (but for its norms: the class computes them in float32).

    [L, N, T, …] of activation, its gradient, FFN input and output.
    """

    h: Any
    g: Any
    x: Any
    y: Any
    middle: Any
    loss: float


def reference(model_folder: Path, text: Text) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    seen: dict[str, list[Any]] = {"h": [], "x": [], "y": [], "hidden": []}

    def keep_hidden(module: Any, args: Any) -> None:
        args[0].retain_grad()
        seen["h"].append(args[0])

    def keep_ends(module: Any, args: Any, output: Any) -> None:
        seen["x"].append(args[0])
        seen["y"].append(output)

    def keep_state(module: Any, args: Any, output: Any) -> None:
        seen["hidden"].append(output)

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep_hidden)
        layer.mlp.register_forward_hook(keep_ends)
        layer.register_forward_hook(keep_state)
    ids = torch.from_numpy(text.ids(0, len(text)))
    logits = model(input_ids=ids, use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    loss = -logp.gather(2, ids[:, 1:, None]).sum()
    loss.backward()
    middle = seen["hidden"][-(-len(model.model.layers) // 2) - 1][:, 1:].mean(dim=1)

    def stack(values: list[Any]) -> Any:
        return np.stack([value.detach().numpy() for value in values])

    gradients = np.stack([h.grad.numpy() for h in seen["h"]])
    predicted = len(text) * (text.seq_len - 1)
    return Reference(
        stack(seen["h"]),
        gradients,
        stack(seen["x"]),
        stack(seen["y"]),
        middle.detach().numpy(),
        loss.item() / predicted,
    )


def close(found: Any, expected: Any, *, limit: float = 2e-5) -> None:
    """Relative to the largest number: float32 sums have no more."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def check_against(found: Calibration, truth: Reference, text: Text, *, marks: int, importance: str = "l1") -> None:
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    clusters = found.sequences().clusters
    predicted = np.bincount(clusters) * (text.seq_len - 1)
    for layer in range(found.num_layers):
        stats = found.layer(layer)
        h, g = truth.h[layer], truth.g[layer]
        flat = h.reshape(-1, h.shape[-1])
        close(stats.mean, flat.mean(0))
        close(stats.mean_abs, np.abs(flat).mean(0))
        close(stats.mean_square, (flat**2).mean(0))
        norms = np.linalg.norm(truth.y[layer], axis=-1)
        assert stats.output_norm == pytest.approx(norms.mean(), rel=1e-5)
        assert stats.output_rms == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-5)
        np.testing.assert_array_equal(stats.cluster_tokens, predicted)
        for c in range(found.num_clusters):
            part = (h * g)[clusters == c].reshape(-1, h.shape[-1])
            expected = {
                "l1": np.abs(part).sum(0),
                "square": (part**2).sum(0),
                "total": np.abs(part.sum(0)),
                "total_square": part.sum(0) ** 2,
            }[importance]
            close(stats.need("importance")[c], expected / predicted[c], limit=5e-5)
        # The marks: numbers that float32 cannot tell apart may change places, so the values are compared.
        order = np.sort(np.argsort(-np.abs(flat), axis=1)[:, :marks], axis=1)
        sampled = text.samples
        close(
            np.take_along_axis(np.abs(flat[sampled]), stats.need("marks"), axis=1).sum(),
            np.take_along_axis(np.abs(flat[sampled]), order[sampled], axis=1).sum(),
        )
        marked = np.zeros(flat.shape)
        np.put_along_axis(marked, order, 1.0, axis=1)
        assert np.abs(stats.need("rate") - marked.mean(0)).max() <= 2 / len(flat)
        assert np.abs(stats.need("coactivation") - marked.T @ marked).max() <= 2
        assert (np.diag(stats.need("coactivation")) == np.rint(stats.need("rate") * np.float64(len(flat)))).all()
        close(stats.inputs, truth.x[layer].reshape(len(flat), -1)[sampled])
        scores = np.abs(h * g).reshape(flat.shape)[sampled]
        assert np.abs(np.asarray(stats.scores, np.float64) - scores).max() <= 2**-8 * scores.max()
        np.testing.assert_array_equal(stats.sample_clusters, clusters[sampled // text.seq_len])


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


def same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def result_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_one_seed_gives_one_result_and_another_another(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "a")
    world.run(tmp_path / "b", save_seconds=0.0)
    same_files(tmp_path / "a", tmp_path / "b")
    world.run(tmp_path / "c", seed=1)
    assert (
        result_files(tmp_path / "c")["sequences.safetensors"] != result_files(tmp_path / "a")["sequences.safetensors"]
    )


@pytest.mark.parametrize("quantities", [EVERYTHING, ("activation", "marks", "coactivation", "inputs", "output")])
@pytest.mark.parametrize("window", [1, 2])
def test_windows_of_layers_change_no_bit(
    world: World, tmp_path: Path, quantities: tuple[str, ...], window: int
) -> None:
    world.run(tmp_path / "whole", quantities=quantities)
    world.run(tmp_path / "window", quantities=quantities, layers_at_once=window)
    assert result_files(tmp_path / "whole") == result_files(tmp_path / "window")
    assert not (tmp_path / "window" / "scratch").exists()


class Stopped(Exception):
    """The test pulls the plug."""


@pytest.mark.parametrize("window", [0, 2])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(world: World, tmp_path: Path, window: int) -> None:
    world.run(tmp_path / "unstopped", layers_at_once=window)
    total = 0

    def count(what: str, done: int, of: int) -> None:
        nonlocal total
        total = of

    world.run(tmp_path / "counted", layers_at_once=window, on_progress=count)
    seen: list[int] = []

    def stop(what: str, done: int, of: int) -> None:
        seen.append(done)
        if len(seen) % 3 == 0:  # the batch is done, but not saved yet: it is done again
            raise Stopped

    for _ in range(total):
        try:
            found = world.run(tmp_path / "stopped", layers_at_once=window, on_progress=stop, save_seconds=0.0)
            break
        except Stopped:
            continue
    assert found.state == "written"
    assert len(seen) > total
    assert len(seen) <= total * 3 / 2 + 1, "finished batches were done again"
    same_files(tmp_path / "unstopped", tmp_path / "stopped")
    again = world.run(tmp_path / "stopped", layers_at_once=window, on_progress=stop)
    assert again.state == "already complete"


def test_a_killed_process_leaves_nothing_that_looks_complete(world: World, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from prismoe.calibrate import CalibrateConfig, calibrate
def stop(what, done, total):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
calibrate({str(world.model)!r}, CalibrateConfig(**{ {**SMALL, "save_seconds": 0.0}!r}), out={str(tmp_path / "out")!r},
          domains={[str(domain.folder) for domain in world.domains]!r}, on_progress=stop)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, env=dict(os.environ))
    assert done.returncode == -9, done.stderr.decode()
    with pytest.raises(InputError, match="not a finished calibration"):
        Calibration.open(tmp_path / "out")
    world.run(tmp_path / "out", save_seconds=0.0)
    world.run(tmp_path / "whole")
    same_files(tmp_path / "out", tmp_path / "whole")


def test_scratch_that_was_taken_away_is_an_error(world: World, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        world.run(tmp_path / "out", save_seconds=0.0, on_progress=stop)
    (tmp_path / "out" / "scratch" / "importance-00001.bin").unlink()
    with pytest.raises(InputError, match=r"importance-00001\.bin: scratch file is gone or cut"):
        world.run(tmp_path / "out")
    assert world.run(tmp_path / "out", force=True).state == "written"


def test_the_batch_size_changes_no_more_than_rounding(world: World, tmp_path: Path) -> None:
    one, many = world.run(tmp_path / "one", batch_size=1), world.run(tmp_path / "many", batch_size=16)
    for layer in range(one.num_layers):
        left, right = one.layer(layer), many.layer(layer)
        for name in ("mean", "mean_abs", "mean_square", "importance", "inputs"):
            close(getattr(right, name), getattr(left, name), limit=1e-5)


def test_dry_run_says_what_is_needed_and_writes_nothing(world: World, tmp_path: Path) -> None:
    config = CalibrateConfig(**SMALL)
    planned = calibrate(world.model, config, domains=world.domains, out=tmp_path / "out", dry_run=True)
    assert (planned.state, planned.num_sequences, planned.num_tokens) == ("dry run", 20, 480)
    assert not (tmp_path / "out").exists()
    written = world.run(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("layer-*"))
    assert size <= planned.disk_bytes
    assert written.memory_bytes == planned.memory_bytes


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"clusters": 21}, UsageError, "calibrate.clusters: 20 sequences for 21 data clusters; needed"),
        ({"max_tokens": 24 * 2, "clusters": 1}, UsageError, "domain github: no sequence of 24 among 48 tokens"),
        ({"seq_len": 5000}, InputError, "config.json: 256 positions; needed seq_len 5000"),
        ({"seq_len": 1}, UsageError, "calibrate.seq_len: 1; needed at least 2"),
        ({"marks_per_token": 97}, UsageError, "calibrate.marks_per_token: 97 marks a token among 96 neurons"),
        ({"device": "cuda"}, UsageError, "calibrate.device: no cuda here; needed auto or cpu"),
        ({"weights": {"arxiv": 1.0}}, UsageError, "weights: no weight for books, github"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    world: World, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        world.run(tmp_path / "out", **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantities": ("importanse",)}, "did you mean importance?"),
        ({"quantities": ()}, "no quantities; needed some of activation"),
        ({"clusters": "topics"}, "calibrate.clusters: 'topics'"),
        ({"importance": "l2"}, "calibrate.importance: 'l2'"),
        ({"max_tokens": 0}, "calibrate.max_tokens: 0"),
        ({"device": "tpu"}, "calibrate.device: 'tpu'"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CalibrateConfig(**settings)
    assert message in str(caught.value)


def test_text_that_is_all_the_same_has_no_clusters(tmp_path: Path) -> None:
    model = tiny_dense(tmp_path / "model")
    domain = domain_folder(tmp_path / "same", tokenizer=model / "tokenizer.json")
    tokens = np.memmap(domain / "train.tokens", "<u2", mode="r+")
    tokens[:] = 5
    tokens.flush()
    world = World(model, (Domain.open(domain),))
    with pytest.raises(InputError, match=r"clusters: 1 different sequences, so a cluster would be without tokens"):
        world.run(tmp_path / "out")


def test_damaged_weights_are_named_by_layer(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    world = make_world(tmp_path)
    path = world.model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="calibrate: loss is not finite"):
        world.run(tmp_path / "out", quantities=("importance",))
    with pytest.raises(NumericalError, match="layer 2: output is not finite"):
        world.run(tmp_path / "out1")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = 0
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1: mean is not finite"):
        world.run(tmp_path / "out2", quantities=("activation",))


def test_an_output_folder_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("private")
    with pytest.raises(ResourceError, match="holds something else"):
        world.run(tmp_path / "mine", force=True)
    world.run(tmp_path / "out", quantities=("marks",), clusters=1)
    with pytest.raises(ResourceError, match="a different job"):
        world.run(tmp_path / "out", quantities=("activation",), clusters=1)


def test_a_damaged_result_is_refused(world: World, tmp_path: Path) -> None:
    found = world.run(tmp_path / "out")
    path = tmp_path / "out" / "layer-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"layer-00001.safetensors: \d+ bytes; needed \d+ bytes"):
        Calibration.open(tmp_path / "out")
    path.write_bytes((tmp_path / "out" / "layer-00000.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"layer-00001.safetensors: holds layer 0"):
        found.layer(1)
    with pytest.raises(InputError, match="no layer 3; needed 0 to 2"):
        found.layer(3)
