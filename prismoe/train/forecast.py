"""What a run would need, from shapes alone: memory of a device, what travels, time, disk, and how to launch it.

Per device and in bytes, for P parameters sharded over s processes of a copy (r copies, experts over e of them):

- weights, gradients: 4 P/s each; AdamW's two moments: 8 P/s. A parameter is cut by rows, so the first process has
  ceil(rows / s) of them.
- gathered: the largest two groups that are whole at a time (a layer and the one fetched ahead), in the dtype of the
  computation.
- activations of a layer and token: 4 D + 2 (heads + kv heads) · head size of attention and norms, and K (2 D + 3 W) of
  the experts (the most of them that router policies send a token to) or 3 F of a dense FFN, in the dtype of the
  computation. With recompute D a layer, and one layer in full.
- logits: 3 · V · 4 a token (what is returned, in float32, and its gradient), of the tokens that `logits` takes at once.
- a teacher: 4 P/s for its P weights, the largest two of its groups gathered, and as many logits again.
- of the host, while a checkpoint is written beside training: 12 P/s for the copy of weights and moments and as much
  for what is being written of it, each process. Where that is not there training waits for its checkpoints instead.

Sent by each process in a step of m micro-batches: weights are gathered twice (forward, backward; a teacher's once) and
gradients scattered once a micro-batch, (s-1)/s of each tensor; with r copies the shard is reduced over them, 2 (r-1)/r
of it; with experts apart, 4 times K · D a token and layer, (e-1)/e of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from prismoe.train.engine.layout import Layout
from prismoe.train.fit import num_experts
from prismoe.train.launch import launch_lines
from prismoe.train.logits import logit_bytes
from prismoe.train.model import empty_model
from prismoe.train.routers import arguments_of, experts_of_run
from prismoe.train.settings import PretrainConfig
from prismoe.train.speed import experts_per_token, flops_per_token, hardware_peak

__all__ = ["Forecast", "forecast"]

ASSUMED_MFU = 0.4
MASTER = 4  # bytes of a weight, a gradient and each moment


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes. `flops_per_token` includes a teacher's forward pass.

    `tokens_per_second` is of all devices together at `assumed_mfu`, None without `hardware`.
    """

    processes: int
    layout: dict[str, int]
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    tokens_per_step: int
    micro_batches: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activation_bytes: int
    logit_bytes: int
    teacher_bytes: int
    memory_bytes: int
    saving_bytes: int
    sent_bytes: dict[str, int]
    checkpoint_bytes: int
    model_bytes: int
    disk_bytes: int
    hardware: str
    assumed_mfu: float
    tokens_per_second: float | None
    days: float | None
    launch: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    model_config: Mapping[str, Any],
    config: PretrainConfig,
    layout: Layout,
    *,
    where: str,
    command: str,
    teacher: Mapping[str, Any] | None = None,
) -> Forecast:
    """What `config` on the model that `model_config` (config.json, from `where`) describes needs with `layout`.

    `command` is what a launch line has behind `prismoe`; `teacher` is the config.json of the model to learn from. Reads
    no weight.

    Raises:
        InputError: the architecture is not stock.
        UsageError: `hardware` is not known.
    """
    model = empty_model(model_config, where=where)
    held = sum(layout.held(parameter.shape) for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    item = 2 if config.precision == "bf16" else 4
    rows = config.batch_size // layout.world
    at_once = config.micro_batch_size or rows
    micro_batches = rows // at_once
    tokens = at_once * config.seq_len
    groups = _groups(model, layout)
    gathered = sum(sorted(groups)[-2:]) * item if layout.shard > 1 else 0
    most, mean = _experts(model.config, config)
    activations = _activations(model.config, config, tokens, item, top_k=most)
    logits = logit_bytes(tokens, model.config.vocab_size, taught=teacher is not None)
    per_token = flops_per_token(model, seq_len=config.seq_len, top_k=mean)
    sent, taught = _sent(model, layout, micro_batches=micro_batches, tokens=tokens, item=item, top_k=most), 0
    if teacher is not None:
        frozen, whole = empty_model(teacher, where="the teacher"), replace(layout, experts=1)
        taught = MASTER * sum(whole.held(parameter.shape) for parameter in frozen.parameters())
        taught += sum(sorted(_groups(frozen, whole))[-2:]) * item if layout.shard > 1 else 0
        per_token += flops_per_token(frozen, seq_len=config.seq_len) / 3  # no backward pass
        more = _sent(frozen, whole, micro_batches=micro_batches, tokens=tokens, item=item, top_k=0)
        sent |= {"all_gather": sent["all_gather"] + more["all_gather"] // 2}
    memory = MASTER * 4 * held + gathered + activations + logits + taught
    rate = layout.world * hardware_peak(config.hardware) * ASSUMED_MFU / per_token if config.hardware else None
    num_tokens = config.steps * config.batch_size * config.seq_len
    checkpoint = 3 * MASTER * total
    model_bytes = total * item
    return Forecast(
        processes=layout.world,
        layout=layout.describe(),
        parameters=total,
        flops_per_token=per_token,
        steps=config.steps,
        tokens=num_tokens,
        tokens_per_step=config.batch_size * config.seq_len,
        micro_batches=micro_batches,
        weight_bytes=MASTER * held,
        gradient_bytes=MASTER * held,
        optimizer_bytes=2 * MASTER * held,
        gathered_bytes=gathered,
        activation_bytes=activations,
        logit_bytes=logits,
        teacher_bytes=taught,
        memory_bytes=memory,
        saving_bytes=2 * 3 * MASTER * held,
        sent_bytes=sent,
        checkpoint_bytes=checkpoint,
        model_bytes=model_bytes,
        disk_bytes=checkpoint * (config.keep + 1 if config.save_every else 1) + model_bytes,
        hardware=config.hardware,
        assumed_mfu=ASSUMED_MFU,
        tokens_per_second=rate,
        days=num_tokens / rate / 86400 if rate else None,
        launch=launch_lines(layout, command=command),
    )


def _groups(model: Any, layout: Layout) -> list[int]:
    """Numbers that are gathered together: a layer each (experts by themselves where they are apart), and the rest."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else "the rest"
        if parameter.ndim == 3 and layout.experts > 1:
            found[f"{layer} experts"] = found.get(f"{layer} experts", 0) + parameter.numel() // layout.experts
        else:
            found[layer] = found.get(layer, 0) + parameter.numel()
    return list(found.values())


def _experts(shape: Any, config: PretrainConfig) -> tuple[int, float]:
    """To how many experts a token is sent: at most, and on average over the run; 0 in a dense model."""
    (top_k, mean), experts = experts_per_token(shape), num_experts(shape.to_dict())
    if not experts or mean < top_k:
        return top_k, mean
    own = arguments_of(config.router, config.arguments)
    return experts_of_run(config.router, own, steps=config.steps, num_experts=experts, top_k=top_k)


def _activations(shape: Any, config: PretrainConfig, tokens: int, item: int, *, top_k: int) -> int:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or hidden // heads
    width = getattr(shape, "moe_intermediate_size", None) or shape.intermediate_size
    shared = getattr(shape, "shared_expert_intermediate_size", 0) or getattr(shape, "shared_intermediate_size", 0) or 0
    attention = 4 * hidden + 2 * (heads + shape.num_key_value_heads) * head_dim
    ffn = top_k * (2 * hidden + 3 * width) + 3 * shared if top_k else 3 * width
    layers = shape.num_hidden_layers
    each = attention + ffn
    numbers = layers * hidden + each if config.recompute else layers * each
    return int(tokens * numbers * item)


def _sent(model: Any, layout: Layout, *, micro_batches: int, tokens: int, item: int, top_k: int) -> dict[str, int]:
    """Bytes that a process sends in a step, by collective."""
    dense = sum(p.numel() for p in model.parameters() if p.ndim < 3 or layout.experts == 1)
    apart = sum(p.numel() for p in model.parameters()) - dense
    shard, between = layout.shard, layout.shard // layout.experts
    cut = dense * (shard - 1) // shard + apart // layout.experts * (between - 1) // between
    held = dense // shard + apart // layout.experts // between
    shape = model.config
    moved = tokens * top_k * shape.hidden_size * shape.num_hidden_layers
    return {
        "all_gather": 2 * micro_batches * cut * item,
        "reduce_scatter": micro_batches * cut * MASTER,
        "all_reduce": micro_batches * 2 * held * (layout.replicate - 1) // layout.replicate * MASTER,
        "all_to_all": 4 * micro_batches * moved * (layout.experts - 1) // layout.experts * item,
    }
