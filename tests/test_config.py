"""Configs: what is read, what is refused, and the exact lines that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prismoe.config import Config, load_config
from prismoe.errors import UsageError
from prismoe.registry import names

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def read(tmp_path: Path, text: str, **arguments: object) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, **arguments)  # type: ignore[arg-type]


def refuse(tmp_path: Path, text: str, **arguments: object) -> str:
    """The lines of the refusal, the folder's name taken out."""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text, **arguments)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_config_becomes_typed_values(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
source: some/model
seed: 7
plan: {method: random, num_experts: 16, top_k: 4, scale: 2, layers: 4-27, router: centroid}
data:
  domains:
    books: {train: "books/*.jsonl"}
    code: {train: [a.jsonl, b.jsonl], heldout: c.jsonl, field: text}
  weights: {books: 1, code: 0}
pretrain: {steps: 200, lr: 1e-4, betas: [0.9, 0.99], coefficient: 0.02}
""",
    )
    assert (config.plan.arguments, config.plan.scale) == ({"num_experts": 16}, 2.0)
    assert (config.plan.top_k, config.plan.layers) == (4, "4-27")
    assert config.data is not None
    assert config.data.domains["code"].train == ["a.jsonl", "b.jsonl"]
    assert config.data.weights == {"books": 1.0, "code": 0.0}
    assert config.pretrain is not None
    assert (config.pretrain.lr, config.pretrain.betas, config.pretrain.seed) == (1e-4, (0.9, 0.99), 7)
    assert config.pretrain.arguments == {"coefficient": 0.02}
    assert (config.convert.target, config.convert.pad_to) == ("mixtral", 32)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        overrides=[
            "plan.num_experts=4",
            "pretrain.steps=200",
            "pretrain.coefficient=1e-3",
            "data.domains.a.train=x.txt",
        ],
        source="m",
        seed=3,
    )
    assert read(tmp_path, yaml.safe_dump(config.to_dict())) == config


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
source: m
plan:
  num_expert: 8
  top_k: two
  layers: [1, a]
  router: centre
pretrain:
  batch: 3
  num_experts: 4
  betas: [0.9, 1.5]
convert: {target: mixtrol}
data:
  domains:
    a: {trian: x}
evaluate: {}
"""
    rows = ("auto", "centroid", "prompts", "random", "regressed", "from:FILE", "zero")
    assert refuse(tmp_path, text).splitlines() == [
        "run.yaml:3: unknown key plan.num_expert (hint: did you mean num_experts?)",
        'run.yaml:4: plan.top_k is "two"; needed an integer',
        'run.yaml:5: plan.layers[1] is "a"; needed an integer',
        f"run.yaml:6: plan.router is 'centre'; needed one of {', '.join(rows)} (hint: did you mean centroid?)",
        "run.yaml:8: unknown key pretrain.batch (hint: did you mean batch_size?)",
        "run.yaml:9: unknown key pretrain.num_experts (hint: did you mean plan.num_experts?)",
        "run.yaml:10: pretrain.betas[1] is 1.5; needed less than 1.0",
        f"run.yaml:11: convert.target is 'mixtrol'; needed one of {', '.join(names('prismoe.targets'))}"
        " (hint: did you mean mixtral?)",
        "run.yaml:14: unknown key data.domains.a.trian (hint: did you mean train?)",
        "run.yaml:14: data.domains.a.train is missing",
        "run.yaml:15: unknown key evaluate (hint: did you mean eval?)",
    ]


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (
            "{a: 0.5, c: 0.5}",
            "weights for c, which are not domains; no weight for b; needed one weight per domain"
            " (hint: 0 leaves a domain out of training)",
        ),
        ("{a: 0.5, b: 0.6}", "weights that sum to 1.1; needed 1"),
        ("lama1", "unknown weights 'lama1'; needed one of llama1, proportional, sheared-llama, uniform, or a table"),
    ],
)
def test_weights_are_held_against_the_domains_before_anything_is_prepared(
    tmp_path: Path, weights: str, problem: str
) -> None:
    text = f"data:\n  domains: {{a: {{train: x}}, b: {{train: y}}}}\n  weights: {weights}\n"
    assert refuse(tmp_path, text) == f"run.yaml:3: data.weights: {problem}"
    for right in ("{a: 1.0, b: 0}", "uniform", "proportional"):
        assert read(tmp_path, text, overrides=[f"data.weights={right}"]).data is not None
    line = refuse(tmp_path, "pretrain: {mixing: sheard}\n")
    assert line.startswith("run.yaml:1: pretrain.mixing is 'sheard'; needed one of doremi, sheared, static")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1.e-4", 1e-4),
        (".5", 0.5),
        ("3", 3.0),
        ("2_000.5", 2000.5),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path, written: str, value: float) -> None:
    config = read(tmp_path, f"pretrain: {{lr: {written}, steps: 200}}")
    assert config.pretrain is not None
    assert config.pretrain.lr == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 010", 'run.yaml:1: seed is "010"; needed an integer'),
        ("seed: 1:30", 'run.yaml:1: seed is "1:30"; needed an integer'),
        ("seed: true", "run.yaml:1: seed is true; needed an integer"),
        ("seed: 1.0", "run.yaml:1: seed is 1.0; needed an integer"),
        ("seed: '1'", 'run.yaml:1: seed is "1"; needed an integer'),
        ("seed: -1", "run.yaml:1: seed is -1; needed 0 or more"),
        ("source: 12", "run.yaml:1: source is 12; needed text"),
        ("source: 2020-01-01\nout: no\nseed: ~", "run.yaml:3: seed is empty; needed an integer"),
        ("plan: {scale: 0}", "run.yaml:1: plan.scale is 0; needed more than 0.0 or 'auto', 'paper', 'mean'"),
        ("plan: {router_std: -1}", "run.yaml:1: plan.router_std is -1; needed 0.0 or more"),
        ("pretrain: {lr: .inf}", 'run.yaml:1: pretrain.lr is ".inf"; needed a number'),
        ("pretrain: {lr: 1e999}", "run.yaml:1: pretrain.lr is Infinity; needed a finite number"),
        ("pretrain: {fast_matmul: yes}", 'run.yaml:1: pretrain.fast_matmul is "yes"; needed true or false'),
        ("plan: 3", "run.yaml:1: plan is 3; needed a section with keys below it"),
        ("data: {domains: {}}", "run.yaml:1: data.domains is {}; needed at least one name with its keys below it"),
        ("data: {weights: uniform}", "run.yaml:1: data.domains is missing"),
        (
            "pretrain: {steps: 10,\n  warmup_steps: 50}",
            "run.yaml:2: pretrain.warmup_steps: 50 warm-up steps of 10 steps; needed fewer than steps"
            " (hint: with so few steps, warmup_steps=0 or a tenth of them)",
        ),
    ],
)
def test_values_are_strict(tmp_path: Path, text: str, line: str) -> None:
    assert refuse(tmp_path, text).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nplan: {}\nseed: 2", "run.yaml:3: seed is written twice (hint: the first is in line 1)"),
        ("plan:\n  top_k: 1\n  top_k: 2", "run.yaml:3: top_k is written twice (hint: the first is in line 2)"),
        ("source: &a x", "run.yaml:1: anchor &a; needed the value written out"),
        ("a: &a [x]\nb: *a", "run.yaml:1: anchor &a; needed the value written out"),
        ("source: !!python/name:os.system x", "tag tag:yaml.org,2002:python/name:os.system; needed plain data"),
        ("source: !env HOME", "run.yaml:1: tag !env; needed plain data without tags"),
        ("- a\n- b", "run.yaml:1: the document is not a mapping; needed `section:` with keys below it"),
        ("seed: 1\n---\nseed: 2", "run.yaml:2: a second document; needed one document in a file"),
        ("[a]: 1", "run.yaml:1: a key that is a list or a mapping; needed a name"),
        ("source: {a: [1, 2", "run.yaml:1: not YAML:"),
        ("source: a: b", "run.yaml:1: not YAML: mapping values are not allowed here"),
        ("source: a\n\tout: b", "run.yaml:2: not YAML:"),
        ("source: \x07", "run.yaml:1: not YAML: unacceptable character"),
        ("seed: " + "[" * 100, "run.yaml:1: nested deeper than 32 levels; needed section, key, value"),
    ],
)
def test_yaml_traps_are_refused(tmp_path: Path, text: str, line: str) -> None:
    assert line in refuse(tmp_path, text)


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
    assert refuse(tmp_path, "\n".join(rows)) == "run.yaml:1: anchor &a0; needed the value written out"


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read it: No such file or directory; needed a YAML config"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"source: caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 at byte 11; needed UTF-8 text"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(UsageError, match="1000001 bytes; needed at most 1000000"):
        load_config(tmp_path / "large.yaml")


def test_an_empty_file_and_empty_sections_are_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == read(tmp_path, "plan:\nconvert:\ndata:\npretrain:\n") == load_config()


def test_overrides_go_over_the_file_with_the_same_checks(tmp_path: Path) -> None:
    text = "source: m\nplan: {num_experts: 4}\n"
    config = read(
        tmp_path, text, overrides=["plan.num_experts=8", "plan.layers=[0, 2]", "out=runs/a=b", "seed=1"], seed=5
    )
    assert (config.plan.arguments["num_experts"], config.plan.layers, config.out, config.seed) == (
        8,
        [0, 2],
        "runs/a=b",
        5,
    )
    given = ["plan.num_experts=8", "plan.layers=[0, 2]", "out=runs/a=b"]
    words = config.words()
    assert (words[0], sorted(words[1:4]), words[4:]) == (str(tmp_path / "run.yaml"), sorted(given), ["--seed", "5"])
    assert load_config(overrides=["plan.top_k=3"], source="m", out="o").words() == ["m", "plan.top_k=3", "--out", "o"]
    line = refuse(tmp_path, text, overrides=["plan.num_experts=many", "plan.topk=2", "seed.x=1"])
    assert line.splitlines() == [
        "plan.topk=2: unknown key plan.topk (hint: did you mean top_k?)",
        'plan.num_experts=many: plan.num_experts is "many"; needed an integer',
        'seed.x=1: seed is {"x": 1}; needed an integer',
    ]
    assert refuse(tmp_path, text, overrides=["source.x=1"]) == (
        "source.x=1: x lies below a value; needed a section (hint: it has one at run.yaml:1)"
    )
    assert refuse(tmp_path, text, overrides=["nonsense"]).startswith(
        "nonsense: not an override; needed section.key=value"
    )


def test_values_remember_where_they_were_written(tmp_path: Path) -> None:
    config = read(tmp_path, "source: m\nplan:\n  top_k: 3\n", overrides=["plan.num_experts=2"])
    assert config.place("plan.top_k") == f"{tmp_path}/run.yaml:3: plan.top_k"
    assert config.place("plan.num_experts") == "plan.num_experts=2"
    assert config.place("plan.layers") == "plan.layers"


def test_a_verb_asks_for_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml: out is not set; needed --out FOLDER"):
        read(tmp_path, "source: m").need("out")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_ship_are_right(path: Path) -> None:
    config = load_config(path)
    assert config.source is not None
    assert config.out is not None


def test_there_are_configs_to_ship() -> None:
    assert len(CONFIGS) >= 3
