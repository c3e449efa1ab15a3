"""The source's own architecture with a narrower FFN: what a plan of one expert that is always on comes to.

No router and no key of a mixture: config.json is the source's with another intermediate_size, so every engine that
runs the source runs it. This is the static control beside every mixture (method `prune`).
"""

from prismoe.target import Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="dense",
    architecture="",
    router="",
    experts=(
        Slot(f"{MLP}.gate_proj.weight", ("gate",)),
        Slot(f"{MLP}.up_proj.weight", ("up",)),
        Slot(f"{MLP}.down_proj.weight", ("down",)),
    ),
    config=lambda dense, shape, width, shared_width: {"intermediate_size": width},
    rules=(
        Rule("num_experts", lambda dense, shape: shape.num_experts == 1, "1: it has no router"),
        Rule(
            "expert_width",
            lambda dense, shape: shape.expert_width < dense.intermediate_size,
            "less than the dense FFN: all of it is the source itself",
        ),
        Rule("family", lambda dense, shape: dense.family != "phi3", "one that stores its projections apart"),
        Rule("shared_width", lambda dense, shape: shape.shared_width == 0, "0: it has no shared expert"),
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has the same width"),
    ),
)
