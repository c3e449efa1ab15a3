"""Filters: each rule broken once, scores against independent references, and what cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from prismoe.data.filters import c4, fineweb, gopher, linear, perplexity
from prismoe.data.sift.advertisements import label_advertisements
from prismoe.errors import InputError, UsageError
from tests.tiny import tiny_dense

PROSE = (
    "The old house of the family stood near the river. Nobody knew who had built it, and that was how they liked it. "
    "Every summer the children came to play with boats. They have many stories to tell about those days. "
    "In winter it was quiet, and only the wind could be heard in the trees around it. "
)
DISTINCT = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(90))


def rule(module: object, text: str) -> str:
    """The rule that a text breaks first, or "passes"."""
    scorer = module.open_scorer()  # type: ignore[attr-defined]
    score = scorer.score([text])[0]
    return "passes" if score == 1 else scorer.reasons[int(-score)]


GOPHER = {
    "under 50 words": "Too short to say the truth of it.",
    "mean word under 3 characters": "of to be " * 40,
    "mean word over 10 characters": "the and " + " ".join(f"extraordinarily{chr(97 + i)}" for i in range(26)) * 3,
    "more than 1 # in 10 words": PROSE + "# " * 15,
    "more than 1 ellipsis in 10 words": PROSE.replace(", ", "... ") + "so... " * 9,
    "over 90 % bullet lines": "\n".join(f"- {line}" for line in PROSE.split(". ")),
    "over 30 % lines end with an ellipsis": "\n".join(f"{line} …" for line in PROSE.split(". ")),
    "under 80 % of words have a letter": PROSE + " ".join(str(i) for i in range(1000, 1030)),
    "fewer than 2 common words": DISTINCT,
    "repeated paragraphs": PROSE + "\n\nThe end of it.\n\nThe end of it.\n\nThe end of it.",
    "repeated lines": PROSE + "\nThe end of it." * 4,
    "one 2-gram is over 20 %": "the and that to " + DISTINCT + " incredibly wonderful" * 13,
    "passes": PROSE,
}


@pytest.mark.parametrize("expected", GOPHER)
def test_gopher(expected: str) -> None:
    assert rule(gopher, GOPHER[expected]) == expected


def test_gopher_counts_repeated_n_grams_once() -> None:
    # 20 words twice over: every 10-gram of the second half was there before, its characters count once.
    half = [f"thing{chr(97 + i)}" for i in range(20)]
    text = " ".join([*half, *half])
    pieces = gopher.Batch([text]).pieces
    assert gopher._repeated_characters(pieces.hashes, pieces.lengths, 10) == sum(len(word) for word in half)
    assert gopher._repeated_bound(pieces, 5).tolist() == [sum(len(word) for word in half)]
    assert gopher._top_characters(pieces, 2).tolist() == [2 * len("thinga thingb")]  # the first of equal ones


SENTENCES = "One two three. Four five six. Seven eight nine. Ten eleven twelve. Dr. No said so. It is true.\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCES, "passes"),
        (SENTENCES.replace("\n", " and so"), "fewer than 5 sentences in whole lines"),
        (SENTENCES.replace("two", "javascript"), "fewer than 5 sentences in whole lines"),
        (SENTENCES + "Here is lorem ipsum for you.", "lorem ipsum"),
        (SENTENCES + "int main() { return 0; } it says.", "curly bracket"),
        (SENTENCES + "int main() { return 0; }", "passes"),  # a line that does not count breaks nothing
        ("We use cookies, as the others do. " * 9, "fewer than 5 sentences in whole lines"),
        ("Dr. No met Mr. X. in St. Ives. One two. Three.", "fewer than 5 sentences in whole lines"),
    ],
)
def test_c4(text: str, expected: str) -> None:
    assert rule(c4, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(line + "." for line in PROSE.split(". ")), "passes"),
        ("\n".join(PROSE.replace(".", "").split(",") * 4), "under 12 % of lines end with a punctuation mark"),
        ("Short line.\n" * 3 + PROSE, "over 67 % of lines have at most 30 characters"),
        ((PROSE.strip() + "\n") * 2, "over 1 % of characters in repeated lines"),
        (
            "\n\n\n\n\n".join(f"word{i}" + "x" * 40 + "." for i in range(30)),
            "more than 3 line breaks in 10 words",
        ),
    ],
)
def test_fineweb(text: str, expected: str) -> None:
    assert rule(fineweb, text) == expected


def test_decisions_do_not_depend_on_the_batch() -> None:
    texts = [*GOPHER.values(), SENTENCES]
    for module in (gopher, c4, fineweb):
        alone = [float(module.open_scorer().score([text])[0]) for text in texts]
        assert module.open_scorer().score(texts).tolist() == alone


def test_perplexity_is_bits_a_byte_in_windows_that_begin_with_the_start_token(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    folder = tiny_dense(tmp_path / "model")
    texts = ["Once upon a time there was a little girl who liked to play", "def add(first, second)", "x"]
    found = perplexity.open_scorer(model=str(folder), window=8).score(texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, score in zip(texts, found, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        nats = 0.0
        for first in range(0, len(ids), 7):
            part = ids[first : first + 7]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([[2, *part[:-1]]])).logits[0].log_softmax(-1)
            nats -= float(logs[range(len(part)), part].sum())
        assert score == pytest.approx(-nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_perplexity_reads_no_more_than_it_may(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "model")
    scorer = perplexity.open_scorer(model=str(folder), max_bytes=64)
    beginning = "Once upon a time there was a little girl who liked to play in the"
    assert scorer.score([beginning[:64] + " würde"])[0] == scorer.score([beginning[:64]])[0]


def test_models_of_another_kind_are_told(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(InputError, match="ForSequenceClassification; needed a causal language model"):
        perplexity.open_scorer(model=str(folder))
    with pytest.raises(UsageError, match="no model"):
        perplexity.open_scorer()
    with pytest.raises(InputError, match="not a trained filter"):
        linear.open_scorer(model=str(tmp_path))


KEEP = [
    f"The river of {name} runs to the sea and nobody knows its age, number {i}." for i, name in enumerate("abc" * 20)
]
DROP = [
    f"Buy now and save on {name} with free shipping and our best price, item {i}." for i, name in enumerate("abc" * 20)
]


def test_a_trained_filter_tells_its_kinds_apart_and_is_the_same_every_time(tmp_path: Path) -> None:
    found = linear.train_filter(KEEP, DROP, out=tmp_path / "one")
    again = linear.train_filter(KEEP, DROP, out=tmp_path / "two")
    assert (found.keep, found.drop, found.accuracy, found.ranking) == (60, 60, 1.0, 1.0)
    assert again.accuracy == 1.0
    names = ["linear.safetensors", "linear.json", "manifest.json"]
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]
    scorer = linear.open_scorer(model=str(tmp_path / "one"))
    new = scorer.score(["Nobody knows how the sea came to the river", "save with free shipping, buy now", "!!!"])
    assert new[0] > new[1]
    assert np.isfinite(new).all()  # a text without words has the bias


def test_zero_balances_the_errors_however_few_texts_there_are_of_a_kind(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def text(share: float) -> str:
        """Forty words, so many of them of an advertisement: the kinds overlap."""
        return " ".join(
            f"{'sell' if generator.random() < share else 'tell'}{chr(97 + generator.integers(9))}" for _ in range(40)
        )

    kept, dropped = ([text(share) for _ in range(count)] for share, count in ((0.42, 900), (0.58, 40)))
    found = linear.train_filter(kept, dropped, out=tmp_path / "f")
    scorer = linear.open_scorer(model=str(tmp_path / "f"))
    right = [
        float(((scorer.score([text(share) for _ in range(1000)]) > 0) == keep).mean())
        for share, keep in ((0.42, True), (0.58, False))
    ]
    # The best rule counts words: right where 40 draws at 0.42 are below 20, ties cut in two: 0.84.
    assert min(right) > 0.65
    assert abs(right[0] - right[1]) < 0.25
    assert found.accuracy == pytest.approx(sum(right) / 2, abs=0.15)


def test_linear_scores_are_mean_weights_of_words_and_pairs(tmp_path: Path) -> None:
    linear.train_filter(KEEP, DROP, out=tmp_path / "f")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "f" / "linear.safetensors")
    texts = [KEEP[0], DROP[0], "free"]
    for text, score in zip(texts, linear.open_scorer(model=str(tmp_path / "f")).score(texts), strict=True):
        keys = linear.Batch([text]).keys
        pairs = linear.ngrams(keys.hashes, keys.ends, 2)[0]
        places = [int(h) >> (64 - linear.BITS) for h in [*keys.hashes.tolist(), *pairs.tolist()]]
        expected = float(np.mean([float(tensors["weights"][p]) for p in places])) + float(tensors["bias"][0])
        assert score == pytest.approx(expected, rel=1e-6)


def test_one_kind_of_texts_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train-filter: none of the texts to drop; needed at least 20"):
        linear.train_filter(KEEP, [], out=tmp_path / "f")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(DROP[:5]))
    with pytest.raises(InputError, match="only 5 of the texts to drop"):
        linear.train_filter(KEEP, lines, out=tmp_path / "f")


def test_advertisements_are_labelled_where_it_is_plain() -> None:
    advertisement = "Buy now with free shipping! Our products have the lowest prices, from $9.99. Contact us. " * 3
    assert label_advertisements([advertisement, PROSE, "Buy now.", PROSE + " It cost $5."]).tolist() == [0, 1, -1, -1]
