"""Sift from end to end: what is dropped and why, stopping and adding, and every way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from prismoe.cli import main
from prismoe.config import load_config
from prismoe.data.prepare import DomainSource
from prismoe.data.sift import FilterSpec, Sifted, sift
from prismoe.data.sift.decide import _order_statistic
from prismoe.errors import InputError, NumericalError, PrismoeError, ResourceError, UsageError
from tests.text import jsonl
from tests.tiny import tiny_dense

GOOD = "The people of the town number {0} have a story to tell about the {0} and that is how it was with them. "


def prose(number: int) -> str:
    """Text that the rules like, a different one for each number."""
    name = "".join(chr(97 + int(digit)) for digit in str(number))
    words = " ".join(f"{name}{chr(97 + i)}{chr(97 + (i * number) % 26)}" for i in range(20))
    end = "Nobody knew when it all began. She did not ask. They said so in the evening. We heard of it from a friend."
    return GOOD.format(name) + f"It went on for {words}. {end}"


def source(tmp_path: Path, name: str, texts: list[str], heldout: list[str] | None = None) -> DomainSource:
    train = jsonl(tmp_path / f"{name}.jsonl", texts)
    held = () if heldout is None else (str(jsonl(tmp_path / f"{name}-heldout.jsonl", heldout)),)
    return DomainSource((str(train),), held)


def keep(out: Path, domain: str, index: int = 0) -> list[int]:
    return np.fromfile(out / domain / f"train-{index:05d}.keep", np.uint8).tolist()


def run(tmp_path: Path, domains: dict[str, DomainSource], **more: Any) -> Sifted:
    return sift(domains, out=tmp_path / "out", **more)


def test_rules_drop_what_breaks_them_and_the_receipt_counts_it(tmp_path: Path) -> None:
    texts = [prose(1), "too short", "", prose(2), "   \n"]
    found = run(tmp_path, {"web": source(tmp_path, "web", texts)}, filters=[FilterSpec("gopher", domains="all")])
    assert keep(tmp_path / "out", "web") == [1, 0, 0, 1, 0]
    row = found.domains[0]
    assert (row.documents, row.kept_documents) == (5, 2)
    assert row.kept_bytes == len(prose(1)) + len(prose(2))
    assert {name: part["documents"] for name, part in row.dropped.items()} == {"no text": 2, "gopher": 1}
    assert (
        run(
            tmp_path,
            {"web": DomainSource((str(tmp_path / "web.jsonl"),))},
            filters=[FilterSpec("gopher", domains="all")],
        ).state
        == "kept"
    )


def test_the_worst_share_of_each_domain_goes(tmp_path: Path) -> None:
    model = tiny_dense(tmp_path / "model")
    domains = {
        name: source(tmp_path, name, [prose(i + shift) for i in range(40)])
        for name, shift in (("c4", 1), ("books", 100), ("commoncrawl", 200))
    }
    found = run(tmp_path, domains, filters=[FilterSpec("perplexity", drop=0.25, arguments={"model": str(model)})])
    assert [row.name for row in found.domains] == ["c4", "commoncrawl"]  # only they, by default
    assert [row.kept_documents for row in found.domains] == [30, 30]
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    drawn = audit["filters"][0]["domains"][0]
    assert sum(drawn["counts"]) == 40
    dropped, kept = (drawn["samples"][name] for name in ("just dropped", "just kept"))
    assert dropped[0]["score"] < drawn["threshold"] <= kept[0]["score"]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script" not in page
    assert "http" not in page


def test_a_score_that_is_not_finite_is_told_with_its_document(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny_dense(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    domains = {"web": source(tmp_path, "web", ["", *map(prose, range(20))])}
    fluency = FilterSpec("perplexity", domains="all", arguments={"model": str(model)})
    with pytest.raises(NumericalError, match=r"web.jsonl:2: a score of filter perplexity that is not finite"):
        run(tmp_path, domains, filters=[fluency])
    assert not list((tmp_path / "out").glob("*/*"))


def test_tokens_are_estimated_where_the_tokenizer_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dense(tmp_path / "model")
    texts = [prose(1), "too short", prose(2)]
    rules = [FilterSpec("gopher", domains="all")]
    found = run(tmp_path, {"web": source(tmp_path, "web", texts)}, filters=rules, tokenizer=model)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(texts, add_special_tokens=False)
    expected = sum(map(len, texts)) / sum(len(encoding.ids) for encoding in ids)
    assert found.domains[0].bytes_per_token == pytest.approx(expected)
    assert "tokens dropped, about" in (tmp_path / "out" / "audit.html").read_text()
    assert main(["show", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "tokens dropped*" in shown
    assert "thresholds" not in shown  # rules have none of their own
    plain = sift({"web": DomainSource((str(tmp_path / "web.jsonl"),))}, out=tmp_path / "plain", filters=rules)
    assert plain.domains[0].bytes_per_token is None
    assert "tokens" not in (tmp_path / "plain" / "audit.html").read_text().partition("<body>")[2]
    assert Sifted.read(tmp_path / "plain") == dataclasses.replace(plain, state="kept", files_scored=0, seconds=0.0)


def test_texts_are_escaped_in_the_page(tmp_path: Path) -> None:
    texts = [prose(1), "<script>alert(1)</script> & more"]
    run(tmp_path, {"web": source(tmp_path, "web", texts)}, filters=[FilterSpec("gopher", domains="all")])
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page


def test_the_order_statistic_is_that_of_a_sort() -> None:
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(size=500), [0.0, -0.0, 1e300, -1e300, 5e-324], [1.5] * 20])
    parts = [np.append(scores[::2], np.nan), scores[1::2]]
    for rank in (0, 1, 100, 262, 263, 500, len(scores) - 1):
        found = _order_statistic([lambda p=p: p for p in parts], rank)
        assert found == np.sort(scores)[rank]


def test_copies_go_within_and_across_domains_and_of_heldout_text(tmp_path: Path) -> None:
    changed = prose(5).replace("Nobody knew", "Somebody knew")
    domains = {
        "one": source(tmp_path, "one", [prose(1), prose(2), prose(1).replace(" ", "\n"), prose(9)], [prose(2)]),
        "two": source(tmp_path, "two", [prose(5), prose(1), changed]),
    }
    found = run(tmp_path, domains, deduplicate="exact")
    assert keep(tmp_path / "out", "one") == [1, 0, 0, 1]
    assert keep(tmp_path / "out", "two") == [1, 0, 1]
    assert not list((tmp_path / "out").glob("*/heldout*"))
    near = sift(domains, out=tmp_path / "near", deduplicate="near")
    assert keep(tmp_path / "near", "two") == [1, 0, 0]
    assert near.domains[1].dropped["near copy"]["documents"] == 1
    assert found.domains[1].dropped == {"exact copy": {"documents": 1, "bytes": len(prose(1))}}


def test_a_copy_of_what_a_filter_drops_is_judged_by_itself(tmp_path: Path) -> None:
    text = "short but somebody wants it"
    domains = {"c4": source(tmp_path, "c4", [prose(1), text]), "notes": source(tmp_path, "notes", [text, prose(3)])}
    run(tmp_path, domains, filters=[FilterSpec("gopher")], deduplicate="exact")
    assert keep(tmp_path / "out", "c4") == [1, 0]
    assert keep(tmp_path / "out", "notes") == [1, 1]


def test_benchmark_words_are_found_whatever_their_case_and_marks(tmp_path: Path) -> None:
    question = "Which of these animals has a long neck and eats leaves from the tops of tall trees"
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text(json.dumps({"id": "x", "question": {"stem": question}, "choices": ["giraffe", "dog"]}) + "\n")
    twelve = " ".join(question.split()[1:13])
    texts = [prose(1), prose(2) + question.upper().replace(" ", ", "), prose(3) + twelve + ". " + prose(4)]
    found = run(tmp_path, {"web": source(tmp_path, "web", texts)}, decontaminate=[benchmark])
    assert keep(tmp_path / "out", "web") == [1, 0, 1]
    assert found.domains[0].dropped["13 words of a benchmark"]["documents"] == 1
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["benchmarks"]["counts"] == {"bench.jsonl": 1}


def test_more_files_change_no_decision_of_before(tmp_path: Path) -> None:
    model = tiny_dense(tmp_path / "model")
    spec = [FilterSpec("perplexity", drop=0.25, domains="all", arguments={"model": str(model)})]
    jsonl(tmp_path / "text" / "m.jsonl", [prose(i) for i in range(1, 41)])
    domain = DomainSource((str(tmp_path / "text" / "*.jsonl"),))
    first = run(tmp_path, {"d": domain}, filters=spec, deduplicate="near")
    before = keep(tmp_path / "out", "d")
    # It sorts before the first, holds a copy of a document of it, and text that would move the threshold.
    jsonl(tmp_path / "text" / "a.jsonl", [prose(3), *("zq " * n for n in range(30, 60)), prose(77)])
    second = run(tmp_path, {"d": domain}, filters=spec, deduplicate="near")
    assert second.files_scored == 1
    assert keep(tmp_path / "out", "d", 1) == before
    assert keep(tmp_path / "out", "d", 0)[0] == 0
    assert second.filters[0]["threshold"] == first.filters[0]["threshold"]
    (tmp_path / "text" / "m.jsonl").unlink()
    with pytest.raises(InputError, match="1 files of domain d that decided before are changed or named no more"):
        run(tmp_path, {"d": domain}, filters=spec, deduplicate="near")
    assert run(tmp_path, {"d": domain}, filters=spec, deduplicate="near", force=True).domains[0].documents == 32


SCRIPT = """
import sys
from prismoe.data.prepare import DomainSource
from prismoe.data.sift import FilterSpec, sift
from prismoe.data.sift import columns
import time
finish = columns.ColumnWriter.finish
columns.ColumnWriter.finish = lambda self: (time.sleep(0.05), finish(self))
sift({name: DomainSource((sys.argv[1] + f"/{name}-*.jsonl",)) for name in ("a", "b")}, out=sys.argv[2],
     filters=[FilterSpec("gopher", domains="all")], deduplicate="near")
"""


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for part in range(3):
            jsonl(tmp_path / "text" / f"{name}-{part}.jsonl", [prose(i + 7 * part) for i in range(12)])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "text")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    wanted = folder_bytes(tmp_path / "whole")
    out = tmp_path / "killed"
    for files in (1, 4, 9):  # so many files of ours are there when it is killed
        process = subprocess.Popen([*command, str(out)])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("*/*.*"))) >= 5 * files:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    subprocess.run([*command, str(out)], check=True)
    assert folder_bytes(out) == wanted


def test_what_cannot_be_sifted_is_told_in_one_line(tmp_path: Path) -> None:
    model = str(tiny_dense(tmp_path / "model"))
    web = {"web": source(tmp_path, "web", [prose(i) for i in range(5)])}
    same = {"web": source(tmp_path, "same", [prose(1)] * 20)}
    fluency = FilterSpec("perplexity", domains="all", arguments={"model": model})
    cases: list[tuple[type[PrismoeError], str, dict[str, DomainSource], dict[str, Any]]] = [
        (UsageError, "nothing to sift by; needed data.filters", web, {}),
        (UsageError, "data.filters: unknown 'gofer'; needed one of c4, .* did you mean gopher", web,
         {"filters": [FilterSpec("gofer")]}),
        (UsageError, "no domain named commoncrawl or c4; needed domains: .some of web", web,
         {"filters": [FilterSpec("gopher")]}),
        (UsageError, "domains: no domain wbe .hint: did you mean web", web,
         {"filters": [FilterSpec("gopher", domains=["wbe"])]}),
        (UsageError, "a rule set has thresholds of its own", web,
         {"filters": [FilterSpec("c4", drop=0.1, domains="all")]}),
        (UsageError, "filter c4: unknown argument model", web,
         {"filters": [FilterSpec("c4", domains="all", arguments={"model": "x"})]}),
        (InputError, "filter perplexity, domain web: 5 documents; needed 7 to drop one", web, {"filters": [fluency]}),
        (InputError, "all 20 documents have one score", same, {"filters": [fluency]}),
        (InputError, "filter linear: 0 texts that plainly are advertisements", web,
         {"filters": [FilterSpec("linear", domains="all")]}),
        (InputError, "decontaminate: .*none.jsonl: no such file", web, {"decontaminate": [tmp_path / "none.jsonl"]}),
    ]  # fmt: skip
    for number, (kind, message, domains, more) in enumerate(cases):
        with pytest.raises(kind, match=message):
            sift(domains, out=tmp_path / f"bad{number}", **more)
    run(tmp_path, web, deduplicate="exact")
    with pytest.raises(ResourceError, match="a different job"):
        run(tmp_path, web, deduplicate="near")
    jsonl(tmp_path / "copy.jsonl", [prose(i) for i in range(5)])
    with pytest.raises(InputError, match=r"copy.jsonl: the same as .*web.jsonl"):
        run(tmp_path, {"web": DomainSource((str(tmp_path / "web.jsonl"), str(tmp_path / "copy.jsonl")))},
            deduplicate="exact")  # fmt: skip


def test_a_config_names_filters_with_their_own_arguments(tmp_path: Path) -> None:
    text = """
data:
  domains: {c4: {train: x.jsonl}}
  deduplicate: near
  filters:
    - {name: perplexity, drop: 0.2, window: 64}
    - name: gopher
      domains: [c4]
"""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.data is not None
    assert config.data.filters == [
        FilterSpec("perplexity", 0.2, None, {"window": 64}),
        FilterSpec("gopher", None, ["c4"], {}),
    ]
    assert config.to_dict()["data"]["filters"][0]["window"] == 64
    path.write_text(text.replace("window", "widow").replace("gopher", "gofer").replace("0.2", "2"))
    with pytest.raises(UsageError) as error:
        load_config(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["6", "6", "7"]
    assert "did you mean data.filters.window?" in str(error.value) or "did you mean window?" in str(error.value)
