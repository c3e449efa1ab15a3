"""The certificate holds for honest conversions, reads back, is kept, and refuses what it cannot judge."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import make_plan
from prismoe.verify import Certificate, chain, stock, verify
from tests.conversions import CASES, check, converted, numbers
from tests.tiny import tiny_dense


@pytest.mark.parametrize("case", CASES)
def test_an_honest_conversion_passes(case: str, tmp_path: Path) -> None:
    folder = converted(tmp_path, case)
    certificate = check(folder)
    found = numbers(certificate)
    assert certificate.passed
    assert found["files"] == found["recipes"] == found["carried"] == found["loading"] == found["routing"] == 0
    assert 0 < found["plan"] <= 5e-6
    assert len(certificate.layers) == 3
    assert certificate.whole.startswith("loaded whole")
    kinds = {layer.kind for layer in certificate.layers}
    if case == "sharing":
        assert kinds == {"sharing"}
        assert "logits" not in found
        assert "all_experts" not in found
    elif case == "llama upcycled":
        assert kinds == {"upcycling"}
        assert found["upcycled"] <= 1e-6
        assert all(layer.norm_ratio == pytest.approx(1, abs=1e-6) for layer in certificate.layers)
    else:
        assert kinds == ({"dense", "partition"} if case == "qwen3, odd layers" else {"partition"})
        assert 0 < found["all_experts"] <= 5e-6
    if case != "sharing":
        assert 0 < found["logits"] <= 1e-4


def test_certificate_is_in_the_folder_and_reads_back(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    certificate = check(folder)
    assert Certificate.read(folder) == certificate
    written = json.loads((folder / "certificate.json").read_text())
    assert written == certificate.to_dict()
    assert written["passed"] is True
    assert written["source"] == Checkpoint.open(folder.parent / "dense").fingerprint
    assert written["versions"]["transformers"]
    assert written["num_tokens"] == 128
    Manifest.read(folder).check(folder)  # type: ignore[union-attr]  # the certificate disturbs no file of the manifest


def test_a_scale_that_bfloat16_cannot_fold_is_allowed_for_and_named(tmp_path: Path) -> None:
    """6 experts top-2 have scale 3: folding it rounds down_proj by up to one part in 256, far above 5e-6."""
    source = tiny_dense(tmp_path / "dense", dtype="bfloat16")
    convert(source, make_plan(source, num_experts=6), target="mixtral", out=tmp_path / "moe")
    certificate = check(tmp_path / "moe")
    checks = {check.name: check for check in certificate.checks}
    assert 1e-4 < checks["all_experts"].measured < 2**-8
    assert checks["all_experts"].limit == pytest.approx(5e-6 + 2**-8)
    assert checks["logits"].limit is None
    assert checks["logits"].measured > 1e-4
    assert certificate.passed


def test_one_layer_models_chained_are_the_whole_stock_model_bit_for_bit(tmp_path: Path) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    source = tiny_dense(tmp_path, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0, **layers)
    dense = Checkpoint.open(source)
    ids = torch.arange(40) % 128
    whole, loading = stock.load_whole(dense)
    assert loading.problems == []
    ends, _ = stock.load_ends(dense)
    hidden = ends.embed(ids)
    for layer in range(3):
        hidden = stock.load_layer(dense, layer)[0].run(hidden).hidden_TD
    with torch.no_grad():
        assert torch.equal(ends.logits(hidden), whole(ids[None]).logits[0])


def test_only_one_layer_is_alive_at_a_time(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    found = []

    def alive() -> int:
        return sum(type(thing).__name__.endswith("DecoderLayer") for thing in gc.get_objects())

    def watch(what: str, done: int, total: int) -> None:
        if what == "verify layers":
            found.append(alive())

    gc.collect()
    before = alive()  # other tests may hold models
    check(folder, on_progress=watch)
    assert found == [before] * 4


def test_a_certificate_is_kept_until_something_changes(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    steps: list[str] = []

    def watch(what: str, done: int, total: int) -> None:
        steps.append(what)

    first = check(folder, on_progress=watch)
    assert {"verify files", "verify tensors", "verify layers"} <= set(steps)
    steps.clear()
    assert check(folder, on_progress=watch) == first
    assert steps == []
    assert check(folder, tokens=16, on_progress=watch).num_tokens == 16
    assert steps
    steps.clear()
    check(folder, tokens=16, force=True, on_progress=watch)
    assert steps
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": 2 * weights["model.norm.weight"]}, folder / "model.safetensors")
    for _ in range(2):  # a kept certificate that failed fails again
        with pytest.raises(NumericalError, match=r"check 'files' failed: .*: 1; also failed: recipes, carried, "):
            check(folder)


def test_same_bytes_each_time(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    check(folder)
    first = (folder / "certificate.json").read_bytes()
    check(folder, force=True)
    assert (folder / "certificate.json").read_bytes() == first


def test_a_model_that_does_not_fit_is_proved_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    whole = check(folder)
    monkeypatch.setattr(chain, "available_memory", lambda: 100_000)
    chained = check(folder, force=True)
    assert chained.whole == "not loaded whole: 0.0 GB of memory needed, 0.0 GB available"
    assert chained.passed
    assert numbers(chained) == numbers(whole)  # the chain is the whole model bit for bit


def test_not_a_finished_folder(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json; needed a finished output of convert"):
        check(folder)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        check(tmp_path / "nowhere")


def test_another_source_is_refused(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    other = tiny_dense(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is not the checkpoint this folder was made from"):
        check(folder, source=other)
    with pytest.raises(InputError, match="no such folder"):
        check(folder, source=tmp_path / "gone")


def test_no_tokens_and_no_source(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    with pytest.raises(UsageError, match=r"tokens is 0; needed 1 or more"):
        check(folder, tokens=0)
    with pytest.raises(UsageError, match=r"source is not set; needed the dense checkpoint \(hint: source=FOLDER\)"):
        verify(folder)


def test_a_width_that_the_stock_class_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three neurons an expert, not padded: transformers loads it, and its matrix products need 16-byte strides."""
    source = tiny_dense(tmp_path / "dense")
    monkeypatch.setattr("prismoe.target.ROW_BYTES", 4)  # as if convert did not know
    convert(source, make_plan(source, num_experts=32), pad_to=1, out=tmp_path / "moe")
    with pytest.raises(InputError, match=r"loads it and cannot run it: .* \(hint: convert with pad_to=32\)"):
        check(tmp_path / "moe")


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path) -> None:
    folder = converted(tmp_path, "llama to mixtral")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 500 + number for token, number in vocabulary.items()}
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="ids below 128"):
        check(folder)


def test_without_a_tokenizer_the_ids_are_seeded(tmp_path: Path) -> None:
    source = tiny_dense(tmp_path / "dense")
    (source / "tokenizer.json").unlink()
    convert(source, make_plan(source, num_experts=4), target="mixtral", out=tmp_path / "moe")
    assert check(tmp_path / "moe").input.startswith("seeded random ids")


def test_nothing_is_printed_and_transformers_is_left_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    folder = converted(tmp_path, "llama to mixtral")
    capfd.readouterr()
    check(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
@pytest.mark.parametrize("method", ["random", "upcycle"])
def test_golden_text_and_logits(name: str, method: str, shared: Path, tmp_path: Path) -> None:
    """The MoE with all experts on, and the upcycled MoE as it is, give what llama2.c's equations give."""
    source = shared / "models" / name
    golden = json.loads((source / "reference.json").read_text())
    plan = make_plan(source, method=method, num_experts=4)
    convert(source, plan, target="mixtral", out=tmp_path)
    certificate = verify(tmp_path, source=source)
    assert certificate.passed
    model, loading = stock.load_whole(Checkpoint.open(tmp_path))
    assert loading.problems == []
    parts = list(model.model.layers) if method == "random" else []
    with stock.all_experts_on(parts, [4 / 2.0] * len(parts)), torch.no_grad():
        ids = torch.tensor([golden["prompt_ids"]])
        logits = model(ids).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        top = golden["last_position_top8"]
        assert logits[-1].topk(8).indices.tolist() == top["ids"]
        assert logits[-1][top["ids"]].numpy() == pytest.approx(np.array(top["logits"]), abs=5e-5)
        assert float(loss) == pytest.approx(golden["mean_nll_of_prompt"], abs=2e-6)
        start = torch.tensor([golden["greedy_start_ids"]])
        longer = len(golden["greedy_ids"]) - start.shape[1]
        text = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=longer, do_sample=False, eos_token_id=-1
        )
        assert text[0].tolist() == golden["greedy_ids"]
