"""Benchmark tasks: what is refused before anything runs, what is counted, and that nothing but the question matters."""

import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.evaluate.localfiles import LOCAL, read_files
from prismoe.evaluate.tasks import check_tasks, score_tasks, suites
from tests.benchmarkrows import hub_rows, write_files, write_rows
from tests.tiny import tiny_dense


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_dense(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def changed(model, folder, change):
    """The model with other weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("suite", "tasks", "message"),
    [
        (None, None, "no benchmark; needed a suite or tasks"),
        (None, [], "no benchmark; needed a suite or tasks"),
        ("llama-moe", ["sciq"], "both suite and tasks"),
        (
            "llama_moe",
            None,
            r"suite: unknown 'llama_moe'; needed one of alignment, llama-moe \(hint: did you mean llama",
        ),
        (None, ["helaswag"], "tasks: unknown task 'helaswag' for files; needed one of .*did you mean hellaswag"),
        (None, ["sciq", "sciq:0"], "tasks: sciq twice"),
        (None, ["sciq:many"], "tasks: sciq:many: 'many' examples; needed a whole number"),
        (None, ["lambada_openai:2"], "lambada_openai: 2 examples asked for; needed 0"),
    ],
)
def test_what_cannot_be_asked(files, suite, tasks, message):
    with pytest.raises(UsageError, match=message):
        check_tasks(suite, tasks, files)


def test_a_missing_file_says_which_where_and_how_to_get_it(tmp_path, files):
    folder = shutil.copytree(files, tmp_path / "some")
    (folder / "arc_easy_test.jsonl").unlink()
    with pytest.raises(InputError) as error:
        check_tasks(None, ["sciq", "arc_easy"], folder)
    assert str(error.value) == (
        f"{folder}: no arc_easy_test.jsonl or arc_easy_validation.jsonl for task arc_easy "
        "(hint: where there is a network, python: import datasets; "
        "datasets.load_dataset('allenai/ai2_arc', 'ARC-Easy', split='test').to_json('arc_easy_test.jsonl'))"
    )
    with pytest.raises(InputError, match=r"gone: no such folder"):
        check_tasks("llama-moe", None, tmp_path / "gone")
    (folder / "boolq_train_fewshot.jsonl").unlink()
    with pytest.raises(InputError, match=r"no boolq_train_fewshot.jsonl for task boolq .*split='train'"):
        check_tasks(None, ["boolq:3"], folder)
    with pytest.raises(InputError, match=r"9 examples; needed 33 for 32 shots"):
        check_tasks(None, ["nq_open:32"], folder)
    with pytest.raises(InputError, match=r"9 examples of anatomy; needed 10 for 10 shots"):
        check_tasks(None, ["mmlu:10"], folder)


@pytest.mark.parametrize(
    ("task", "file", "change"),
    [
        ("piqa", "piqa_valid", {"label": 2}),
        ("piqa", "piqa_valid", {"sol1": None}),
        ("logiqa", "logiqa_test", {"label": "e"}),
        ("hellaswag", "hellaswag_val", {"label": 4}),
        ("arc_easy", "arc_easy_test", {"answerKey": "Z"}),
        ("winogrande", "winogrande_xl_validation", {"sentence": "no gap"}),
        ("mmlu", "mmlu_test", {"choices": ["a", "b"]}),
        ("truthfulqa_mc2", "truthfulqa_mc", {"mc2_targets": {"a": 0}}),
        ("nq_open", "nq_open_dev", {"answer": []}),
        ("boolq", "boolq_validation", {"answer": "maybe"}),
        ("lambada_openai", "lambada_openai_test", {"text": "word"}),
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, files, task, file, change):
    folder = shutil.copytree(files, tmp_path / "some")
    rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
    rows[2] |= change
    write_rows(folder / f"{file}.jsonl", rows)
    with pytest.raises(
        InputError, match=rf"{file}.jsonl:3: not a row of {task}; needed .*the answer among its choices"
    ):
        check_tasks(None, [f"{task}:0"], folder)
    for text, message in (("{", ":1: invalid JSON"), ("", ": no rows")):
        (folder / f"{file}.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            check_tasks(None, [f"{task}:0"], folder)


def test_hellaswag_without_a_file_of_examples_keeps_rows_back(tmp_path):
    rows = [row | {"ind": number} for number, row in enumerate(hub_rows()["hellaswag"]["train"] * 12)]
    for number, row in enumerate(rows):
        row["activity_label"] = str(number)
    write_rows(tmp_path / "hellaswag_val.jsonl", rows)
    found = read_files("hellaswag", tmp_path, num_fewshot=10)
    assert [row["activity_label"] for row in found.rows["validation"]] == [str(i) for i in range(8)]
    assert [row["activity_label"] for row in found.rows["train"]] == [str(i) for i in range(8, 108)]
    assert found.notes[0] == "examples from the last 100 rows of hellaswag_val.jsonl, which are not scored"
    assert len(read_files("hellaswag", tmp_path, num_fewshot=0).rows["validation"]) == 108
    write_rows(tmp_path / "hellaswag_val.jsonl", rows[:100])
    with pytest.raises(InputError, match="no row left to score"):
        read_files("hellaswag", tmp_path, num_fewshot=10)


def test_without_files_the_harness_is_asked_for_the_task():
    with pytest.raises(UsageError, match=r"unknown task 'sciqq' \(hint: did you mean sciq\?"):
        check_tasks(None, ["sciqq"], None)
    with pytest.raises(UsageError, match="humaneval runs code that the model wrote"):
        check_tasks(None, ["sciq", "humaneval"], None)
    with pytest.raises(UsageError, match="wikitext is no list of questions"):
        check_tasks(None, ["wikitext"], None)
    assert [one.num_fewshot for one in check_tasks(None, ["copa", "nq_open"], None)] == [0, 32]
    with pytest.raises(UsageError, match="offline: no benchmark files"):
        check_tasks("llama-moe", None, None, offline=True)


@pytest.mark.parametrize("task", ["humaneval", "mbpp_plus_instruct"])
def test_code_is_refused_with_files_too(files, task):
    with pytest.raises(UsageError, match=f"{task} runs code that the model wrote"):
        check_tasks(None, ["sciq", task], files)


def test_a_data_set_that_cannot_be_fetched_is_one_line(model):
    with pytest.raises(ResourceError, match=r"sciq: data set allenai/sciq cannot be fetched .*files=FOLDER"):
        score_tasks(model, tasks=["sciq"])


def test_a_missing_harness_says_what_to_install(monkeypatch, files):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(ResourceError, match=r"not installed; needed pip install 'prismoe\[eval\]'"):
        check_tasks("llama-moe", None, files)


def test_checking_files_loads_neither_the_harness_nor_torch(files):
    code = (
        "import sys; from pathlib import Path; from prismoe.evaluate.benchmarks import content, task_files; "
        f"from prismoe.evaluate.tasks import check_tasks; files = Path({str(files)!r}); "
        "check_tasks(None, ['sciq', 'mmlu:2'], files); content(files); task_files(None, ['sciq'], files); "
        "print([name for name in ('lm_eval', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_same_call_gives_the_same_numbers_and_the_batch_size_does_not_matter(model, files):
    tasks = ["arc_challenge:2", "winogrande", "truthfulqa_mc2", "mmlu:2"]
    once, twice, alone = (score_tasks(model, tasks=tasks, files=files, batch_size=size) for size in (8, 8, 1))
    for first, second, third in zip(once, twice, alone, strict=True):
        assert first == second
        assert first.per_document_N.tolist() == second.per_document_N.tolist()
        assert first.documents_hash == third.documents_hash
        # A choice is a choice; the one score that is no count is off by rounding at most.
        bound = 1e-5 if first.task == "truthfulqa_mc2" else 0
        assert np.abs(first.per_document_N - third.per_document_N).max() <= bound


def test_truncated_prompts_are_counted(model, files):
    (result,) = score_tasks(model, tasks=["arc_easy:7"], files=files)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    from prismoe.evaluate import harness

    rows = read_files("arc_easy", files, num_fewshot=7)
    benchmark = harness.open_benchmark("arc_easy", rows, num_fewshot=7, limit=None, seed=0)
    (part,) = benchmark.parts.values()
    part.set_fewshot_seed(benchmark.seed)
    with harness.tamed_harness():
        part.build_all_requests()
    lengths = [len(tokenizer.encode("".join(request.args)).ids) for request in part.instances]
    assert 0 < sum(length > 257 for length in lengths) < len(lengths)
    assert (result.num_requests, result.num_truncated) == (len(lengths), sum(length > 257 for length in lengths))


def test_what_the_model_writes_is_scored_the_same_at_every_batch_size(tmp_path):
    """Every other answer is made from what the stock class writes, one question at a time: right, wrong, right …"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_dense(tmp_path / "dense", max_position_embeddings=96)
    questions = [row["question"] for row in hub_rows()["nq_open"]["validation"]]
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows, lengths = [], set()
    for number, question in enumerate(questions):
        prompt = tokenizer.encode(f"Answer these questions:\n\nQ: {question}?\nA:")
        ids = torch.tensor([prompt[-48:]])  # as much as leaves room for the answer
        lengths.add(ids.shape[1])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        written = re.split(r"[\n.,]", text)[0].strip()
        rows.append({"question": question, "answer": ["no", f"{written}x" if number % 2 else written]})
    assert len(lengths) > 1  # batches are padded
    write_rows(tmp_path / "nq_open_dev.jsonl", rows)
    for size in (1, 3):
        (result,) = score_tasks(model, tasks=["nq_open:0"], files=tmp_path, batch_size=size)
        assert result.per_document_N.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0], (rows, size)
        assert "answers of at most 48 tokens, half of the model's positions" in result.note


def test_a_limit_is_spread_over_subjects(model, files):
    (result,) = score_tasks(model, tasks=["mmlu:1"], files=files, limit=3)
    assert (result.num_documents, result.num_requests) == (3, 12)
    with pytest.raises(UsageError, match="limit 0, batch_size 16; needed at least 1"):
        score_tasks(model, tasks=["sciq"], files=files, limit=0)


def test_numbers_that_are_not_finite_stop_it(tmp_path, model, files):
    seen = []
    broken = changed(model, tmp_path / "norm", lambda t: t["model.norm.weight"].__setitem__(0, math.nan))
    with pytest.raises(NumericalError, match="norm: logits are not finite"):
        score_tasks(broken, tasks=["sciq"], files=files, on_progress=lambda *now: seen.append(now))
    assert seen == []
    unseen = changed(
        model, tmp_path / "rare", lambda t: t["model.embed_tokens.weight"].__setitem__(slice(16, None), math.nan)
    )
    for task, found in (("sciq", "a log-likelihood is"), ("nq_open:0", "logits are")):
        with pytest.raises(NumericalError, match=f"rare on {task.partition(':')[0]}: {found} not finite"):
            score_tasks(unseen, tasks=[task], files=files)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, model, files):
    folder = shutil.copytree(model, tmp_path / "other")
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][0], "id": 128, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="other: a tokenizer of 129 tokens does not fit a model of 128"):
        score_tasks(folder, tasks=["sciq"], files=files)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="other: not a readable fast tokenizer"):
        score_tasks(folder, tasks=["sciq"], files=files)


def test_progress_and_results_come_as_they_are_made(model, files):
    seen, results = [], []
    found = score_tasks(
        model,
        tasks=["mmlu:1", "piqa"],
        files=files,
        on_result=results.append,
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert results == found
    assert [now for now in seen if now[1] == now[2]] == [("benchmarks: mmlu", 40, 40), ("benchmarks: piqa", 10, 10)]
    assert json.loads(json.dumps(found[0].to_dict()))["harness"].startswith("lm_eval ")


def test_the_page_names_every_file():
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()
    for task, known in LOCAL.items():
        for _, name in (*known.scored, *known.shots):
            assert f"`{name}`" in page or f"`{name.replace(task, 'TASK')}`" in page, name


def test_suites_are_those_of_the_paper():
    assert set(suites()) == {"alignment", "llama-moe"}
    assert set(suites()["llama-moe"]) | set(suites()["alignment"]) <= set(LOCAL)
    shots = {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "mmlu": 5, "nq_open": 32}
    assert suites()["llama-moe"] == {task: shots.get(task, 0) for task in suites()["llama-moe"]}


def test_the_real_files_with_the_network_cut(shared, monkeypatch):
    """The whole suite on a real checkpoint; batch size and order of work change no answer."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    of = {"suite": "llama-moe", "files": shared / "eval", "limit": 2, "offline": True}
    model = shared / "models" / "stories260K"
    results, alone = score_tasks(model, **of), score_tasks(model, **{**of, "batch_size": 1, "limit": 1})
    assert [result.task for result in results] == list(suites()["llama-moe"])
    for one, other in zip(results, alone, strict=True):
        assert one.per_document_N.tolist()[:1] == other.per_document_N.tolist()
    notes = {result.task: result.note for result in results}
    assert notes["sciq"] == "scored on the validation split, not on test"
    assert notes["nq_open"].startswith("examples from validation rows that are not scored, not from train")
    assert notes["hellaswag"].endswith("900 of 10,042 documents")
    assert {result.task: result.num_truncated for result in results}["arc_challenge"] == 8


def test_cleaned_hellaswag_text_is_asked_as_it_is(shared):
    """The harness cleans a second time: nothing of the text may change by that."""
    from prismoe.evaluate import harness

    rows = read_files("hellaswag", shared / "eval", num_fewshot=0)
    benchmark = harness.open_benchmark("hellaswag", rows, num_fewshot=0, limit=None, seed=0)
    asked = benchmark.parts["hellaswag"].eval_docs
    lines = (shared / "eval" / "hellaswag_val.jsonl").read_text().splitlines()
    for document, line in zip(asked, lines, strict=True):
        row = json.loads(line)
        assert (document["query"], document["choices"]) == (row["query"], row["endings"])
