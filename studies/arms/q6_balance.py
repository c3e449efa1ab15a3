"""What keeps the experts in use."""

from studies.design import Changes, Panel, Question, Setting

POLICIES: dict[str, Changes] = {
    "none": {"pretrain.router": "switch", "pretrain.arguments": {"coefficient": 0.0}},
    "switch": {},
    "noisy top-k": {"pretrain.router": "noisy_topk"},
    "noisy top-k, compat": {"pretrain.router": "noisy_topk", "pretrain.arguments": {"compat": True}},
    "bias": {"pretrain.router": "bias_balanced"},
}

QUESTION = Question(
    name="balance",
    title="Balance: none, noisy top-k, Switch, bias",
    paper="section 3.2 and the load figures of its appendix",
    about="2 of 8 experts active. `compat` counts loads as the published code does.",
    settings=tuple(Setting(name, {**changes, "plan.top_k": 2}) for name, changes in POLICIES.items()),
    panels=(
        Panel("mean of the domains"),
        Panel("router entropy (1: undecided)", "entropy"),
        Panel("busiest expert / mean load", "busiest"),
    ),
)
