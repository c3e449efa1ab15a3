"""Every config that is shipped loads, and says what it would need, from config.json alone."""

import json
from pathlib import Path

import pytest

from prismoe.config import load_config
from prismoe.run import run

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith(("sft-", "recover-"))]
LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA3_8B = {
    **LLAMA2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
PUBLISHED = {
    # Parameters: those of the dense model and the router, and 16 zero neurons an expert where 688 is stored as 704.
    "llama-moe-3.0b-2of16": (LLAMA2_7B, 6_738_415_616 + 32 * 16 * 4096 * (1 + 3 * 16), 112),
    "llama-moe-3.5b-4of16": (LLAMA2_7B, 6_738_415_616 + 32 * 16 * 4096 * (1 + 3 * 16), 112),
    "llama-moe-3.5b-2of8": (LLAMA2_7B, 6_738_415_616 + 32 * 8 * 4096, 112),
    "llama3-8x8b-top2": (LLAMA3_8B, 8_030_261_248 + 32 * (7 * 3 * 4096 * 14336 + 8 * 4096), 512),
    "upcycle-nvidia": (LLAMA3_8B, 8_030_261_248 + 32 * (7 * 3 * 4096 * 14336 + 64 * 4096), 128),
}


def test_every_published_recipe_has_a_twin_for_a_laptop():
    names = {path.stem for path in CONFIGS}
    twins = {"laptop-llama-moe-2of16", "laptop-llama-moe-4of16", "laptop-llama-moe-2of8", "laptop-8x-top2"}
    shown = {"stories260k", "distill-stories260k", "dense-mi-stories260k", "sparsemixer2-stories260k", "seven-domains"}
    assert names == {*PUBLISHED, *twins, *shown, "laptop-upcycle-nvidia", "few-tokens"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_it_needs(tmp_path, name):
    model, parameters, processes = PUBLISHED[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(path, source=str(tmp_path / "model"), out=str(tmp_path / "run"))
    (done,) = run(config, stages=("pretrain",), dry_run=True).stages
    found = done.receipt
    assert not (tmp_path / "run").exists()
    assert found["parameters"] == parameters
    assert found["processes"] == processes
    # Weights, gradients and moments of a copy are all there, but for rows that do not divide.
    held = found["weight_bytes"] * (processes // found["layout"]["replicate"]) / 4
    assert parameters <= held < 1.6 * parameters
    assert found["optimizer_bytes"] == 2 * found["gradient_bytes"] == 2 * found["weight_bytes"]
    assert found["not_checked"]
    assert set(found["launch"]) == {"torchrun", "slurm", "kubernetes"}
    if name.startswith("llama-moe"):
        assert (found["tokens_per_step"], found["steps"]) == (14_680_064, 13_623)
        assert found["micro_batches"] == 4
        # Active weights of the paper's table, its router replaced by a linear one, plus causal attention.
        active = {"3.0b-2of16": 2_953_064_448, "3.5b-4of16": 3_494_129_664, "3.5b-2of8": 3_493_074_944}
        own = found["flops_per_token"] - 6 * 32 * 4096 * 4096
        assert own / 6 == pytest.approx(active[name.removeprefix("llama-moe-")] - 32000 * 4096, rel=0.02)
    else:
        assert 100e9 <= found["tokens"] < 100e9 + found["tokens_per_step"]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in PUBLISHED], ids=lambda path: path.stem)
def test_a_laptop_recipe_fits_a_laptop(tmp_path, shared, path):
    config = load_config(path, overrides=(), out=str(tmp_path / "run"))
    place = shared.parent if config.source.startswith("shared/") else ROOT  # the study's parent comes with the code
    source = place / config.source
    # Nothing is calibrated here, and the shape is what any method makes of as many experts.
    shaped = () if config.calibrate is None else ("calibrate=null", "plan.method=random")
    config = load_config(path, overrides=shaped, source=str(source), out=str(tmp_path / "run"))
    (done,) = run(config, stages=("pretrain",), dry_run=True).stages
    assert done.receipt["memory_bytes"] < 4e9
    assert done.receipt["sent_bytes"] == dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "all_to_all"), 0)
    for domain in config.data.domains.values():
        assert (shared.parent / domain.heldout).is_file()
