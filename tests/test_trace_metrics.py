"""Every definition of docs/routing.md against loops over plain numbers, on a real trace and on cases known by heart."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from tokenizers import Tokenizer

from prismoe.errors import InputError
from prismoe.routing import metrics
from prismoe.routing.findings import describe_trace, write_traces
from prismoe.routing.record import RoutingTrace
from prismoe.routing.tokens import favourite_tokens, visible
from prismoe.routing.trace import trace
from tests.training import domain_folder, tiny_moe

G, L, E, K = 3, 2, 4, 2


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("moe") / "moe")


@pytest.fixture(scope="module")
def domains(moe, tmp_path_factory):
    base = tmp_path_factory.mktemp("domains")
    return [domain_folder(base / name, tokenizer=moe / "tokenizer.json", seed=i) for i, name in enumerate("abc")]


@pytest.fixture(scope="module")
def real(moe, domains):
    return trace(moe, domains, seq_len=40, sample_tokens=256)


@pytest.fixture(scope="module")
def marked(real):
    """The same with its last domain a benchmark."""
    return replace(real, kinds=("train", "train", "benchmark"))


def made(load_GLE, **other):
    """A trace of these loads; what does not follow from them is zero."""
    load = np.array(load_GLE, np.int64)
    domains, layers, experts = load.shape
    together = np.stack([np.diag(row) for row in load.sum(0)])
    values = {
        "domains": tuple("abcdefg"[:domains]),
        "kinds": ("train",) * domains,
        "layers": tuple(range(layers)),
        "num_experts": experts,
        "top_k": 1,
        "tokens_G": load.sum(-1)[:, 0],
        "load_GLE": load,
        "importance_GLE": load.astype(float),
        "coactivation_LEE": together,
        "entropy_GL": np.zeros((domains, layers)),
        "norm_GL": np.ones((domains, layers)),
        "sample_tokens_GS": np.zeros((domains, 0), np.int32),
        "sample_experts_GSLK": np.zeros((domains, 0, layers, 1), np.int16),
        "sample_weights_GSLK": np.zeros((domains, 0, layers, 1), np.float32),
        "provenance": {
            "model": {"folder": "x", "fingerprint": "f"},
            "seed": 0,
            "seq_len": 2,
            "max_tokens": 2,
            "texts": {},
        },
    }
    return RoutingTrace(**{**values, **other})


def fraction(found, g, l, e):  # noqa: E741 - the letter of the formula
    return int(found.load_GLE[g, l, e]) / (int(found.tokens_G[g]) * K)


def test_fractions_and_distances(real):
    f = metrics.load_fractions(real)
    assert f.shape == (G, L, E)
    assert np.allclose(f.sum(-1), 1)
    last, mean = (metrics.distance_matrix(real, layers=layers) for layers in ("last", "mean"))
    for g, h in product(range(G), repeat=2):
        per_layer = [
            math.sqrt(sum((fraction(real, g, l, e) - fraction(real, h, l, e)) ** 2 for e in range(E)))
            for l in range(L)  # noqa: E741
        ]
        assert last[g, h] == pytest.approx(per_layer[-1], abs=1e-15)
        assert mean[g, h] == pytest.approx(sum(per_layer) / L, abs=1e-15)


def test_compat_scaling_is_the_published_one(real):
    """Each vector stretched to 0…1; for "mean" the vectors are averaged over layers first."""
    for layers in ("last", "mean"):
        vectors = []
        for g in range(G):
            row = [int(n) for n in real.load_GLE[g, -1]]
            if layers == "mean":
                row = [sum(int(real.load_GLE[g, l, e]) for l in range(L)) / L for e in range(E)]  # noqa: E741
            low, high = min(row), max(row)
            vectors.append([(n - low) / (high - low) for n in row])
        found = metrics.distance_matrix(real, layers=layers, scaling="compat")
        for g, h in product(range(G), repeat=2):
            assert found[g, h] == pytest.approx(math.dist(vectors[g], vectors[h]), rel=1e-12)


def test_equal_loads_divide_by_nothing():
    even = made([[[2, 2]], [[4, 0]]])
    assert metrics.routing_vectors(even, scaling="compat").tolist() == [[0, 0], [1, 0]]
    assert metrics.distance_matrix(even, scaling="compat")[0, 1] == 1
    assert metrics.distance_matrix(even)[0, 1] == pytest.approx(math.sqrt(0.5))


def test_variance_over_domains_leaves_benchmarks_out(marked):
    found = metrics.load_variance(marked)
    for l in range(L):  # noqa: E741
        total = 0.0
        for e in range(E):
            values = [fraction(marked, g, l, e) for g in (0, 1)]
            total += sum((v - sum(values) / 2) ** 2 for v in values) / 2
        assert found[l] == pytest.approx(total / E, rel=1e-12)


def test_cv_squared(real):
    for of, numbers in (("load", real.load_GLE), ("importance", real.importance_GLE)):
        found = metrics.cv_squared(real, of=of)
        for g, l in product(range(G), range(L)):  # noqa: E741
            values = [float(n) for n in numbers[g, l]]
            mean = sum(values) / E
            assert found[g, l] == pytest.approx(sum((v - mean) ** 2 for v in values) / E / mean**2, rel=1e-12)
    # FACTS: loads [2, 1, 2, 1] have CV² 1/9; a single expert has E - 1.
    assert metrics.cv_squared(made([[[2, 1, 2, 1]], [[6, 0, 0, 0]]])).tolist() == [[pytest.approx(1 / 9)], [3.0]]


def test_mutual_information(marked):
    """I(domain; expert) = H(expert) - H(expert | domain), entropies summed by hand."""

    def entropy(p):
        return -sum(x * math.log2(x) for x in p if x > 0)

    found = metrics.mutual_information(marked)
    for l in range(L):  # noqa: E741
        rows = [[fraction(marked, g, l, e) for e in range(E)] for g in (0, 1)]
        whole = [sum(column) / 2 for column in zip(*rows, strict=True)]
        assert found[l] == pytest.approx(entropy(whole) - sum(map(entropy, rows)) / 2, abs=1e-12)
    assert metrics.mutual_information(made([[[5, 0]], [[0, 9]]])).tolist() == [1.0]
    assert metrics.mutual_information(made([[[5, 5]], [[9, 9]]])).tolist() == [0.0]


def test_lift_is_one_where_choices_are_independent(real):
    lift, tokens = metrics.coactivation_lift(real), int(real.tokens_G.sum())
    for l, i, j in product(range(L), range(E), range(E)):  # noqa: E741
        if i == j:
            assert np.isnan(lift[l, i, j])
            continue
        n_i, n_j = (int(real.load_GLE[:, l, e].sum()) for e in (i, j))
        expected = n_i * n_j / tokens * (K - 1) * E / (K * (E - 1))
        assert lift[l, i, j] == pytest.approx(int(real.coactivation_LEE[l, i, j]) / expected, rel=1e-12)
    draw = np.random.default_rng(0)
    chosen = np.array([draw.permutation(6)[:3] for _ in range(20_000)])
    marks = np.zeros((len(chosen), 6), np.int64)
    np.put_along_axis(marks, chosen, 1, axis=1)
    even = made(
        marks.sum(0)[None, None], top_k=3, tokens_G=np.array([20_000]), coactivation_LEE=(marks.T @ marks)[None]
    )
    assert np.nanmax(np.abs(metrics.coactivation_lift(even) - 1)) < 0.03
    assert np.isnan(metrics.coactivation_lift(made([[[3, 3]]]))).all()


def test_dead_and_dominant_experts_are_named():
    loads = [[[30, 0, 45, 25], [25, 25, 25, 25]], [[40, 1, 34, 25], [0, 100, 0, 0]]]
    found = made(loads)
    dead = metrics.dead_experts(found)
    assert np.argwhere(dead).tolist() == [[0, 0, 1], [1, 0, 1], [1, 1, 0], [1, 1, 2], [1, 1, 3]]
    assert not metrics.dead_experts(made([[[2, 38, 60, 60]]]), threshold=0.05).any()  # 1.25 % is the limit: 2/160
    assert np.argwhere(metrics.dominant_experts(found)).tolist() == [[1, 1, 1]]
    receipt = describe_trace(found)
    assert receipt.dead[0] == {"layer": 0, "expert": 1, "domains": ["a", "b"]}
    assert receipt.sentences[0] == "layer 0: expert 1 dead on all 2 domains"
    assert "layer 1: expert 1 dominant on b" in receipt.sentences
    both = made([[[0, 5, 0, 5]] * 2, [[0, 5, 0, 5]] * 2])
    assert describe_trace(both).sentences[0] == "layers 0, 1: experts 0, 2 dead on all 2 domains"


def test_entropy_and_affinity(marked):
    assert metrics.normalised_entropy(marked) == pytest.approx(marked.entropy_GL / math.log(4))
    found = metrics.domain_affinity(marked)
    for g, l, e in product(range(G), range(L), range(E)):  # noqa: E741
        mean = (fraction(marked, 0, l, e) + fraction(marked, 1, l, e)) / 2
        assert found[g, l, e] == pytest.approx(fraction(marked, g, l, e) / mean)


def test_drift(moe, real, domains, tmp_path):
    assert not metrics.drift(real, real).moved_GL.any()
    assert (metrics.drift(real, real).kept_GL == 1).all()
    other = trace(tiny_moe(tmp_path / "other", seed=5), domains, seq_len=40, sample_tokens=256)
    found = metrics.drift(real, other)
    for g, l in product(range(G), range(L)):  # noqa: E741
        moved = sum(abs(fraction(real, g, l, e) - fraction(other, g, l, e)) for e in range(E)) / 2
        assert found.moved_GL[g, l] == pytest.approx(moved, rel=1e-12)
        kept = [
            len({*map(int, real.sample_experts_GSLK[g, s, l])} & {*map(int, other.sample_experts_GSLK[g, s, l])}) / K
            for s in range(real.sample_tokens_GS.shape[1])
            if real.sample_tokens_GS[g, s] >= 0
        ]
        assert found.kept_GL[g, l] == pytest.approx(sum(kept) / len(kept), rel=1e-12)
    with pytest.raises(InputError, match="different text"):
        metrics.drift(real, trace(moe, domains, seq_len=40, sample_tokens=256, seed=3))
    with pytest.raises(InputError, match="domains"):
        metrics.drift(real, replace(real, domains=("a", "b", "x")))


def test_the_receipt_names_the_nearest_domains(marked):
    receipt = describe_trace(marked, before=marked)
    matrix = metrics.distance_matrix(marked, layers="mean")
    assert f"a and b are nearest ({matrix[0, 1]:.3f}): L2 between load fractions, mean over layers" in receipt.sentences
    near = min((0, 1), key=lambda g: matrix[2, g])
    assert f"c is nearest to {'ab'[near]} ({matrix[2, near]:.3f})" in receipt.sentences
    assert receipt.sentences[-1].startswith("since the earlier model 0 % of the load moved")
    assert [row["layer"] for row in receipt.per_layer] == [0, 1]


def test_a_folder_of_traces_is_complete(real, tmp_path):
    write_traces(tmp_path / "out", real, before=real)
    assert RoutingTrace.open(tmp_path / "out").to_dict() == real.to_dict()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("trace.safetensors", "before.safetensors", "manifest.json", "prismoe.json")
    }


def test_favourite_tokens(moe, real):
    found = favourite_tokens(real, moe, most=3, contexts=2, around=4, least=4)
    tokenizer = Tokenizer.from_file(str(moe / "tokenizer.json"))
    tokens = real.sample_tokens_GS.ravel()
    experts = real.sample_experts_GSLK.reshape(-1, L, K)
    real_places = [place for place in range(len(tokens)) if tokens[place] >= 0]
    assert found
    for one in found:
        there = [place for place in real_places if tokens[place] == one.token]
        chosen = [place for place in there if one.expert in experts[place, one.layer]]
        whole = sum(one.expert in experts[place, one.layer] for place in real_places) / len(real_places)
        assert (one.count, one.chosen) == (len(there), len(chosen))
        assert one.lift == pytest.approx(len(chosen) / len(there) / whole)
        assert one.lift > 1
        assert one.count >= 4
        # Every context is text that was read, and the token stands in it where it is said to.
        for context in one.contexts:
            g = real.domains.index(context.domain)
            pieces = "".join(
                "\x00" if token < 0 else tokenizer.decode([token], skip_special_tokens=False).strip()
                for token in real.sample_tokens_GS[g].tolist()
            )
            shown = "".join((context.before + context.token + context.after).split())
            assert shown in pieces
            assert context.token.strip() == tokenizer.decode([one.token]).strip()
    lifts = [one.lift for one in found if (one.layer, one.expert) == (found[0].layer, found[0].expert)]
    assert lifts == sorted(lifts, reverse=True)
    assert len(lifts) <= 3
    # No other token of that expert with as many occurrences has a higher lift.
    first, best = found[0], 0.0
    share = sum(first.expert in experts[place, first.layer] for place in real_places) / len(real_places)
    for token in {int(tokens[place]) for place in real_places}:
        there = [place for place in real_places if tokens[place] == token]
        if len(there) >= 4:
            best = max(best, sum(first.expert in experts[p, first.layer] for p in there) / len(there) / share)
    assert first.lift == pytest.approx(best)


def test_only_the_tokenizer_of_the_text_reads_it(moe, real, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        favourite_tokens(real, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not the tokenizer of the traced text"):
        favourite_tokens(real, tmp_path)


def test_text_of_the_web_cannot_move_the_cursor():
    assert visible("a\x1b[31mb\n\u202ec\u200b") == "a\\x1b[31mb⏎\\u202ec\\u200b"
    assert visible("naïve café 東京") == "naïve café 東京"
