"""FlexOlmo: OLMo2's block (norms behind attention and FFN) with experts. The norm behind them undoes any scale."""

from prismoe.target import Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    block="post-norm",
    router=f"{MLP}.gate.weight",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "norm_topk_prob": True,
    },
    rules=(
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has experts"),
        Rule("shared_width", lambda dense, shape: shape.shared_width == 0, "0: it has no shared expert"),
    ),
)
