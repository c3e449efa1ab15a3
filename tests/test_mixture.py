"""The mixture: what it draws, that it loses and repeats nothing, and that any position can be computed at once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe import registry
from prismoe.data.mixture import Mixture
from prismoe.data.permutation import floor_sum, permute, round_keys
from prismoe.data.shards import Domain
from prismoe.data.weights import PRESETS
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest, hash_files

FEW = settings(max_examples=25, deadline=None, database=None)


def numbered(folder: Path, num_tokens: int, *, tokenizer: str = "t", cuts: Sequence[int] = ()) -> Domain:
    """A domain whose i-th id is i, so that a batch says where it was read; in several files, cut at `cuts`."""
    folder.mkdir(parents=True)
    parts = np.split(np.arange(num_tokens, dtype="<u4"), sorted(cuts))
    names = ["train", *(f"train-{number}" for number in range(1, len(parts)))]
    for name, ids in zip(names, parts, strict=True):
        ids.tofile(folder / f"{name}.tokens")
    np.arange(2, dtype="<u4").tofile(folder / "heldout.tokens")
    np.array([[num_tokens, 1]], "<i8").tofile(folder / "train.ends")
    np.array([[2, 1]], "<i8").tofile(folder / "heldout.ends")
    counts = {"num_documents": 1, "num_bytes": 1, "num_unknown": 0}
    splits = {"train": {"num_tokens": num_tokens, **counts}, "heldout": {"num_tokens": 2, **counts}}
    config = {
        "name": folder.name,
        "vocab_size": 1 << 20,
        "start_token": None,
        "end_token": 0,
        "tokenizer_sha256": tokenizer,
        "splits": splits,
        "shards": {
            "train": [
                {
                    "name": name,
                    "counts": {"num_tokens": len(ids), **(counts if name == "train" else dict.fromkeys(counts, 0))},
                }
                for name, ids in zip(names, parts, strict=True)
            ],
            "heldout": [{"name": "heldout", "counts": splits["heldout"]}],
        },
    }
    files = hash_files(folder, sorted(path.name for path in folder.iterdir()))
    Manifest(kind="domain", parents={}, config=config, files=files).write(folder)
    return Domain.open(folder)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Domain]:
    folder = tmp_path_factory.mktemp("domains")
    sizes = {
        "arxiv": 700,
        "books": 1203,
        "c4": 5000,
        "commoncrawl": 999,
        "github": 64,
        "stackexchange": 65,
        "wikipedia": 63,
    }
    return {name: numbered(folder / name, size) for name, size in sizes.items()}


def mixture(domains: dict[str, Domain], weights: dict[str, float] | str, **settings: int | float) -> Mixture:
    chosen = domains.values() if isinstance(weights, str) else [domains[name] for name in weights]
    return Mixture(chosen, weights=weights, **{"seq_len": 16, "batch_size": 8, "max_epochs": float("inf"), **settings})


@st.composite
def weightings(draw: st.DrawFn) -> dict[str, float]:
    """Fractions, some zero and some tiny, of one to seven domains."""
    names = draw(st.lists(st.sampled_from(sorted(PRESETS["llama1"])), min_size=1, max_size=7, unique=True))
    raw = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(1, 10_000)), min_size=len(names), max_size=len(names)))
    if not any(raw):
        raw[0] = 1
    return {name: value / sum(raw) for name, value in zip(names, raw, strict=True)}


@given(n=st.integers(0, 300), m=st.integers(1, 200), a=st.integers(0, 500), b=st.integers(0, 500))
@FEW
def test_floor_sum_is_the_sum(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4), seed=st.integers(0, 2**63))
@FEW
def test_permute_is_a_permutation_of_every_size(sizes: list[int], seed: int) -> None:
    index = np.concatenate([np.arange(size, dtype=np.uint64) for size in sizes])
    size_N = np.repeat(np.array(sizes, np.uint64), sizes)
    keys = np.repeat(np.stack([round_keys(seed, g) for g in range(len(sizes))]), sizes, axis=0)
    image = permute(index, size_N=size_N, keys_NR=keys)
    for part, size in zip(np.split(image, np.cumsum(sizes)[:-1]), sizes, strict=True):
        assert sorted(part.tolist()) == list(range(size))


def test_permute_mixes() -> None:
    """Neighbours do not stay neighbours, and values land evenly: χ² of 16 bins over 64 keys, 99.9 % bound for 15·16."""
    index, bins = np.arange(1000, dtype=np.uint64), np.zeros((16, 16))
    close = 0
    for seed in range(64):
        image = permute(index, size_N=np.full(1000, 1000, np.uint64), keys_NR=np.tile(round_keys(seed), (1000, 1)))
        close += int((np.abs(np.diff(image.astype(np.int64))) == 1).sum())
        np.add.at(bins, (index.astype(int) * 16 // 1000, image.astype(int) * 16 // 1000), 1)
    assert close < 2 * 64 * 999 * 2 / 1000  # two of a thousand values are neighbours of a random one
    expected = 64 * 1000 / 256
    assert ((bins - expected) ** 2 / expected).sum() < 331


@given(
    num_tokens=st.integers(16, 400), batch_size=st.integers(1, 7), seed=st.integers(0, 100), passes=st.integers(1, 3)
)
@FEW
def test_every_token_is_learned_once_a_pass(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, batch_size: int, seed: int, passes: int
) -> None:
    domain = numbered(tmp_path_factory.mktemp("d") / "one", num_tokens)
    mix = Mixture([domain], weights={"one": 1}, seq_len=16, batch_size=batch_size, seed=seed, max_epochs=99)
    windows = -(-num_tokens // 16)
    rows, step = [], 0
    while len(rows) < passes * windows:
        batch = mix.batch(step)
        rows += list(zip(batch.input_ids, batch.labels, strict=True))
        step += 1
    for epoch in range(passes):
        part = rows[epoch * windows : (epoch + 1) * windows]
        labels = np.concatenate([labels for _, labels in part])
        assert sorted(labels[labels != -100].tolist()) == list(range(num_tokens))
        for ids, labels in part:
            assert ids.tolist() == list(range(ids[0], ids[0] + 16))  # consecutive text
            assert ((labels == ids) | (labels == -100)).all()


@given(weights=weightings(), batch_size=st.sampled_from([3, 8, 64, 500]), seed=st.integers(0, 1000))
@FEW
def test_weights_are_achieved_and_counts_have_a_closed_form(
    domains: dict[str, Domain], weights: dict[str, float], batch_size: int, seed: int
) -> None:
    mix = mixture(domains, weights, batch_size=batch_size, seed=seed)
    steps = -(-1000 // batch_size)
    drawn = np.zeros(len(mix.names), np.int64)
    for step in range(steps):
        assert (mix.counts(step) == drawn).all()
        of_batch = np.bincount(mix.batch(step).domain_ids, minlength=len(mix.names))
        for count, name in zip(of_batch, mix.names, strict=True):
            assert abs(count - batch_size * weights[name]) < 1.0001  # rounded up or down in every single batch
        drawn += of_batch
    for share, count in zip(mix.report(steps), drawn, strict=True):
        assert share.sequences == count
        assert share.tokens == 16 * count
        assert abs(share.achieved - weights[share.name]) < 0.01
        assert share.requested == pytest.approx(weights[share.name], abs=1e-12)
        assert weights[share.name] > 0 or count == 0
    far = mix.report(10**9)
    assert all(abs(share.sequences - weights[share.name] * 10**9 * batch_size) < 30 for share in far)


@given(
    weights=weightings(),
    seed=st.integers(0, 1000),
    changes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 100)), max_size=3),
    first=st.integers(0, 60),
)
@FEW
def test_ranks_resume_and_changed_weights(
    domains: dict[str, Domain], weights: dict[str, float], seed: int, changes: list[tuple[int, int]], first: int
) -> None:
    mix = mixture(domains, weights, seed=seed, batch_size=12)
    step = 0
    for gap, lean in changes:
        step += gap
        leaning = {name: value * (lean if g == 0 else 1) for g, (name, value) in enumerate(weights.items())}
        total = sum(leaning.values())
        mix.set_weights(step, {name: value / total for name, value in leaning.items()} if total else weights)
    saved = json.loads(json.dumps(mix.history))
    resumed = mixture(domains, weights, seed=seed, batch_size=12)
    resumed.restore(saved)
    assert resumed.history == mix.history
    whole = mix.batch(first)
    for world in (1, 2, 4):
        parts = [resumed.batch(first, rank=rank, world=world) for rank in range(world)]
        for field in ("input_ids", "labels", "domain_ids"):
            assert (np.concatenate([getattr(part, field) for part in parts]) == getattr(whole, field)).all()
    seen: dict[int, list[int]] = {}
    for at in range(60):
        batch = mix.batch(at)
        for g, row in zip(batch.domain_ids.tolist(), batch.input_ids, strict=True):
            seen.setdefault(g, []).append(int(row[0]))
    for g, starts in seen.items():
        windows = -(-mix.domains[g].num_tokens // 16)
        assert len(starts) == mix.counts(60)[g]
        for epoch in range(0, len(starts), windows):
            assert max(Counter(starts[epoch : epoch + windows]).values()) == 1  # no repeat before the pass is over


def test_order_depends_on_the_seed_and_the_set_of_domains_only(domains: dict[str, Domain]) -> None:
    names = ["c4", "arxiv", "books"]
    one = Mixture([domains[n] for n in names], weights="uniform", seq_len=16, batch_size=6, seed=1)
    two = Mixture([domains[n] for n in reversed(names)], weights="uniform", seq_len=16, batch_size=6, seed=1)
    other = Mixture([domains[n] for n in names], weights="uniform", seq_len=16, batch_size=6, seed=2)
    assert one.names == two.names == ("arxiv", "books", "c4")
    assert (one.batch(3).input_ids == two.batch(3).input_ids).all()
    assert (one.batch(3).input_ids != other.batch(3).input_ids).any()
    passes = [sorted(one.batch(step).input_ids[:, 0].tolist()) for step in range(4)]
    assert passes[0] != passes[1]


@given(cuts=st.lists(st.integers(0, 700), max_size=6), seed=st.integers(0, 100))
@FEW
def test_a_domain_of_several_files_reads_as_one(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int
) -> None:
    """Wherever the files end, in the middle of windows or at one place twice (an empty file)."""
    base = tmp_path_factory.mktemp("files")
    whole, several = numbered(base / "a", 700), numbered(base / "several" / "a", 700, cuts=cuts)
    one, other = (
        Mixture([domain], weights="uniform", seq_len=16, batch_size=4, seed=seed, max_epochs=9)
        for domain in (whole, several)
    )
    assert len(several.shards["train"]) == len(cuts) + 1
    for step in range(11):  # a pass is 44 windows
        assert (one.batch(step).input_ids == other.batch(step).input_ids).all()
        assert (one.batch(step).labels == other.batch(step).labels).all()


def test_order_is_the_same_on_every_machine_and_version(domains: dict[str, Domain]) -> None:
    """A run that was started with one release continues with the next: change this digest only with a new format."""
    mix = mixture(domains, "sheared-llama", seed=1227)
    mix.set_weights(40, "llama1")
    digest = hashlib.sha256()
    for step in (0, 1, 39, np.int64(40), 41, 10**6):
        digest.update(mix.batch(step).input_ids.astype("<i8").tobytes())
    assert digest.hexdigest() == "495fbf4eef698f2aea22d38b564d99d12db94b84d754efedbf5c52a856ba5606"


def test_any_position_is_reached_at_once(domains: dict[str, Domain]) -> None:
    mix = mixture(domains, "uniform", batch_size=1024)
    for step in range(1000):
        mix.set_weights(10**6 * (step + 1), "llama1" if step % 2 else "sheared-llama")
    resumed = mixture(domains, "uniform", batch_size=1024)
    resumed.restore(mix.history)
    batch = resumed.batch(2 * 10**9)
    assert (batch.input_ids == mix.batch(2 * 10**9).input_ids).all()


def test_presets(domains: dict[str, Domain]) -> None:
    for name, table in PRESETS.items():
        assert sum(table.values()) == pytest.approx(1, abs=1e-12), name
        assert mixture(domains, name).weights(0) == table
    total = sum(domain.num_tokens for domain in domains.values())
    assert mixture(domains, "proportional").weights(0)["c4"] == 5000 / total
    assert mixture(domains, "uniform").weights(0)["c4"] == 1 / 7


def test_more_passes_than_allowed_are_refused_before_and_while(domains: dict[str, Domain]) -> None:
    mix = mixture({"arxiv": domains["arxiv"]}, "uniform", max_epochs=2)  # 44 windows, 8 a step: 11 steps are 2 passes
    mix.check(11)
    mix.batch(10)
    with pytest.raises(UsageError) as caught:
        mix.check(12)
    assert str(caught.value) == (
        "domain arxiv: 12 steps read it 2.2 times, over max_epochs 2 from step 11 on "
        "(hint: give it more text or less weight, take fewer steps, or raise max_epochs)"
    )
    with pytest.raises(UsageError, match="from step 11 on"):
        mix.batch(11)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c4": 0.5, "books": 0.4}, "weights: weights that sum to 0.9; needed 1"),
        ({"c4": 1.5, "books": -0.5}, "weights.books: -0.5; needed a fraction from 0 to 1"),
        ({"c4": float("nan"), "books": 1.0}, "weights.c4: nan; needed a fraction from 0 to 1"),
        (
            {"c4": 0.5, "book": 0.5},
            "weights: weights for book, which are not domains; no weight for books; needed one weight per domain "
            "(hint: 0 leaves a domain out of training)",
        ),
        (
            "lama1",
            "weights: unknown weights 'lama1'; needed one of llama1, proportional, sheared-llama, uniform, or a table",
        ),
    ],
)
def test_bad_weights(domains: dict[str, Domain], weights: dict[str, float] | str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Mixture([domains["c4"], domains["books"]], weights=weights, seq_len=16, batch_size=8)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_bad_domains_and_sizes(domains: dict[str, Domain], tmp_path: Path) -> None:
    two = {"c4": 0.5, "wikipedia": 0.5}
    with pytest.raises(InputError, match="domain wikipedia: 63 tokens of training text, less than one sequence of 64"):
        mixture(domains, two, seq_len=64)
    assert mixture(domains, {"c4": 1.0, "wikipedia": 0.0}, seq_len=64).batch(5).domain_ids.tolist() == [0] * 8
    empty = numbered(tmp_path / "empty", 0)
    for attend in ("sequence", "document"):
        both = {"seq_len": 16, "batch_size": 4, "attend": attend}
        mix = Mixture([domains["c4"], empty], weights={"c4": 1.0, "empty": 0.0}, **both)
        assert mix.batch(7).domain_ids.tolist() == [0] * 4
        assert [(share.achieved, share.epochs) for share in mix.report(7)][1] == (0.0, 0.0)
        with pytest.raises(InputError, match=r"domain empty: 0 tokens of training text, .* or weight 0"):
            Mixture([domains["c4"], empty], weights="uniform", **both)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        Mixture(
            [domains["c4"], numbered(tmp_path / "x", 100, tokenizer="u")], weights="uniform", seq_len=16, batch_size=1
        )
    with pytest.raises(UsageError, match="two domains named 'c4'"):
        Mixture([domains["c4"], domains["c4"]], weights="uniform", seq_len=16, batch_size=1)
    with pytest.raises(UsageError, match="a mixture of no domains"):
        Mixture([], weights="uniform", seq_len=16, batch_size=1)
    mix = mixture(domains, two)
    with pytest.raises(UsageError, match="a number of ranks that divides the batch of 8"):
        mix.batch(0, rank=0, world=3)
    with pytest.raises(UsageError, match="seq_len 1, batch_size 8"):
        mixture(domains, two, seq_len=1)


def test_history_is_guarded(domains: dict[str, Domain]) -> None:
    mix = mixture(domains, {"c4": 0.5, "books": 0.5})
    mix.set_weights(10, {"c4": 0.9, "books": 0.1})
    mix.set_weights(10, {"c4": 0.9, "books": 0.1})  # a resumed rule says it again
    assert [entry["step"] for entry in mix.history] == [0, 10]
    for step, weights in ((10, {"c4": 0.8, "books": 0.2}), (5, {"c4": 0.9, "books": 0.1})):
        with pytest.raises(UsageError, match="a step after 10, where the history ends"):
            mix.set_weights(step, weights)
    before = mix.history
    for bad in ([], [{"step": 3, "weights": {"c4": 1}}], [{"step": 0, "weights": {"c4": 1.0}}], [{"step": 0}]):
        with pytest.raises(UsageError):
            mix.restore(bad)
        assert mix.history == before


def test_rules_are_the_files_of_the_folder() -> None:
    weights = {"a": 0.25, "b": 0.75}
    rule = registry.load("prismoe.data.rules", "static", where="rule")
    assert rule.update(weights, {"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == weights
    with pytest.raises(UsageError, match="rule: unknown 'statik'; needed one of doremi, sheared, static"):
        registry.load("prismoe.data.rules", "statik", where="rule")
