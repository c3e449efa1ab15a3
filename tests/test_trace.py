"""Traces against a loop written by hand over every stock class, and what is refused before long work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prismoe.data.shards import Domain, heldout_windows
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.folder import Manifest, sha256_file
from prismoe.routing.benchmarks import benchmark_files, item_text, read_items
from prismoe.routing.meter import metering
from prismoe.routing.record import RoutingTrace
from prismoe.routing.sample import PIECE, draw_pieces
from prismoe.routing.texts import domain_text
from prismoe.routing.trace import trace
from tests.policies import _OWN, EXPERTS, stock
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

SEQ_LEN = 40


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("moe") / "moe")


@pytest.fixture(scope="module")
def domains(moe, tmp_path_factory):
    base = tmp_path_factory.mktemp("domains")
    return [domain_folder(base / name, tokenizer=moe / "tokenizer.json", seed=i) for i, name in enumerate("ab")]


@pytest.fixture(scope="module")
def traced(moe, domains):
    return trace(moe, domains, seq_len=SEQ_LEN, sample_tokens=256)


def by_hand(folder, domain):
    """Every window alone in float64, the routing formula written out: chosen [T, L, K], weights, entropy [T, L]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    caught: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda m, i, o, n=name: outputs.__setitem__(n, o[0]))
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(lambda m, i, o, n=name: caught.__setitem__(n, i[0] @ m.weight.T))
    rows = []
    for ids, _ in heldout_windows(Domain.open(domain), seq_len=SEQ_LEN):
        with torch.no_grad():
            model(input_ids=torch.from_numpy(ids)[None])
        for place in range(1, len(ids)):  # the opening token is not text
            for layer, (router, block) in enumerate(zip(caught.values(), outputs.values(), strict=True)):
                probability = router[place].softmax(-1)
                kept = probability.topk(2)
                rows.append(
                    (
                        layer,
                        kept.indices.tolist(),
                        (kept.values / kept.values.sum()).tolist(),
                        float(-(probability * probability.log()).sum()),
                        float(block[place].norm()),
                    )
                )
    return rows


def test_a_trace_is_the_definition(moe, domains, traced):
    together = np.zeros((2, 4, 4), np.int64)
    for number, domain in enumerate(domains):
        rows = by_hand(moe, domain)
        load, importance = np.zeros((2, 4), np.int64), np.zeros((2, 4))
        for layer, chosen, weights, _, _ in rows:
            load[layer, chosen] += 1
            importance[layer, chosen] += weights
            together[layer][np.ix_(chosen, chosen)] += 1
        assert traced.tokens_G[number] == len(rows) // 2 == 600
        np.testing.assert_array_equal(traced.load_GLE[number], load)
        np.testing.assert_allclose(traced.importance_GLE[number], importance, rtol=1e-5)
        for layer in range(2):
            entropy, norm = (np.mean([row[which] for row in rows if row[0] == layer]) for which in (3, 4))
            assert traced.entropy_GL[number, layer] == pytest.approx(entropy, rel=1e-5)
            assert traced.norm_GL[number, layer] == pytest.approx(norm, rel=1e-5)
    np.testing.assert_array_equal(traced.coactivation_LEE, together)
    assert (traced.domains, traced.kinds, traced.layers) == (("a", "b"), ("train", "train"), (0, 1))


def test_the_sample_is_what_was_read(moe, domains, traced):
    """Tokens of the sample stand in the held-out text, in its order, with the experts that they alone get there."""
    assert traced.sample_tokens_GS.shape[1] <= 256
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).eval()
    text = domain_text(Domain.open(domains[0]), seq_len=SEQ_LEN, max_tokens=None, seed=0)
    pieces = draw_pieces(text.spans_W2, size=256, name="a", seed=0)
    assert [piece.place for piece in pieces] == sorted(piece.place for piece in pieces)
    tokens_S, experts_SLK = traced.sample_tokens_GS[0], traced.sample_experts_GSLK[0]
    used = np.zeros(len(tokens_S), bool)
    for piece in pieces:
        begin, end = text.spans_W2[piece.window]
        ids = np.array([text.start_token, *text.tokens[begin:end]], np.int64)
        with torch.no_grad(), metering(model) as meter:
            meter.begin(len(ids))
            model(input_ids=torch.from_numpy(ids)[None])
            chosen_LBTK, weights_LBTK = meter.add()
        here = slice(piece.place, piece.place + piece.length)
        rows = slice(piece.first - 1, piece.first - 1 + piece.length)
        np.testing.assert_array_equal(tokens_S[here], ids[1:][rows])
        np.testing.assert_array_equal(experts_SLK[here], chosen_LBTK[:, 0, rows].transpose(0, 1))
        np.testing.assert_allclose(
            traced.sample_weights_GSLK[0][here], weights_LBTK[:, 0, rows].transpose(0, 1), rtol=1e-5
        )
        assert not used[here].any()
        used[here] = True
    assert (tokens_S[~used] == -1).all()
    assert (experts_SLK[~used] == -1).all()


def test_every_token_is_as_likely_to_be_sampled(moe, domains):
    """Over many seeds each piece of an uneven text is drawn about equally often."""
    spans = np.array([[0, 300], [300, 420], [420, 430]], np.int64)
    counts = np.zeros(430)
    for seed in range(800):
        for piece in draw_pieces(spans, size=130, name="x", seed=seed):
            begin = spans[piece.window][0] + piece.first - 1
            counts[begin : begin + piece.length] += 1
    assert len({(p.window, p.first) for p in draw_pieces(spans, size=10_000, name="x", seed=0)}) == 5 + 2 + 1
    full = [counts[begin] for begin in (0, 64, 128, 192, 300)]  # pieces of 64
    assert np.std(full) / np.mean(full) < 0.15
    assert PIECE == 64


def test_batch_size_changes_no_count(moe, domains):
    one, many = (trace(moe, domains, seq_len=SEQ_LEN, batch_size=size) for size in (1, 64))
    for name in ("tokens_G", "load_GLE", "coactivation_LEE", "sample_tokens_GS", "sample_experts_GSLK"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    np.testing.assert_allclose(one.importance_GLE, many.importance_GLE, rtol=1e-6)


def test_the_same_call_gives_the_same_bytes(moe, domains, traced, tmp_path):
    again = trace(moe, domains, seq_len=SEQ_LEN, sample_tokens=256)
    for name, one in (("first", traced), ("second", again)):
        one.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    other = trace(moe, domains, seq_len=SEQ_LEN, sample_tokens=256, seed=1)
    assert not np.array_equal(other.sample_tokens_GS, traced.sample_tokens_GS)
    np.testing.assert_array_equal(other.load_GLE, traced.load_GLE)  # all of the text is read, whatever is sampled


def test_a_part_of_the_text_is_drawn_by_seed(moe, domains):
    parts = [trace(moe, domains[:1], seq_len=SEQ_LEN, max_tokens=200, sample_tokens=128, seed=seed) for seed in (0, 1)]
    for part in parts:
        assert 161 < part.tokens_G[0] <= 200
    assert not np.array_equal(parts[0].load_GLE, parts[1].load_GLE)


@pytest.mark.parametrize("model_type", ["mixtral", *_OWN])
def test_every_stock_class_is_traced(model_type):
    """Loads, weights and the output norm of each class, layers that stay dense and shared experts included."""
    model = stock(model_type).eval()
    ids = torch.randint(3, 32, (3, 9), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[torch.Tensor, ...]] = []
    norms: list[float] = []
    with torch.no_grad(), metering(model) as meter:
        routers = [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "num_experts")]
        layer = model.model.layers[-1]
        block = getattr(layer, "block_sparse_moe", None) or layer.mlp
        parts = [part for part in (block, getattr(layer, "shared_mlp", None)) if part is not None]
        kept: list[torch.Tensor] = []
        handles = [part.register_forward_hook(lambda m, i, o: kept.append(o)) for part in parts]
        handles += [
            router.register_forward_hook(lambda m, i, o: seen.append(o))
            for router in routers
            if "weight" in router._parameters or hasattr(router, "wg")
        ]
        meter.begin(9)
        model(input_ids=ids)
        meter.add()
        taken = meter.take()
        for handle in handles:
            handle.remove()
    norms = sum(kept).reshape(3, 9, -1)[:, 1:].double().norm(dim=-1)
    assert meter.layers == (0, 1)
    assert len(seen) == 2
    for layer_number, (logits, weights, chosen) in enumerate(seen):
        rows = chosen.reshape(3, 9, 2)[:, 1:].reshape(-1)
        np.testing.assert_array_equal(taken.load_LE[layer_number], torch.bincount(rows, minlength=EXPERTS))
        total = weights.reshape(3, 9, 2)[:, 1:].double().sum()
        assert taken.importance_LE[layer_number].sum() == pytest.approx(float(total), rel=1e-6)
        probability = logits.reshape(3, 9, -1)[:, 1:].double().softmax(-1)
        assert taken.entropy_L[layer_number] == pytest.approx(-float((probability * probability.log()).sum()), rel=1e-5)
    assert taken.norm_L[1] == pytest.approx(float(norms.sum()), rel=1e-5)
    assert taken.tokens == 24
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_stay_dense_have_no_row(tmp_path, domains):
    settings = {"model_type": "qwen3_moe", "mlp_only_layers": [0], "num_hidden_layers": 3}
    folder = tiny_moe(tmp_path / "mixed", **settings)
    found = trace(folder, domains[:1], seq_len=SEQ_LEN)
    assert found.layers == (1, 2)
    assert found.load_GLE.shape == (1, 2, 4)


def test_benchmarks_are_further_domains(moe, domains, tmp_path):
    rows = [{"question": "Who said it?", "choices": ["the girl", "the king"], "answer": 1}] * 3
    path = tmp_path / "who.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = trace(moe, domains, benchmarks=str(path), seq_len=SEQ_LEN)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(moe / "tokenizer.json")).encode("Who said it? the king").ids
    assert (found.domains, found.kinds) == (("a", "b", "who"), ("train", "train", "benchmark"))
    assert found.tokens_G[2] == 3 * len(ids)
    assert found.sample_tokens_GS[2, : len(ids) + 1].tolist() == [*ids, -1]
    assert found.provenance["texts"]["who"] == sha256_file(path)
    assert trace(moe, domains, benchmarks=str(path), seq_len=SEQ_LEN, max_tokens=len(ids)).tokens_G[2] == len(ids)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"content": "plain text", "question": "no"}, "plain text"),
        ({"question": "Q?", "answer": "A."}, "Q? A."),
        ({"question": "Q?", "answer": ["first", "second"]}, "Q? first"),
        ({"passage": "P.", "question": "q", "answer": True}, "P. q yes"),
        ({"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, "Q? y"),
        ({"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, "Q? y"),
        ({"ctx": "He ran", "endings": ["away", "home"], "label": 1}, "He ran home"),
        ({"ctx": "He ran", "endings": ["away", "home"], "label": "0"}, "He ran away"),
        ({"context": "C.", "question": "Q?", "options": ["x", "y"], "label": "b"}, "C. Q? y"),
        ({"goal": "To do", "sol1": "this", "sol2": "that", "label": 1}, "To do that"),
        ({"sentence": "A saw B, so _ left.", "option1": "A", "option2": "B", "answer": "2"}, "A saw B, so B left."),
        ({"question": "Q?", "choices": ["x"], "answer": 7}, "Q?"),
        ({"id": "Mercury", "turns": ["no question"]}, ""),
    ],
)
def test_items_read_as_question_and_right_answer(row, text):
    assert item_text(row) == text


def test_the_papers_benchmarks_are_read(shared):
    names = ("hellaswag_val", "arc_challenge_test", "gsm8k_test")
    files = benchmark_files([str(shared / "eval" / f"{name}.jsonl") for name in names])
    first = {name: next(read_items(path)).text for name, path in files.items()}
    assert tuple(first) == names
    assert first["arc_challenge_test"].endswith("in rotation? Planetary days will become shorter.")
    assert first["gsm8k_test"].endswith("#### 18")


def test_bad_benchmarks(moe, domains, tmp_path):
    def refused(text, name="x.jsonl"):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError) as caught:
            trace(moe, domains, benchmarks=[str(tmp_path / name)], seq_len=SEQ_LEN)
        return str(caught.value)

    assert "x.jsonl:1: invalid JSON" in refused("{")
    assert "x.jsonl:2: a JSON list" in refused('{"text": "a"}\n[]')
    assert "no text in any row" in refused('{"id": 1}')
    assert ".jsonl" in refused("a", name="x.csv")
    assert "two texts called a" in refused('{"text": "a"}', name="a.jsonl")
    with pytest.raises(InputError, match="no benchmark file"):
        trace(moe, domains, benchmarks=str(tmp_path / "none.jsonl"), seq_len=SEQ_LEN)


def test_what_cannot_be_traced_is_told_in_a_line(moe, domains, tmp_path):
    dense = tiny_dense(tmp_path / "dense")
    with pytest.raises(InputError, match=r"dense.*no router in it"):
        trace(dense, domains, seq_len=SEQ_LEN)
    with pytest.raises(UsageError, match="nothing to trace"):
        trace(moe, [], seq_len=SEQ_LEN)
    with pytest.raises(UsageError, match="no cuda here"):
        trace(moe, domains, seq_len=SEQ_LEN, device="cuda")
    other = domain_folder(tmp_path / "other", tokenizer=moe / "config.json")
    with pytest.raises(InputError, match="another tokenizer"):
        trace(moe, [other], seq_len=SEQ_LEN)
    with pytest.raises(InputError, match="positions"):
        trace(moe, domains, seq_len=4096)
    empty = domain_folder(tmp_path / "empty", tokenizer=moe / "tokenizer.json")
    (empty / "heldout.ends").write_bytes(b"")
    written = json.loads((empty / "manifest.json").read_text())
    written["config"]["splits"]["heldout"] = dict.fromkeys(written["config"]["splits"]["heldout"], 0)
    written["config"]["shards"]["heldout"] = []
    del written["sha256"]
    (empty / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="no held-out text"):
        trace(moe, [empty], seq_len=SEQ_LEN)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [("model.norm.weight", "logits are not finite"), ("block_sparse_moe.experts.3.w2.weight", "logits are not finite")],
)
def test_numbers_that_are_none(moe, domains, tmp_path, tensor, message):
    broken = shutil.copytree(moe, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith(tensor))
    weights[name][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=message):
        trace(broken, domains, seq_len=SEQ_LEN)


def test_a_trace_is_read_as_it_was_written(traced, tmp_path):
    (tmp_path / "trace").mkdir()
    traced.save(tmp_path / "trace" / "trace.safetensors")
    for place in (tmp_path, tmp_path / "trace", tmp_path / "trace" / "trace.safetensors"):
        found = RoutingTrace.open(place)
        assert found.to_dict() == traced.to_dict()
        np.testing.assert_array_equal(found.sample_experts_GSLK, traced.sample_experts_GSLK)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.provenance["model"]["fingerprint"]
    assert set(found.provenance["texts"]) == {"a", "b"}


def test_damaged_traces_are_refused(traced, tmp_path):
    path = tmp_path / "trace.safetensors"
    for change, words in (
        ({"load_GLE": traced.load_GLE + 1}, "do not add up"),
        ({"domains": ("a",)}, "shape"),
        ({"kinds": ("train",)}, "kinds"),
        ({"coactivation_LEE": traced.coactivation_LEE * 2}, "diagonal"),
        ({"norm_GL": traced.norm_GL * np.nan}, "not finite"),
        ({"sample_experts_GSLK": traced.sample_experts_GSLK + 9}, "unknown experts"),
    ):
        replace(traced, **change).save(path)
        with pytest.raises(InputError, match=words):
            RoutingTrace.open(path)
    traced.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        RoutingTrace.open(path)
    with pytest.raises(InputError, match="no trace in it"):
        RoutingTrace.open(tmp_path / "..")
    assert Manifest.read(tmp_path) is None


def test_every_bit_of_a_trace_counts(traced, tmp_path):
    """It stands in no manifest when it is given by its name: its own seal sees what counts alone would not."""
    path = tmp_path / "trace.safetensors"
    traced.save(path)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in {*range(0, header, 31), *draw.integers(header, len(whole), 60).tolist()}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"trace\.safetensors"):
            RoutingTrace.open(path)
    replace(traced, top_k=traced.top_k).save(path)
    assert path.read_bytes() == whole
