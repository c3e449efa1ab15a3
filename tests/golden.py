"""Golden cases, source family × target: how each is made, and a dense reference with its MLP replaced by the formula.

Run as a script it loads folders with whatever transformers is on PYTHONPATH and saves what they compute.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from prismoe.plan import Plan

NUM_TOKENS, NUM_GREEDY = 40, 20

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


@dataclass(frozen=True)
class Source:
    """One dense checkpoint; `old_spelling` rewrites its config.json the way transformers 4 wrote it."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    old_spelling: bool = False
    dtype: str = "float32"


SOURCES = {
    "llama2": Source("llama"),
    "llama2 172 neurons": Source("llama", {"intermediate_size": 172}),
    "llama3.1 tied": Source("llama", {"rope_parameters": LLAMA31_ROPE, "tie_word_embeddings": True}),
    "llama3.1 old spelling": Source("llama", {"rope_parameters": LLAMA31_ROPE}, old_spelling=True),
    "llama yarn": Source("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "llama wide heads": Source("llama", {"head_dim": 32}),
    "llama biased": Source("llama", {"attention_bias": True}),
    "llama bfloat16": Source("llama", dtype="bfloat16"),
    "mistral": Source("mistral"),
    "mistral window": Source("mistral", {"sliding_window": 8}),
    "qwen2 tied": Source("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Source("qwen3", {"head_dim": 32}),
    "phi3": Source("phi3"),
    "phi3 window": Source("phi3", {"sliding_window": 8}),
    "olmo2": Source("olmo2"),
    "granite": Source(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.11,
            "logits_scaling": 1.7,
        },
    ),
    "ernie4_5": Source("ernie4_5"),
    "cohere2": Source("cohere2", {"sliding_window": 8, "num_hidden_layers": 4}),
    "hunyuan": Source("hunyuan_v1_dense"),
    "qwen3 biased window": Source("qwen3", {"attention_bias": True, "max_window_layers": 0, **WINDOW}),
}

ONLY_5 = ("cohere2_moe", "granitemoe_swa")
"""Targets whose class transformers 4.57 has not."""

PARTITION = {"method": "random", "num_experts": 8, "router_std": 0.3}
SHARED = {"method": "random", "num_experts": 8, "shared": 32, "router_std": 0.3}
UPCYCLE = {"method": "upcycle", "num_experts": 8, "router_std": 0.3}
ABSORBED = {**SHARED, "absorb": True}
"""`absorb` is an option of convert; the rest are arguments of `make_plan`."""
ODD_SCALE = {"method": "random", "num_experts": 6, "top_k": 3, "scale": 1.7, "router_std": 0.3}
FOUR = {"method": "random", "num_experts": 4, "router_std": 0.3}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{source} -> {target}, {name}": (source, target, arguments)
    for source, target, name, arguments in [
        ("llama2", "mixtral", "partition", PARTITION),
        ("llama2", "mixtral", "upcycle", UPCYCLE),
        ("llama2", "mixtral", "odd scale", ODD_SCALE),
        ("llama2", "granitemoeshared", "partition", PARTITION),
        ("llama2", "granitemoeshared", "shared", SHARED),
        ("llama2", "granitemoeshared", "upcycle", UPCYCLE),
        ("llama2 172 neurons", "mixtral", "4 experts of 43", FOUR),
        ("llama2 172 neurons", "granitemoeshared", "4 experts of 43", FOUR),
        ("llama3.1 tied", "mixtral", "partition", PARTITION),
        ("llama3.1 tied", "granitemoeshared", "shared", SHARED),
        ("llama3.1 old spelling", "mixtral", "upcycle", UPCYCLE),
        ("llama3.1 old spelling", "granitemoeshared", "partition", PARTITION),
        ("llama yarn", "mixtral", "partition", PARTITION),
        ("llama wide heads", "mixtral", "partition", PARTITION),
        ("llama biased", "granitemoeshared", "shared", SHARED),
        ("llama bfloat16", "mixtral", "partition", PARTITION),
        ("mistral", "mixtral", "partition", PARTITION),
        ("mistral", "granitemoeshared", "shared", SHARED),
        ("mistral window", "mixtral", "partition", PARTITION),
        ("mistral window", "mixtral", "upcycle", UPCYCLE),
        ("qwen2 tied", "granitemoeshared", "partition", PARTITION),
        ("qwen2 tied", "granitemoeshared", "shared", SHARED),
        ("qwen2 tied", "granitemoeshared", "upcycle", UPCYCLE),
        ("qwen3", "qwen3_moe", "partition", PARTITION),
        ("qwen3", "qwen3_moe", "upcycle", UPCYCLE),
        ("qwen3", "qwen3_moe", "middle layer dense", {**PARTITION, "layers": "even"}),
        ("qwen3 biased window", "qwen3_moe", "partition", PARTITION),
        ("llama2", "granitemoe", "partition", PARTITION),
        ("qwen2 tied", "granitemoe", "upcycle", UPCYCLE),
        ("granite", "granitemoe", "partition", PARTITION),
        ("granite", "granitemoeshared", "shared", SHARED),
        ("llama3.1 tied", "granitemoehybrid", "shared", SHARED),
        ("granite", "granitemoehybrid", "partition", PARTITION),
        ("llama3.1 tied", "granitemoe_swa", "shared", SHARED),
        ("mistral window", "granitemoe_swa", "shared", SHARED),
        ("qwen2 tied", "granitemoe_swa", "partition", PARTITION),
        ("llama2", "qwen2_moe", "shared", SHARED),
        ("llama3.1 tied", "qwen2_moe", "shared", SHARED),
        ("mistral window", "qwen2_moe", "shared", SHARED),
        ("qwen2 tied", "qwen2_moe", "shared", SHARED),
        ("qwen2 tied", "qwen2_moe", "partition", PARTITION),
        ("qwen2 tied", "qwen2_moe", "upcycle", UPCYCLE),
        ("qwen2 tied", "qwen2_moe", "middle layer dense", {**SHARED, "layers": "even"}),
        ("llama2", "glm4_moe", "shared", SHARED),
        ("llama3.1 tied", "glm4_moe", "shared, first layer dense", {**SHARED, "layers": "1-2"}),
        ("qwen2 tied", "glm4_moe", "shared", SHARED),
        ("qwen3", "glm4_moe", "shared", SHARED),
        ("qwen3", "glm4_moe", "upcycle", UPCYCLE),
        ("phi3", "mixtral", "partition", PARTITION),
        ("phi3 window", "mixtral", "upcycle", UPCYCLE),
        ("phi3", "granitemoeshared", "shared", SHARED),
        ("phi3", "qwen2_moe", "shared", SHARED),
        ("olmo2", "flex_olmo", "partition", PARTITION),
        ("olmo2", "flex_olmo", "upcycle", UPCYCLE),
        ("ernie4_5", "ernie4_5_moe", "shared", SHARED),
        ("ernie4_5", "ernie4_5_moe", "first layer dense", {**PARTITION, "layers": "1-2"}),
        ("ernie4_5", "ernie4_5_moe", "upcycle", UPCYCLE),
        ("cohere2", "cohere2_moe", "shared", SHARED),
        ("cohere2", "cohere2_moe", "middle layers dense", {**PARTITION, "layers": "0,3"}),
        ("hunyuan", "hunyuan_v1_moe", "shared", SHARED),
        ("hunyuan", "hunyuan_v1_moe", "upcycle", UPCYCLE),
        ("llama2", "mixtral", "shared absorbed", ABSORBED),
        ("llama3.1 tied", "granitemoe", "shared absorbed", {**ABSORBED, "scale": 1.7}),
        ("phi3", "mixtral", "shared absorbed", ABSORBED),
        ("qwen3", "qwen3_moe", "shared absorbed", ABSORBED),
        ("olmo2", "flex_olmo", "shared absorbed", ABSORBED),
    ]
}


def make_source(folder: Path, name: str) -> Path:
    """Save the dense checkpoint of a case."""
    from tests.tiny import tiny_dense

    source = SOURCES[name]
    tiny_dense(folder, source.family, dtype=source.dtype, **source.overrides)
    if source.old_spelling:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope
        config["torch_dtype"] = config.pop("dtype")
        path.write_text(json.dumps(config))
    return folder


def prompt() -> torch.Tensor:
    """[1, T] token ids of every case."""
    import torch

    return torch.randint(3, 128, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(7))


def compute(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] on the prompt, and the greedy continuation (without a cache: nothing but the forward pass)."""
    import torch

    ids = prompt() % model.config.vocab_size
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        for _ in range(NUM_GREEDY):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    return logits, ids[0, NUM_TOKENS:].numpy()


def reference(folder: Path, plan: Plan, routers: dict[int, np.ndarray], *, gate: str = "softmax") -> Any:
    """The stock dense model in which planned layers compute: shared + scale · Σ over the top-k of p · expert.

    p is the softmax over the kept logits, or with `gate` "sigmoid" their sigmoids over the sum of these.
    """
    import torch
    from torch.nn.functional import silu
    from transformers import AutoModelForCausalLM

    class Routed(torch.nn.Module):
        def __init__(self, mlp: Any, index: int) -> None:
            super().__init__()
            layer = plan.layers[index]
            assert layer is not None
            self.mlp, self.layer = mlp, layer
            self.router = torch.from_numpy(np.asarray(routers[index], np.float32))

        def neurons(self, x: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
            at = torch.from_numpy(ids.astype(np.int64))
            fused = getattr(self.mlp, "gate_up_proj", None)
            gate, up = (self.mlp.gate_proj.weight, self.mlp.up_proj.weight) if fused is None else fused.weight.chunk(2)
            hidden = silu(x @ gate[at].T) * (x @ up[at].T)
            return hidden @ self.mlp.down_proj.weight[:, at].T

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept, chosen = (x @ self.router.T).topk(plan.top_k, dim=-1)
            p = kept.softmax(-1) if gate == "softmax" else kept.sigmoid() / kept.sigmoid().sum(-1, keepdim=True)
            weights = torch.zeros(*x.shape[:-1], len(self.router)).scatter(-1, chosen, p)
            routed = sum(weights[..., e, None] * self.neurons(x, ids) for e, ids in enumerate(self.layer.experts))
            return self.layer.scale * routed + self.neurons(x, self.layer.shared)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, block in enumerate(model.model.layers):
        if plan.layers[index] is not None:
            block.mlp = Routed(block.mlp, index)
    return model


def load(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """The stock model in float32 and every key that did not fit."""
    import torch
    from transformers import AutoModelForCausalLM, __version__

    dtype = {"torch_dtype" if __version__.startswith("4.") else "dtype": torch.float32}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **dtype
    )
    return model.eval(), {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def main(out: Path, folders: list[Path]) -> None:
    """Save logits, greedy ids and misfit keys of each folder into `out`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    found: dict[str, np.ndarray] = {"version": np.array(transformers.__version__)}
    for folder in folders:
        model, misfits = load(folder)
        found[f"{folder.name}/logits"], found[f"{folder.name}/greedy"] = compute(model)
        found[f"{folder.name}/misfits"] = np.array(json.dumps(misfits))
        keys = inspect.signature(type(model.config).__init__).parameters
        found[f"{folder.name}/keys"] = np.array([key for key in keys if key not in ("self", "kwargs")])
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
