"""Every task beside the harness's stock definition on the same rows: prompts, answers, scores.

The stock side is the documented way to point a stock task at files: a YAML that includes the harness's own and names
JSONL in the hub's layout. Ours reads the files that people have, in their layout.
"""

from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from prismoe.evaluate import harness
from prismoe.evaluate.localfiles import LOCAL, read_files
from prismoe.evaluate.tasks import score_tasks
from tests.benchmarkrows import SUBJECTS, hub_rows, write_files, write_rows
from tests.training import tiny_moe

SHOTS = {"arc_challenge": 2, "boolq": 3, "gsm8k": 2, "hellaswag": 2, "mmlu": 2, "nq_open": 2, "winogrande": 2}
SEED = 7
DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """The harness's own length of an answer, 256, is all that the model has positions for: on both sides 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "max_gen_toks", 12)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("model") / "moe")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("files"))
    rows = hub_rows()["hellaswag"]["train"]  # the file of examples is in the hub's layout: that is read too
    write_rows(folder / "hellaswag_train_fewshot.jsonl", rows)
    return folder


def stock_parts(task):
    """Name → (definition, data set, subject)."""
    if task == "mmlu":
        return {f"mmlu_{s}": (f"mmlu/default/mmlu_{s}.yaml", "mmlu", s) for s in SUBJECTS}
    return {task: (LOCAL[task].definition, task.removesuffix("_mc1").removesuffix("_mc2"), None)}


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """What the harness finds when it is called directly."""
    folder, rows, names = tmp_path_factory.mktemp("stock"), hub_rows(), []
    for task in LOCAL:
        for name, (definition, dataset, subject) in stock_parts(task).items():
            splits = {
                split: [row for row in some if subject is None or row["subject"] == subject]
                for split, some in rows[dataset].items()
            }
            data = {split: str(write_rows(folder / f"{name}_{split}.jsonl", some)) for split, some in splits.items()}
            config = {
                **{"include": str(DEFINITIONS / definition), "task": f"stock_{name}", "tag": None},
                **{"dataset_path": "json", "dataset_name": None, "num_fewshot": SHOTS.get(task, 0)},
                "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
            }
            if "train" not in splits:
                config["training_split"] = None
            if "validation" not in splits:
                config["validation_split"] = None
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
            names.append(f"stock_{name}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(model), tokenizer=tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, fewshot_random_seed=SEED, bootstrap_iters=0)


@pytest.fixture(scope="module")
def ours(model, files):
    results = score_tasks(model, tasks=[f"{t}:{SHOTS.get(t, 0)}" for t in LOCAL], files=files, seed=SEED)
    return {result.task: result for result in results}


@pytest.mark.parametrize("task", LOCAL)
def test_prompts_answers_and_scores_are_those_of_the_stock_task(task, stock, ours, model, files):
    logged = [one for name in stock_parts(task) for one in stock["samples"][f"stock_{name}"]]
    shots = SHOTS.get(task, 0)
    benchmark = harness.open_benchmark(
        *(task, read_files(task, files, num_fewshot=shots)),
        **{"num_fewshot": shots, "limit": None, "seed": SEED},
    )
    opened = harness.open_model(model, batch_size=3, on_progress=lambda what, done, total: None)
    documents = harness.run(opened, benchmark)
    logged = [one for one in logged if one["filter"] == benchmark.filter]
    assert len(documents) == len(logged) >= 5
    for found, expected in zip(documents, logged, strict=True):
        texts = [[text for text in one if isinstance(text, str)] for one in found["arguments"]]
        assert texts == [[text for text in one if isinstance(text, str)] for one in expected["arguments"]]
        assert found["target"] == expected["target"]
        assert found[benchmark.metric] == pytest.approx(expected[benchmark.metric], abs=1e-5)
        if benchmark.metric != "exact_match":
            answers = [[one[0][0] for one in sample["resps"]] for sample in (found, expected)]
            assert answers[0] == pytest.approx(answers[1], abs=1e-4)
    result = ours[task]
    assert result.per_document_N.tolist() == pytest.approx([one[benchmark.metric] for one in logged], abs=1e-5)
    if task != "mmlu":
        scores = stock["results"][f"stock_{task}"]
        assert result.score == pytest.approx(scores[f"{result.metric},{benchmark.filter}"], abs=1e-5)
        assert result.num_fewshot == shots == stock["n-shot"][f"stock_{task}"]


def test_the_metric_is_the_normalised_accuracy_where_there_is_one(ours):
    assert {task: result.metric for task, result in ours.items()} == {
        **dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag", "logiqa", "piqa", "sciq"), "acc_norm"),
        **dict.fromkeys(("boolq", "lambada_openai", "mmlu", "winogrande"), "acc"),
        **dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2"), "acc"),
        **dict.fromkeys(("gsm8k", "nq_open"), "exact_match"),
    }


def test_chance_belongs_to_the_documents(ours):
    rows = hub_rows()
    of_arc = [1 / len(row["choices"]["text"]) for row in rows["arc_easy"]["test"]]
    assert len(set(of_arc)) > 1  # three to five choices
    labels = [row["mc2_targets"]["labels"] for row in rows["truthfulqa"]["validation"]]
    expected = {
        **dict.fromkeys(("boolq", "piqa", "winogrande"), 0.5),
        **dict.fromkeys(("hellaswag", "logiqa", "mmlu", "sciq", "truthfulqa_mc1"), 0.25),
        **dict.fromkeys(("gsm8k", "lambada_openai", "nq_open"), None),
        "arc_easy": sum(of_arc) / len(of_arc),
        "truthfulqa_mc2": sum(sum(one) / len(one) for one in labels) / len(labels),
    }
    for task, chance in expected.items():
        assert ours[task].chance == (None if chance is None else pytest.approx(chance)), task


def test_standard_errors_are_the_harness_s(ours, stock):
    from lm_eval.api.metrics import mean_stderr

    for result in ours.values():
        assert result.standard_error == pytest.approx(mean_stderr(result.per_document_N.tolist())), result.task


def test_either_layout_of_a_file_is_the_same_question(tmp_path, model, files, ours):
    hub = write_files(tmp_path / "hub", hub=True)
    tasks = ["boolq:3", "hellaswag:2", "truthfulqa_mc2"]
    for result in score_tasks(model, tasks=tasks, files=hub, seed=SEED):
        assert (result.documents_hash, result.task_hash) == (
            ours[result.task].documents_hash,
            ours[result.task].task_hash,
        )
        assert result.score == ours[result.task].score


def test_hashes_say_what_was_asked(model, files, ours):
    of = {"tasks": ["arc_easy:2"], "files": files}
    shown, redrawn, fewer = (
        score_tasks(model, **{**of, **more})[0] for more in ({"seed": SEED}, {"seed": 8}, {"seed": SEED, "limit": 2})
    )
    assert shown.task_hash == redrawn.task_hash == fewer.task_hash != ours["arc_easy"].task_hash
    assert len({one.documents_hash for one in (shown, redrawn, fewer, ours["arc_easy"])}) == 4
    assert (fewer.num_documents, fewer.limit) == (2, 2)
    assert fewer.per_document_N.tolist() == shown.per_document_N[:2].tolist()
