"""A linear classifier on hashed words and word pairs: logistic regression, trained in seconds from labelled texts.

`train_filter` makes one of texts to keep and texts to drop. Without a model the filter makes its own of
advertisements: see `label_advertisements`.

Own code and not scikit-learn's hashing vectoriser, which cuts texts up word by word (some 2 MB/s): here the whole is
two look-ups a word, and words are those that the search for copies has, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.reader import read_documents
from prismoe.data.sift.advertisements import label_advertisements
from prismoe.data.words import Batch, Hashes, Longs, ngrams, segments
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest, claim, hash_files, sha256_file, write_atomic, write_json_atomic

__all__ = ["DROP", "TrainedFilter", "fingerprint", "learn", "open_scorer", "train_filter"]

DROP = 0.5
SCORE = "mean weight of its words: above 0 like text to keep"
KIND, WEIGHTS, FACTS = "filter", "linear.safetensors", "linear.json"
BITS = 18  # a quarter of a million weights, one megabyte
_EPOCHS, _RATE, _BATCH = 6, 0.5, 64
_HELD_OUT = 5  # every fifth text of a kind is not trained on: it places the zero, and is judged
MIN_TEXTS = 20  # of each kind: fewer say nothing about other texts


@dataclass(frozen=True)
class TrainedFilter:
    """Receipt of `train_filter`: texts of both kinds, and how the fifth of each that was held out is judged.

    `accuracy` is the share that is on the right side of 0, both kinds counting alike (each half of them is judged with
    the zero that the other half places); `ranking` is the share of pairs of one text to keep and one to drop that are
    in the right order (area under the ROC curve).
    """

    out: str
    keep: int
    drop: int
    accuracy: float
    ranking: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fingerprint(arguments: Mapping[str, Any]) -> str:
    model = arguments["model"]
    return f"linear 2 {'advertisements' if model is None else sha256_file(_file(model, WEIGHTS))}"


def learn(arguments: Mapping[str, Any], texts: Callable[[], Iterator[str]], folder: Path) -> dict[str, Any]:
    """Without a model: one of advertisements, from the run's own text, left in `folder`."""
    if arguments["model"] is not None:
        return dict(arguments)
    if Manifest.read(folder) is None:
        kept: list[str] = []
        dropped: list[str] = []
        stream = texts()
        while batch := list(islice(stream, 256)):
            for text, label in zip(batch, label_advertisements(batch), strict=True):
                if label >= 0:
                    (kept if label else dropped).append(text[:20_000])
        if min(len(kept), len(dropped)) < MIN_TEXTS:
            raise InputError(
                f"{len(dropped)} texts that plainly are advertisements and {len(kept)} that plainly are not",
                where="filter linear",
                needed=f"{MIN_TEXTS} of each to learn from",
                hint="train one: prismoe train-filter keep=FILE drop=FILE --out FOLDER, then model: FOLDER",
            )
        train_filter(kept, dropped, out=folder)
    return {**arguments, "model": str(folder)}


def open_scorer(*, model: str | None = None) -> _Linear:
    """
    Args:
        model: a folder of `train_filter`; without one the filter learns advertisements from the run's own text.

    Raises:
        InputError: not such a folder, or damaged.
    """
    if model is None:
        raise UsageError("no model", where="filter linear", needed="model: FOLDER (of prismoe train-filter)")
    return _Linear(Path(model))


class _Linear:
    reasons = ()

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(_file(folder, WEIGHTS))
            self._weights, self._bias = tensors["weights"], float(tensors["bias"][0])
        except (SafetensorError, KeyError, IndexError, OSError) as error:
            raise InputError(f"damaged ({error})", where=str(folder / WEIGHTS), hint="train it again") from error
        if self._weights.shape != (1 << BITS,) or not np.isfinite(self._weights).all():
            raise InputError(f"{self._weights.shape} weights", where=str(folder / WEIGHTS), needed=f"{1 << BITS}")

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        keys = Batch.of(texts).keys
        pairs, pair_ends = ngrams(keys.hashes, keys.ends, 2)
        counts = np.diff(keys.ends, prepend=0) + np.diff(pair_ends, prepend=0)
        found: npt.NDArray[np.float64] = np.zeros(len(counts))
        for hashes, ends in ((keys.hashes, keys.ends), (pairs, pair_ends)):
            starts, filled = segments(ends)
            if len(starts):
                found[filled] += np.add.reduceat(self._weights[_places(hashes)], starts, dtype=np.float64)
        found /= np.maximum(counts, 1)
        return found + self._bias


def train_filter(
    keep: Iterable[str] | str | Path,
    drop: Iterable[str] | str | Path,
    *,
    out: str | Path,
    seed: int = 0,
    force: bool = False,
) -> TrainedFilter:
    """Train a filter that scores texts like `keep` above texts like `drop`; both count alike, whatever their numbers.

    Args:
        keep: texts, or a file of them (one a line in .txt, one an object or row in .jsonl, .jsonl.zst, .parquet …).
        drop: the same, of the other kind.
        out: a folder for linear.safetensors and linear.json.
        seed: of the order that texts are seen in.

    Raises:
        InputError: fewer than 20 texts of a kind, or files that cannot be read.
        ResourceError: `out` cannot be written or holds something else.
    """
    out = Path(out)
    named = {"keep": list(_texts(keep)), "drop": list(_texts(drop))}
    for name, texts in named.items():
        if len(texts) < MIN_TEXTS:
            what = f"only {len(texts)}" if texts else "none"
            raise InputError(f"{what} of the texts to {name}", where="train-filter", needed=f"at least {MIN_TEXTS}")
    texts = named["keep"] + named["drop"]
    wanted = np.repeat([1.0, 0.0], [len(named["keep"]), len(named["drop"])])
    parts = [features(Batch(texts[first : first + 500])) for first in range(0, len(texts), 500)]
    rows = [places[a:b] for places, ends in parts for a, b in zip(np.append(0, ends[:-1]), ends, strict=True)]
    judged = _held_out(wanted, seed)
    weights = _fit([rows[i] for i in np.flatnonzero(~judged)], wanted[~judged], seed)
    held = [rows[i] for i in np.flatnonzero(judged)]
    logits = _means(weights, np.concatenate(held), np.cumsum([len(row) for row in held]))
    bias = -_balance(logits, wanted[judged])
    found = TrainedFilter(str(out), len(named["keep"]), len(named["drop"]), *_judge(logits, wanted[judged]))
    key = sha256_of(weights, bias)
    with claim(out, kind=KIND, key=key, force=force):
        from safetensors.numpy import save

        write_atomic(out / WEIGHTS, save({"weights": weights, "bias": np.array([bias], np.float32)}))
        facts = {name: value for name, value in found.to_dict().items() if name != "out"}
        write_json_atomic(out / FACTS, {**facts, "words": "keys, 1 and 2 in a row", "bits": BITS, "format": 1})
        Manifest(KIND, {}, facts, hash_files(out, [WEIGHTS, FACTS]), key).write(out)
    return found


def features(batch: Batch) -> tuple[Longs, Longs]:
    """Places of the words and word pairs of each text in the table of weights, and running counts."""
    words, ends = batch.keys.hashes, batch.keys.ends
    pairs, pair_ends = ngrams(words, ends, 2)
    counts, pair_counts = np.diff(ends, prepend=0), np.diff(pair_ends, prepend=0)
    # Words of a text before its pairs: both runs are moved behind what comes before them.
    places = np.empty(len(words) + len(pairs), np.int64)
    places[np.arange(len(words)) + np.repeat(pair_ends - pair_counts, counts)] = _places(words)
    places[np.arange(len(pairs)) + np.repeat(ends, pair_counts)] = _places(pairs)
    return places, ends + pair_ends


def _places(hashes: Hashes) -> Longs:
    return (hashes >> np.uint64(64 - BITS)).view(np.int64)


def _means(weights: npt.NDArray[Any], places: Longs, ends: Longs) -> npt.NDArray[np.float64]:
    """Mean weight of each text's features, 0 for a text without any."""
    found = np.zeros(len(ends))
    starts, filled = segments(ends)
    if len(starts):
        sums = np.add.reduceat(weights[places], starts, dtype=np.float64)
        found[filled] = sums / np.diff(np.append(starts, len(places)))
    return found


def _held_out(wanted: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.bool_]:
    """Every fifth text of each kind, in a drawn order."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(wanted), bool)
    for kind in (0.0, 1.0):
        chosen[generator.permutation(np.flatnonzero(wanted == kind))[::_HELD_OUT]] = True
    return chosen


def _fit(rows: list[Longs], wanted: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float32]:
    """AdaGrad (Duchi et al. 2011) on the logistic loss, both kinds weighted alike; the bias it needs is not kept."""
    weights, squares = np.zeros(1 << BITS), np.full(1 << BITS, 1e-8)
    bias, bias_square = 0.0, 1e-8
    share = wanted.mean()
    importance = np.where(wanted > 0, 0.5 / share, 0.5 / (1 - share))
    generator = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        order = generator.permutation(len(rows))
        for first in range(0, len(order), _BATCH):
            some = order[first : first + _BATCH]
            places = np.concatenate([rows[i] for i in some])
            lengths = np.array([len(rows[i]) for i in some])
            logits = _means(weights, places, np.cumsum(lengths)) + bias
            errors = (1 / (1 + np.exp(-logits)) - wanted[some]) * importance[some]
            touched, inverse = np.unique(places, return_inverse=True)
            slopes = np.bincount(inverse, np.repeat(errors / np.maximum(lengths, 1), lengths)) * 100
            squares[touched] += slopes**2
            weights[touched] -= _RATE * slopes / np.sqrt(squares[touched])
            bias_square += errors.sum() ** 2
            bias -= _RATE * errors.sum() / bias_square**0.5
    return weights.astype(np.float32)


def _balance(logits: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> float:
    """The number between texts to drop and texts to keep with the same share of errors on both sides of it.

    The bias that the loss finds is no use: it is that of texts seen in training, which lie further apart than others.
    """
    levels = np.unique(logits)
    between = (levels[1:] + levels[:-1]) / 2 if len(levels) > 1 else levels
    lost = np.searchsorted(np.sort(logits[wanted > 0]), between) / (wanted > 0).sum()
    passed = 1 - np.searchsorted(np.sort(logits[wanted == 0]), between) / (wanted == 0).sum()
    return float(between[np.abs(lost - passed).argmin()])


def _judge(logits: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Accuracy and ranking, see `TrainedFilter`; texts come in a drawn order."""
    half = np.zeros(len(wanted), bool)
    for kind in (0.0, 1.0):
        half[np.flatnonzero(wanted == kind)[::2]] = True
    right = np.zeros(len(wanted), bool)
    for part in (half, ~half):
        right[part] = (logits[part] > _balance(logits[~part], wanted[~part])) == (wanted[part] > 0)
    accuracy = (right[wanted > 0].mean() + right[wanted == 0].mean()) / 2
    keep, drop = np.sort(logits[wanted > 0]), np.sort(logits[wanted == 0])
    below, ties = np.searchsorted(drop, keep), np.searchsorted(drop, keep, side="right")
    return float(accuracy), float((below + ties).mean() / 2 / len(drop))


def sha256_of(weights: npt.NDArray[np.float32], bias: float) -> str:
    """Hex sha256 of what was learned."""
    from hashlib import sha256

    return sha256(weights.tobytes() + json.dumps(bias).encode()).hexdigest()


def _texts(source: Iterable[str] | str | Path) -> Iterator[str]:
    if not isinstance(source, str | Path):
        yield from source
        return
    path = Path(source)
    if path.suffix == ".txt":
        try:
            yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read ({error})", where=str(path)) from error
    else:
        yield from (document.text for document in read_documents(path) if document.text.strip())


def _file(folder: str | Path, name: str) -> Path:
    manifest = Manifest.read(Path(folder))
    if manifest is None or manifest.kind != KIND:
        raise InputError("not a trained filter", where=str(folder), hint="make one with `prismoe train-filter`")
    return Path(folder) / name
