"""HunYuan-MoE: q/k norms behind rope, and always a plain shared expert that is as wide as every other."""

from prismoe.target import Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    block="late qk norm",
    router=f"{MLP}.gate.wg.weight",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    shared=(
        Slot(f"{MLP}.shared_mlp.gate_proj.weight", ("gate",)),
        Slot(f"{MLP}.shared_mlp.up_proj.weight", ("up",)),
        Slot(f"{MLP}.shared_mlp.down_proj.weight", ("down",)),
    ),
    shared_unit="equal",
    shared_always=True,
    top_k_by_layer="moe_topk",
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "moe_topk": shape.top_k,
        "num_shared_expert": 1,
        "eod_token_id": None,
        "sep_token_id": None,
        "pretraining_tp": 1,
    },
    rules=(
        Rule("qkv_bias", lambda dense, shape: dense.qkv_bias == dense.o_bias, "the same as o_bias: one switch for all"),
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has experts"),
    ),
)
