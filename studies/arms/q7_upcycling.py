"""Copies instead of parts, against training the dense parent on: equal tokens, equal FLOPs."""

from studies.design import DENSE, Panel, Question, Setting

KEPT = {"pretrain.lr": 1.5e-4, "pretrain.min_lr_ratio": 1.0}  # what the parent's schedule ended with
RESET = {"pretrain.lr": 3e-3, "pretrain.min_lr_ratio": 0.05}  # what it began with
COPIES = {"plan.method": "upcycle", "plan.top_k": 2, "plan.scale": "auto"}
SLICES = {**COPIES, "plan.num_experts": 16, "plan.granularity": 4, "plan.top_k": 4}
# Softmax before top-k: gates are not divided by their sum, so a copy has K/E of its strength and a slice 1/E.
FIRST = {"target": "qwen2_moe", "config": {"norm_topk_prob": False}}

QUESTION = Question(
    name="upcycling",
    title="Upcycling against continued dense training",
    paper="He et al. (2410.07524) and Vavre et al. (2412.09952); LLaMA-MoE has no such figure",
    about="8 copies, 2 active, cost 1.6 times the FLOPs of the parent a token; 4 × 4 slices, 4 active, cost the same.",
    settings=(
        Setting("dense", {**DENSE}),
        Setting("dense, equal FLOPs", {**DENSE, "tokens": 1.6}, against="dense, equal FLOPs"),
        Setting("dense, rate kept", {**DENSE, **KEPT}),
        Setting("dense, rate reset", {**DENSE, **RESET}),
        Setting("8 copies, top-2", COPIES),
        Setting("8 copies, against equal FLOPs", COPIES, against="dense, equal FLOPs"),
        Setting("8 copies, rate kept", {**COPIES, **KEPT}, against="dense, rate kept"),
        Setting("8 copies, rate reset", {**COPIES, **RESET}, against="dense, rate reset"),
        Setting("8 copies, softmax first", {**COPIES, **FIRST, "plan.scale": 4.0}, against="8 copies, top-2"),
        Setting("4 × 4 slices, top-4", SLICES),
        Setting("4 × 4 slices, softmax first", {**SLICES, **FIRST, "plan.scale": 16.0}, against="4 × 4 slices, top-4"),
    ),
    panels=(
        Panel("equal tokens", settings=("dense", "dense, equal FLOPs", "8 copies, top-2", "8 copies, softmax first",
                                        "4 × 4 slices, top-4", "4 × 4 slices, softmax first")),
        Panel("learning rate", settings=("dense", "dense, rate kept", "dense, rate reset", "8 copies, top-2",
                                         "8 copies, rate kept", "8 copies, rate reset")),
    ),
)  # fmt: skip
