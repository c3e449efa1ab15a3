"""What a dense checkpoint's config.json says, read once and strictly: one `DenseConfig` for every family we know.

Readers of a config differ in what they default, so nothing is guessed here: the old (`rope_theta`, `rope_scaling`)
and the new (`rope_parameters`) spelling are both understood and must agree, and whatever changes the arithmetic in a
way no field of `DenseConfig` holds is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismoe.checkpoint.configreader import ConfigReader
from prismoe.checkpoint.families import FAMILIES, GRANITE, REFUSED, Family
from prismoe.errors import InputError

__all__ = [
    "FAMILIES",
    "PROJECTIONS",
    "DenseConfig",
    "Rows",
    "check_tensors",
    "dense_config",
    "optional_tensor",
    "tensor_rows",
    "tensor_shapes",
]

Rope = dict[str, Any]


PROJECTIONS = ("q", "k", "v", "o")
MAX_LAYERS = 10_000  # a dozen names are written for each, before the files are compared with them
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class DenseConfig:
    """One dense decoder, spelling-independent. Sizes are counts of channels, heads, tokens; see `dense_config`."""

    family: str
    block: str  # how a layer is put together: see `Family`
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Rope | None  # None: plain rope; otherwise "rope_type" and its parameters, without rope_theta
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_window: int | None  # tokens; None when no layer slides
    sliding_layers: tuple[int, ...]
    multipliers: dict[str, float]  # factors of its own by config key; empty for most families
    activation: str
    attention_dropout: float
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    use_cache: bool
    dtype: str | None  # "bfloat16", …; None where config.json does not say

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Of every layer, as transformers names them: sliding_attention or full_attention."""
        sliding = set(self.sliding_layers)
        return tuple(("full", "sliding")[layer in sliding] + "_attention" for layer in range(self.num_layers))

    @property
    def granite_multipliers(self) -> dict[str, float]:
        """Granite's four by name, such that they change nothing where the source has none."""
        plain = GRANITE | {"attention_multiplier": self.head_dim**-0.5}
        return self.multipliers or plain

    @property
    def slides_uniformly(self) -> bool:
        """True when every layer has the sliding window, or none has."""
        return len(self.sliding_layers) in (0, self.num_layers)


def dense_config(config: Mapping[str, Any], *, where: str = "config.json") -> DenseConfig:
    """Read a config.json of a known family.

    Raises:
        InputError: an unknown family, a damaged value, or a setting that changes the arithmetic in a way
            we cannot carry over exactly; the message names the field.
    """
    read = ConfigReader(config, where)
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(
            f"unsupported family {model_type!r}",
            where=read.at("model_type"),
            needed="one of " + ", ".join(FAMILIES),
            hint=REFUSED.get(str(model_type), ""),
        )
    read.refuse("hidden_act", ("silu", "swish"), "silu", "only SwiGLU feed-forward blocks can be cut into experts")
    read.refuse("mlp_bias", (False, None), False, "biased feed-forward projections have no stock MoE class")
    read.refuse("pretraining_tp", (1, None), 1, "set it to 1 if the weights are not sliced")
    read.refuse("partial_rotary_factor", (1.0, None), 1.0, "partial rotary embedding has no stock MoE class here")
    for key, value in family.refused.items():
        read.refuse(key, (value,), value, "no stock MoE class holds it")
    heads = read.count("num_attention_heads")
    kv_heads = read.count("num_key_value_heads", heads)
    hidden = read.count("hidden_size")
    if heads % kv_heads:
        raise InputError(
            f"{kv_heads} does not divide {heads} attention heads",
            where=read.at("num_key_value_heads"),
            needed="a divisor",
        )
    head_dim = read.count("head_dim", family.head_dim or hidden // heads)
    if "head_dim" not in config and not family.head_dim and hidden % heads:
        raise InputError(
            f"{heads} does not divide hidden_size {hidden}", where=read.at("num_attention_heads"), needed="a divisor"
        )
    layers = read.count("num_hidden_layers", most=MAX_LAYERS)
    theta, scaling = _rope(read, family)
    bias = read.flag("attention_bias", False)
    window, sliding = _sliding(read, family, layers)
    return DenseConfig(
        family=str(model_type),
        block=family.block,
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=read.count("vocab_size"),
        max_positions=read.count("max_position_embeddings"),
        rms_eps=read.real(*family.eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=read.flag("tie_word_embeddings", family.tied),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        qk_norm=bool(family.qk_norms),
        sliding_window=window,
        sliding_layers=sliding,
        multipliers={key: read.real(key, default) for key, default in family.multipliers.items()},
        activation="silu",
        attention_dropout=read.real("attention_dropout", 0.0),
        initializer_range=read.real("initializer_range", 0.02),
        bos_token_id=read.token("bos_token_id") if "bos_token_id" in config else family.bos_eos[0],
        eos_token_id=read.tokens("eos_token_id") if "eos_token_id" in config else family.bos_eos[1],
        pad_token_id=read.token("pad_token_id"),
        use_cache=read.flag("use_cache", True),
        dtype=read.text("dtype") or read.text("torch_dtype"),
    )


@dataclass(frozen=True)
class Rows:
    """Where the rows of one tensor lie: from `start` on in stored tensor `source`; `whole`: they are all of it."""

    source: str
    start: int
    shape: tuple[int, ...]
    whole: bool


def tensor_rows(dense: DenseConfig) -> dict[str, Rows]:
    """Every tensor of the model under the name that Llama and every target have for it, with the place of its rows.

    Only families that store projections fused have it elsewhere than under that name.
    """
    holder = {part: stored for stored, parts in FAMILIES[dense.family].fused.items() for part in parts}
    found: dict[str, Rows] = {}
    rows_of: dict[str, int] = {}
    for name, shape in _shapes(dense).items():
        prefix, part = _split(name)
        stored = holder.get(part)
        source = f"{prefix}{stored}.weight" if stored else name
        found[name] = Rows(source, rows_of.get(source, 0), shape, stored is None)
        rows_of[source] = found[name].start + shape[0]
    return found


def tensor_shapes(dense: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the dense checkpoint must hold, by name, with its shape (weights are [out, in])."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rows in tensor_rows(dense).values():
        shapes[rows.source] = (rows.start + rows.shape[0], *rows.shape[1:])
    return shapes


def _split(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj.weight" in "model.layers.3." and "mlp.up_proj"; other names whole."""
    parts = name.split(".")
    return (".".join(parts[:3]) + ".", ".".join(parts[3:-1])) if parts[1] == "layers" else ("", name)


def _shapes(dense: DenseConfig) -> dict[str, tuple[int, ...]]:
    d, f = dense.hidden_size, dense.intermediate_size
    q, kv = dense.num_heads * dense.head_dim, dense.num_kv_heads * dense.head_dim
    out = {"q": q, "k": kv, "v": kv, "o": d}
    biased = {"q": dense.qkv_bias, "k": dense.qkv_bias, "v": dense.qkv_bias, "o": dense.o_bias}
    first, *later = FAMILIES[dense.family].norms
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dense.vocab_size, d)}
    for layer in range(dense.num_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.{first}.weight"] = (d,)
        for name in PROJECTIONS:
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out[name], q if name == "o" else d)
            if biased[name]:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (out[name],)
        for norm, width in zip(FAMILIES[dense.family].qk_norms, (q, kv), strict=False):
            shapes[f"{at}.self_attn.{norm}.weight"] = (width if dense.block == "post-norm" else dense.head_dim,)
        for norm in later:
            shapes[f"{at}.{norm}.weight"] = (d,)
        shapes[f"{at}.mlp.gate_proj.weight"] = (f, d)
        shapes[f"{at}.mlp.up_proj.weight"] = (f, d)
        shapes[f"{at}.mlp.down_proj.weight"] = (d, f)
    shapes["model.norm.weight"] = (d,)
    if not dense.tie_embeddings:
        shapes["lm_head.weight"] = (dense.vocab_size, d)
    return shapes


def optional_tensor(dense: DenseConfig, name: str) -> bool:
    """True for what may be there or not: rotary tables of old checkpoints, and a stored copy of a tied head."""
    return name.endswith(".self_attn.rotary_emb.inv_freq") or (dense.tie_embeddings and name == "lm_head.weight")


def check_tensors(dense: DenseConfig, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Compare the tensors of a checkpoint with what its config promises, before any weight is read.

    Raises:
        InputError: a missing or unexpected tensor, or a shape that differs; the first few are named.
    """
    expected = tensor_shapes(dense)
    for found, names in (
        ("missing tensor", [name for name in expected if name not in shapes]),
        ("unexpected tensor", [n for n in shapes if n not in expected and not optional_tensor(dense, n)]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{found} {', '.join(sorted(names)[:3])}{more}", where=where, needed="what config.json describes"
            )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise InputError(f"shape {list(shapes[name])}", where=f"{where}: {name}", needed=f"{list(shape)}")


def _rope(read: ConfigReader, family: Family) -> tuple[float, Rope | None]:
    """(theta, scaling) from the old spelling, the new one, or both where they agree."""
    new = read.table("rope_parameters")
    old = read.table("rope_scaling")
    if new is not None and any(isinstance(value, dict) for value in new.values()):
        raise InputError("one rope per layer type", where=read.at("rope_parameters"), needed="one for all layers")
    thetas = {float(t) for t in (read.real("rope_theta", None), _theta(read, new), _theta(read, old)) if t is not None}
    if len(thetas) > 1:
        raise InputError(
            f"old and new spelling disagree: {sorted(thetas)}", where=read.at("rope_theta"), needed="one value"
        )
    scalings = [_scaling(read, table) for table in (old, new) if table is not None]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise InputError(
            f"old and new spelling disagree: {scalings[0]} and {scalings[1]}",
            where=read.at("rope_scaling"),
            needed="one rope scaling",
        )
    return (thetas.pop() if thetas else family.rope_theta), (scalings[0] if scalings else None)


def _theta(read: ConfigReader, table: Rope | None) -> float | None:
    return None if table is None else ConfigReader(table, read.where).real("rope_theta", None)


def _scaling(read: ConfigReader, table: Rope) -> Rope | None:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(
            f"unsupported rope type {kind!r}", where=read.at("rope_scaling"), needed="one of " + ", ".join(ROPE_TYPES)
        )
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"partial_rotary_factor {table['partial_rotary_factor']!r}",
            where=read.at("rope_parameters"),
            needed="1.0",
        )
    if kind == "default":
        return None
    ignored = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    return {"rope_type": kind, **{key: value for key, value in table.items() if key not in ignored}}


def _sliding(read: ConfigReader, family: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Window in tokens and the layers it holds for, as transformers' dense class of the family would apply it."""
    absent = family.window is None and "sliding_window" not in read.config
    if family.sliding == "never" or absent or read.null("sliding_window"):
        return None, ()
    types = read.config.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in types)
    ):
        raise InputError(
            f"{types!r}"[:80], where=read.at("layer_types"), needed=f"{layers} of full_attention or sliding_attention"
        )
    if family.sliding == "always":
        if types is not None and "full_attention" in types:
            raise InputError(
                "layers that do not slide", where=read.at("layer_types"), needed="sliding_attention everywhere"
            )
        sliding = tuple(range(layers))
    elif family.sliding == "by layer" and not read.flag("use_sliding_window", False):
        return None, ()
    elif types is not None:
        sliding = tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
    elif family.sliding == "pattern":
        every = read.count("sliding_window_pattern", 4)
        sliding = tuple(layer for layer in range(layers) if (layer + 1) % every)
    else:
        first = read.config.get("max_window_layers", 28)
        sliding = tuple(range(first if isinstance(first, int) and first >= 0 else 0, layers))
    return (read.count("sliding_window", family.window), sliding) if sliding else (None, ())
