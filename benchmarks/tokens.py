"""Text to token shards (P7): `prepare` against datatrove's DocumentTokenizer and Megatron's preprocess_data.

    python benchmarks/tokens.py --work DIR --shared SHARED
    python benchmarks/tokens.py --work DIR --shared SHARED --peer-datatrove VENV/bin/python \
        --peer-megatron VENV/bin/python CHECKOUT

Two vocabularies of 32,000 are trained on the first training file of every domain of SHARED/corpora: byte-level with
Llama 3's split, and Llama 2's kind (no split, byte fallback). The second files, which they have not seen, are one JSONL
file, tokenised by each in a fresh process with one thread, in turn, --rounds times. CPU seconds from the call to the
last synced byte without imports, the least of the rounds (Megatron, whose work cannot be cut out: the whole run less
one over a single document; "at start" is our run over a single document: reading the vocabulary, the encoder's proof);
peak resident memory of the process. Ids of every document are compared with the
`tokenizers` library's. A peer that is not named is printed as missing, which is no pass.

datatrove: `pip install "datatrove[io,processing]==0.10.1"` in an environment of its own. Megatron: `pip install
megatron-core==0.16.1 transformers torch nltk` and a checkout of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismoe.data.reader import read_documents
from prismoe.data.shards import Domain

END = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOMAINS = ("arxiv", "books", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
MEASURE = """
import json, sys, time
def told(work):
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    used = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    print(json.dumps({**used, "rss": 1024 * int(lines["VmHWM"].split()[0])}))
"""
OURS = (
    MEASURE
    + """
from prismoe.data.prepare import DomainSource, prepare
if sys.argv[4] == "plain":
    import prismoe.data.tokenizer as t
    t.DocumentTokenizer.quicker = lambda self, sample: self
held = sys.argv[1].rpartition("/")[0] + "/held.jsonl"
source = {"d": DomainSource((sys.argv[1],), (held,))}
told(lambda: prepare(source, tokenizer=sys.argv[2], out=sys.argv[3]))
"""
)
ENCODER = (
    MEASURE
    + """
from pathlib import Path
from prismoe.data.reader import read_documents
from prismoe.data.tokenizer import DocumentTokenizer
tokenizer = DocumentTokenizer.open(sys.argv[2]).quicker([])
texts = [document.text for document in read_documents(Path(sys.argv[1]))]
told(lambda: [tokenizer.encoder.encode(texts[i : i + 500]) for i in range(0, len(texts), 500)])
"""
)
DATATROVE = (
    MEASURE
    + """
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
text, tokenizer, out = map(Path, sys.argv[1:4])
pipeline = [
    JsonlReader(str(text.parent), glob_pattern=text.name),
    DocumentTokenizer(str(out), str(tokenizer / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False),
]
executor = LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(out / "logs"))
told(executor.run)
"""
)


@dataclass
class Way:
    """One way to do it: how to run it once, what it cost, and its ids document by document."""

    name: str
    run: Callable[[Path, Path, Path], dict[str, float]]
    ids: Callable[[Path], list[np.ndarray]] | None
    costs: list[dict[str, float]] = field(default_factory=list)
    missing: str = ""

    @property
    def cpu(self) -> float:
        return min(cost["cpu"] for cost in self.costs)


def python(interpreter: str | Path, code: str, *arguments: object) -> dict[str, float]:
    """What a Python process of one thread says in its last line."""
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TOKENIZERS_PARALLELISM": "true"}
    found = subprocess.run(
        [str(interpreter), "-c", code, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError((found.stderr.strip().splitlines() or ["no output"])[-1][:200])
    return json.loads(found.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def megatron(interpreter: str, checkout: str) -> Callable[[Path, Path, Path], dict[str, float]]:
    """The whole process and its worker, less the same over one document."""

    def once(text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
        out.mkdir(parents=True, exist_ok=True)
        command = [
            interpreter, f"{checkout}/tools/preprocess_data.py", "--input", text, "--json-keys", "text",
            "--workers", "1", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer,
            "--append-eod", "--output-prefix", out / "m", "--log-interval", "1000000",
        ]  # fmt: skip
        code = (
            "import json, os, resource, subprocess, sys\n"
            "os.environ['PYTHONPATH'] = os.path.dirname(os.path.dirname(sys.argv[2]))\n"
            "subprocess.run(sys.argv[1:], check=True, timeout=1500, stdout=subprocess.DEVNULL)\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print(json.dumps({'cpu': used.ru_utime + used.ru_stime, 'wall': 0, 'rss': 1024 * used.ru_maxrss}))\n"
        )
        return python(sys.executable, code, *command)

    def run(text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
        idle = once(text.with_name("one.jsonl"), tokenizer, out / "one")
        full = once(text, tokenizer, out / "all")
        return {**full, "cpu": full["cpu"] - idle["cpu"]}

    return run


def our_ids(out: Path) -> list[np.ndarray]:
    domain = Domain.open(out / "d")
    return np.split(np.asarray(domain.tokens()), domain.ends()[:-1, 0])


def datatrove_ids(out: Path) -> list[np.ndarray]:
    (tokens,) = out.glob("*.ds")
    ends = np.fromfile(f"{tokens}.index", "<u8").astype(np.int64)
    return np.split(np.fromfile(tokens, "<u2"), ends[:-1])


def megatron_ids(out: Path) -> list[np.ndarray]:
    head = (out / "all" / "m_text_document.idx").read_bytes()
    assert head[:9] == b"MMIDIDX\x00\x00"
    dtype = {8: "<u2", 4: "<i4"}[head[17]]
    (count,) = struct.unpack("<Q", head[18:26])
    lengths = np.frombuffer(head, "<i4", count, 34)
    return np.split(np.fromfile(out / "all" / "m_text_document.bin", dtype), np.cumsum(lengths)[:-1])


def train(folder: Path, kind: str, texts: Sequence[str]) -> Path:
    """A model folder with a BPE of 32,000 entries trained on `texts`."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    if kind == "llama-3-like":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [END]
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        # Trained word by word, as SentencePiece does; used without a split, as the published vocabulary is.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet, special = [], ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=1000, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "llama-2-like":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] in ("<unk>", END)
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["special"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    return folder


def reference(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    own = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    own.encode_special_tokens = True
    end = own.token_to_id(END)
    return [[*e.ids, end] for e in own.encode_batch_fast(list(texts), add_special_tokens=False)]


def judge(way: Way, out: Path, expected: list[list[int]]) -> str:
    assert way.ids is not None
    found = way.ids(out)
    same = sum(np.array_equal(a, b) for a, b in zip(found, expected, strict=False))
    return f"{same} of {len(expected)}" if len(found) == len(expected) else f"{len(found)} documents"


GOALS = {
    "llama-3-like": [("ours", "datatrove", 8.0), ("ours", "Megatron", 16.0), ("ours, plain", "datatrove", 1.1)],
    "llama-2-like": [("ours", "datatrove", 3.5), ("ours", "Megatron", 16.0), ("ours, plain", "datatrove", 1.1)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True, help="folder with corpora/<domain>/train-*.jsonl.zst")
    parser.add_argument("--peer-datatrove", default=os.environ.get("PRISMOE_PEER_DATATROVE"))
    parser.add_argument("--peer-megatron", nargs=2, default=os.environ.get("PRISMOE_PEER_MEGATRON", "").split() or None)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    seen, unseen = (
        [d.text for name in DOMAINS for d in read_documents(given.shared / "corpora" / name / file)]
        for file in ("train-00000-of-00002.jsonl.zst", "train-00001-of-00002.jsonl.zst")
    )
    given.work.mkdir(parents=True, exist_ok=True)
    text = given.work / "text.jsonl"
    for path, texts in (
        (text, unseen),
        (given.work / "one.jsonl", unseen[:1]),
        (given.work / "held.jsonl", unseen[:1]),
    ):
        path.write_text("".join(json.dumps({"text": part}, ensure_ascii=False) + "\n" for part in texts))
    size = sum(len(part.encode()) for part in unseen)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).split(": ")[1]
    print(f"{cpu}, Python {platform.python_version()}, one thread, load {os.getloadavg()[0]:.1f}")
    print(f"{len(unseen):,} documents, {size / 1e6:.1f} MB of text; tokenizers trained on {len(seen):,} others\n")
    for kind, goals in GOALS.items():
        compare(kind, train(given.work / kind, kind, seen), text, unseen, size, given, goals)


def compare(
    kind: str,
    tokenizer: Path,
    text: Path,
    unseen: list[str],
    size: int,
    given: Any,
    goals: list[tuple[str, str, float]],
) -> None:
    ours = [
        Way(name, lambda t, k, o, mode=mode: python(sys.executable, OURS, t, k, o, mode), our_ids)
        for name, mode in (("ours", "quick"), ("ours, plain", "plain"))
    ]
    start = Way("at start", lambda t, k, o: python(sys.executable, OURS, t.with_name("one.jsonl"), k, o, "quick"), None)
    encoder = Way("its encoder", lambda t, k, o: python(sys.executable, ENCODER, t, k), None)
    datatrove = Way("datatrove", lambda t, k, o: python(given.peer_datatrove, DATATROVE, t, k, o), datatrove_ids)
    other = Way("Megatron", megatron(*(given.peer_megatron or ("", ""))), megatron_ids)
    datatrove.missing = "" if given.peer_datatrove else "peer missing"
    other.missing = "" if given.peer_megatron else "peer missing"
    ways = [*ours, start, encoder, datatrove, other]
    for _ in range(given.rounds):
        for way in (way for way in ways if not way.missing):
            out = given.work / "out" / way.name.replace(", ", "-").replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            try:
                way.costs.append(way.run(text, tokenizer, out))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                way.missing = f"peer failed: {error}"
    expected = reference(tokenizer, unseen)
    print(f"{kind}: {'':<6} {'CPU s':>7} {'MB/s':>7} {'RSS MB':>7}  ids as the tokenizer's own")
    for way in ways:
        if way.missing:
            print(f"  {way.name:<16} {way.missing}")
            continue
        same = (
            judge(way, given.work / "out" / way.name.replace(", ", "-").replace(" ", "-"), expected) if way.ids else ""
        )
        rss = max(cost["rss"] for cost in way.costs) / 1e6
        print(f"  {way.name:<16} {way.cpu:7.2f} {size / way.cpu / 1e6:7.1f} {rss:7.0f}  {same}")
    named = {way.name: way for way in ways}
    work, alone = named["ours"].cpu - named["at start"].cpu, named["its encoder"].cpu
    share, whole = alone / work, alone / named["ours"].cpu
    print(
        f"  {100 * share:.0f} % of its encoder's speed after the start (goal 60 %) "
        f"{'met' if share >= 0.6 else 'MISSED'}, "
        f"{100 * whole:.0f} % with it"
    )
    rss = max(cost["rss"] for cost in named["ours"].costs) / 1e6
    print(f"  {rss:.0f} MB resident (goal 400) {'met' if rss <= 400 else 'MISSED'}")
    for mine, theirs, goal in goals:
        if named[theirs].missing:
            print(f"  {mine} against {theirs}: {named[theirs].missing}, goal {goal:g} not shown")
            continue
        ratio = named[theirs].cpu / named[mine].cpu
        print(f"  {mine} against {theirs}: {ratio:.1f} × (goal {goal:g}) {'met' if ratio >= goal else 'MISSED'}")
    print(flush=True)


if __name__ == "__main__":
    main()
