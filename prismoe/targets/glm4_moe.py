"""GLM-4-MoE: a plain shared expert, the first layers may stay dense, and gates that are sigmoids over their sum.

The kept experts and their sum of one are those of any other target, their shares are not: sigmoid(a) : sigmoid(b)
instead of exp(a) : exp(b). It is the plan's model where shares cannot matter (copies of the dense FFN, router rows that
are zero, every logit alike) and otherwise another routing, exact as such, that training starts from.
"""

from prismoe.target import Constant, Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    router=f"{MLP}.gate.weight",
    gate="sigmoid",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    shared=(
        Slot(f"{MLP}.shared_experts.gate_proj.weight", ("gate",)),
        Slot(f"{MLP}.shared_experts.up_proj.weight", ("up",)),
        Slot(f"{MLP}.shared_experts.down_proj.weight", ("down",)),
    ),
    shared_unit="expert",
    shared_always=True,
    constants=(
        Constant(
            f"{MLP}.gate.e_score_correction_bias",
            lambda dense, shape: (shape.num_experts,),
            dtype="F32",
            experts_axis=0,
        ),
    ),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": width,
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": shared_width // width,
        "first_k_dense_replace": len(shape.dense_layers),
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "use_qk_norm": dense.qk_norm,
        "partial_rotary_factor": 1.0,
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
    },
    rules=(
        Rule("o_bias", lambda dense, shape: not dense.o_bias, "False: its output projection has no bias"),
        Rule("sliding_window", lambda dense, shape: dense.sliding_window is None, "None: it attends to everything"),
        Rule(
            "dense_layers",
            lambda dense, shape: shape.dense_layers == tuple(range(len(shape.dense_layers))),
            "the first ones: it counts them from the top",
        ),
    ),
)
