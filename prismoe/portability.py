"""Which engines run a converted model right, and which would be silently wrong, with the reason. One table.

What it says was measured or read in the engine's source, as `EVIDENCE` tells. transformers is tested with every release
(docs/targets.md); `make test-engines` runs llama.cpp and MLX on real conversions and holds every row against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from prismoe.checkpoint.family import DenseConfig
from prismoe.errors import UsageError
from prismoe.plan import PlanShape
from prismoe.registry import suggestion
from prismoe.targets import PREFERRED, all_targets

__all__ = ["ENGINES", "Portability", "choose_target", "portability", "width_warnings"]

ENGINES = ("transformers5", "transformers4", "vllm", "sglang", "gguf", "mlx")
"""gguf is llama.cpp and what is built on it."""


K_BLOCK = 256
"""Numbers of a row that a K-quant of llama.cpp stores together."""

EVIDENCE = {
    "transformers5": "tested with every release",
    "transformers4": "tested with every release",
    "vllm": "read in the source of vLLM 0.33, not run",
    "sglang": "read in the source of SGLang's main branch, not run",
    "gguf": "measured with llama-cpp-python 0.3.36 and the converter that it brings",
    "mlx": "measured with mlx-lm 0.32.2 and mlx 0.32.4 on a CPU",
}
"""How we know what the table says of an engine."""


@dataclass(frozen=True)
class Portability:
    """One engine's verdict: runs, refused (an error when it loads), wrong (it loads and computes something else), or
    unknown (nobody has looked). `evidence` is how we know; empty where we do not."""

    engine: str
    verdict: str
    why: str
    evidence: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class _Trap:
    """`targets` come to `verdict` in `engines` where `when` holds. No targets: all of them."""

    engines: tuple[str, ...]
    targets: tuple[str, ...]
    verdict: str
    why: str
    when: Callable[[DenseConfig, PlanShape], bool] = lambda dense, shape: True


RAN, READ = "float32 logits within 1e-4 and greedy tokens equal to transformers'", "read in its source, not run"
BACKEND = "read in its source, not run: through its transformers backend"
TESTED = "tested with every release"
RUNS: dict[str, dict[str, str]] = {
    "transformers5": {name: TESTED for name, target in all_targets().items() if target.router},
    "transformers4": {name: TESTED for name, target in all_targets().items() if target.router},
    "vllm": {
        **dict.fromkeys(("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "qwen3_moe"), READ),
        **dict.fromkeys(("ernie4_5_moe", "glm4_moe"), READ),
        **dict.fromkeys(("flex_olmo", "hunyuan_v1_moe"), BACKEND),
    },
    "sglang": dict.fromkeys(("mixtral", "granitemoe", "qwen2_moe", "qwen3_moe", "glm4_moe"), READ),
    "gguf": {
        **dict.fromkeys(("mixtral", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"), RAN),
        **dict.fromkeys(("qwen2_moe", "qwen3_moe", "ernie4_5_moe"), RAN),
    },
    "mlx": dict.fromkeys(
        ("mixtral", "granitemoe", "granitemoehybrid", "qwen2_moe", "qwen3_moe", "ernie4_5_moe", "glm4_moe"), RAN
    ),
}
"""Engine: target: how we know that it runs where no trap says otherwise. What is not here nobody has looked at."""

GRANITES = ("granitemoe", "granitemoeshared", "granitemoehybrid")
TRAPS: tuple[_Trap, ...] = (
    _Trap(("transformers4",), ("cohere2_moe", "granitemoe_swa"), "refused", "the class is in transformers 5 alone"),
    _Trap(
        ("vllm", "sglang"),
        (*GRANITES, "granitemoe_swa"),
        "refused",
        "its Granite attention has no bias",
        lambda dense, shape: dense.qkv_bias or dense.o_bias,
    ),
    _Trap(
        ("vllm",),
        ("mixtral", "qwen2_moe", "qwen3_moe"),
        "unknown",
        "windows that differ by layer: it knows one for all",
        lambda dense, shape: not dense.slides_uniformly,
    ),
    _Trap(("vllm",), ("cohere2_moe",), "wrong", "it has the sigmoid gate alone, ours is the softmax"),
    _Trap(
        ("sglang",),
        ("granitemoe",),
        "wrong",
        "it drops rope scaling",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("sglang",),
        ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"),
        "unknown",
        "rope scaling: not read there",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("sglang",),
        (),
        "unknown",
        "sliding window: not read there",
        lambda dense, shape: dense.sliding_window is not None,
    ),
    _Trap(
        ("sglang",),
        ("qwen2_moe",),
        "refused",
        "it looks for experts in every layer",
        lambda dense, shape: bool(shape.dense_layers),
    ),
    _Trap(
        ("gguf",),
        ("mixtral", "qwen2_moe", "qwen3_moe"),
        "wrong",
        "it ignores the sliding window: wrong past it",
        lambda dense, shape: dense.sliding_window is not None,
    ),
    _Trap(
        ("gguf",),
        GRANITES,
        "refused",
        "its converter has no rope scaling for it (Missing ROPE_FREQS)",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("gguf",),
        ("qwen2_moe", "ernie4_5_moe"),
        "wrong",
        "it drops rope scaling",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("gguf", "mlx"),
        ("qwen2_moe",),
        "wrong",
        "it never renormalises the kept weights (norm_topk_prob)",
        lambda dense, shape: shape.top_k < shape.num_experts,
    ),
    _Trap(
        ("gguf",),
        ("qwen2_moe",),
        "wrong",
        "the row of shared_expert_gate is zero in float16, and its sigmoid of zero is NaN",
        lambda dense, shape: dense.dtype == "float16",
    ),
    _Trap(
        ("gguf", "mlx"),
        ("qwen2_moe",),
        "refused",
        "it wants an lm_head of its own, and ours is the embedding",
        lambda dense, shape: dense.tie_embeddings,
    ),
    _Trap(
        ("gguf",),
        ("qwen2_moe", "qwen3_moe"),
        "refused",
        "it wants a router in every layer",
        lambda dense, shape: bool(shape.dense_layers),
    ),
    _Trap(
        ("gguf",),
        ("ernie4_5_moe",),
        "refused",
        "it reads the shared width off intermediate_size, which the dense layers need",
        lambda dense, shape: bool(shape.dense_layers and shape.shared_width),
    ),
    _Trap(("gguf",), ("flex_olmo",), "refused", "no such architecture"),
    _Trap(("gguf",), ("hunyuan_v1_moe",), "refused", "its converter wants a moe_topk for each layer"),
    _Trap(("gguf",), ("cohere2_moe",), "refused", "it wants a shared expert, averaged with the rest; ours is the sum"),
    _Trap(("gguf",), ("glm4_moe",), "refused", "its converter wants GLM's own tokenizer ([gMASK])"),
    _Trap(
        ("mlx",),
        ("mixtral", "granitemoehybrid"),
        "wrong",
        "it drops rope scaling",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("mlx",),
        ("qwen2_moe",),
        "refused",
        "it wants rope scaling spelt otherwise",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("mlx",),
        ("glm4_moe",),
        "refused",
        "it wants an lm_head of its own, and ours is the embedding",
        lambda dense, shape: dense.tie_embeddings,
    ),
    _Trap(
        ("gguf", "mlx"),
        ("qwen3_moe",),
        "refused",
        "its attention has no bias",
        lambda dense, shape: dense.qkv_bias or dense.o_bias,
    ),
    _Trap(
        ("mlx",),
        ("qwen2_moe",),
        "refused",
        "it looks for experts in every layer",
        lambda dense, shape: bool(shape.dense_layers),
    ),
    _Trap(
        ("mlx",),
        ("qwen3_moe", "ernie4_5_moe", "glm4_moe"),
        "unknown",
        "rope scaling: not run there",
        lambda dense, shape: dense.rope_scaling is not None,
    ),
    _Trap(
        ("mlx",),
        ("mixtral", "qwen2_moe", "qwen3_moe"),
        "wrong",
        "it ignores the sliding window: wrong past it",
        lambda dense, shape: dense.sliding_window is not None,
    ),
    _Trap(
        ("mlx",),
        ("mixtral",),
        "refused",
        "it takes the head size for hidden_size / num_heads",
        lambda dense, shape: dense.head_dim * dense.num_heads != dense.hidden_size,
    ),
    _Trap(
        ("mlx",),
        ("granitemoeshared", "granitemoe_swa", "flex_olmo", "cohere2_moe", "hunyuan_v1_moe"),
        "refused",
        "no such architecture",
    ),
    _Trap(
        ("vllm", "sglang", "mlx"),
        (),
        "unknown",
        "rope scaling of a kind that was not tried, only llama3",
        lambda dense, shape: dense.rope_scaling is not None and dense.rope_scaling["rope_type"] != "llama3",
    ),
    _Trap(
        ("gguf",),
        (),
        "unknown",
        "rope scaling of a kind that was not tried, only llama3 and yarn",
        lambda dense, shape: (
            dense.rope_scaling is not None and dense.rope_scaling["rope_type"] not in ("llama3", "yarn")
        ),
    ),
)
"""Where a target does not run, or not right, that otherwise does."""

SEVERITY = ("refused", "wrong", "unknown")


def portability(
    dense: DenseConfig, shape: PlanShape, target: str, *, engines: Sequence[str] = ENGINES
) -> tuple[Portability, ...]:
    """What each engine would make of the converted model.

    Raises:
        UsageError: an engine that is not in the table.
    """
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise UsageError(
            f"unknown engine {unknown[0]!r}",
            where="convert.engines",
            needed="of " + ", ".join(ENGINES),
            hint=suggestion(unknown[0], ENGINES),
        )
    return tuple(_verdict(dense, shape, target, engine) for engine in engines)


def choose_target(dense: DenseConfig, shape: PlanShape, *, engines: Sequence[str], target: str | None = None) -> str:
    """The first target that holds the plan and runs right in every one of `engines`; `target`: that one or none.

    Raises:
        UsageError: there is none; says for each target that holds the plan which engine is in the way and why.
    """
    found: list[str] = []
    for name in PREFERRED if target is None else (target,):
        objections = all_targets()[name].objections(dense, shape)
        rows = [row for row in portability(dense, shape, name, engines=engines) if row.verdict != "runs"]
        if not objections and not rows:
            return name
        if not objections:
            found.append(f"{name}: " + ", ".join(f"{row.engine} {row.verdict} ({row.why})" for row in rows))
        elif target is not None:
            found.append(f"{name}: " + ", ".join(map(str, objections)))
    hint = "convert.absorb=true puts the shared neurons into every expert" if shape.shared_width else ""
    raise UsageError(
        "; ".join(found) or "no target holds this plan",
        where="convert.engines",
        needed="a target that is right in " + ", ".join(engines),
        hint=hint,
    )


def width_warnings(shape: PlanShape, target: str, *, engines: Sequence[str], pad_to: int) -> tuple[str, ...]:
    """What the stored width of an expert costs in `engines`, though the model is right there: K-quants of llama.cpp
    store rows in blocks of 256, and a down matrix whose rows are no whole blocks falls back to a quantisation of 32.
    """
    width, shared_width = all_targets()[target].widths(shape, pad_to=pad_to)
    odd = sorted({part for part in (width, shared_width) if part % K_BLOCK})
    if "gguf" not in engines or not odd:
        return ()
    return (
        f"experts stored {' and '.join(map(str, odd))} wide: K-quants of llama.cpp come in blocks of {K_BLOCK}, "
        f"so down matrices will fall back to blocks of 32 (convert.pad_to={K_BLOCK}: zero neurons change nothing)",
    )


def _verdict(dense: DenseConfig, shape: PlanShape, target: str, engine: str) -> Portability:
    if not all_targets()[target].router:
        return Portability(engine, "runs", f"where {dense.family} does: the source's own architecture")
    traps = [
        trap
        for trap in TRAPS
        if engine in trap.engines and (not trap.targets or target in trap.targets) and trap.when(dense, shape)
    ]
    for verdict in SEVERITY:
        whys = [trap.why for trap in traps if trap.verdict == verdict]
        if whys:
            return Portability(engine, verdict, "; ".join(whys), EVIDENCE[engine] if verdict != "unknown" else "")
    how = RUNS[engine].get(target)
    return Portability(
        engine, "runs" if how else "unknown", how or "nobody has looked", EVIDENCE[engine] if how else ""
    )
