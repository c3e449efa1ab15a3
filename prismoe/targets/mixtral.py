"""Mixtral: softmax over the kept top-k logits, no shared expert, every layer routed. Runs everywhere."""

from prismoe.target import Rule, Slot, Target

MOE = "model.layers.{l}.block_sparse_moe"

TARGET = Target(
    name="mixtral",
    architecture="MixtralForCausalLM",
    router=f"{MOE}.gate.weight",
    experts=(
        Slot(MOE + ".experts.{e}.w1.weight", ("gate",)),
        Slot(MOE + ".experts.{e}.w2.weight", ("down",)),
        Slot(MOE + ".experts.{e}.w3.weight", ("up",)),
    ),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "router_jitter_noise": 0.0,
    },
    rules=(
        Rule("qk_norm", lambda dense, shape: not dense.qk_norm, "False: no norm on queries and keys"),
        Rule("qkv_bias", lambda dense, shape: not dense.qkv_bias, "False: its attention has no bias"),
        Rule("o_bias", lambda dense, shape: not dense.o_bias, "False: its attention has no bias"),
        Rule("sliding_layers", lambda dense, shape: dense.slides_uniformly, "all layers or none: one global window"),
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has experts"),
        Rule("shared_width", lambda dense, shape: shape.shared_width == 0, "0: it has no shared expert"),
    ),
)
