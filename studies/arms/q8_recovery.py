"""Ways back to the parent's loss from few tokens."""

from studies.arms.q1_construction import HALF
from studies.design import Changes, Panel, Question, Setting

FITTED: Changes = {
    "plan.router": "regressed",
    "plan.scale": "measured",
    "count_calibration": True,
}  # before any training
RECOVERED: Changes = {"recover": {"tokens": 65_536}}
TAUGHT = {"pretrain.teacher": "parent"}
SLOW: Changes = {"pretrain.lr": 3e-4}
ROUTER_FIRST: Changes = {"plan.method": "router_first", "plan.router": "auto", "count_calibration": True}
ALL_ON = {"pretrain.router": "dense_mi", "pretrain.arguments": {"anneal": (0.0, 0.2)}}  # in the first fifth of the run
WAYS: dict[str, Changes] = {
    "plain": {},
    "plain, half the rate": {"pretrain.lr": 5e-4},
    "plain, twice the rate": {"pretrain.lr": 2e-3},
    "fitted start": FITTED,
    "recover": RECOVERED,
    "recover, routers only": {"recover": {"tokens": 65_536, "train": "router"}},
    "distillation": TAUGHT,
    "distillation alone": {**TAUGHT, "pretrain.text_weight": 0.0},
    "dense_mi": ALL_ON,
    "sparsemixer2": {"pretrain.router": ("sparsemixer2", "switch")},
    "fitted start, distillation": {**FITTED, **TAUGHT},
    "recover, distillation": {**RECOVERED, **TAUGHT},
    "fitted start, recover, distillation": {**FITTED, **RECOVERED, **TAUGHT},
    "dense_mi, distillation": {**ALL_ON, **TAUGHT},
    # What begins near the parent is driven away from it by the rate that serves the others (question 7 says so too).
    "recover, distillation, 0.3 of the rate": {**RECOVERED, **TAUGHT, **SLOW},
    "recover, distillation, 0.15 of the rate": {**RECOVERED, **TAUGHT, "pretrain.lr": 1.5e-4},
    "recover on twice the text, distillation, 0.3 of the rate": {"recover": {"tokens": 131_072}, **TAUGHT, **SLOW},
    "router first, recover, distillation, 0.3 of the rate": {**ROUTER_FIRST, **RECOVERED, **TAUGHT, **SLOW},
    "pruned parent, distillation": {**HALF["static control"], **TAUGHT},
    "pruned parent, distillation, 0.3 of the rate": {**HALF["static control"], **TAUGHT, **SLOW},
}
BEST = "router first, recover, distillation, 0.3 of the rate"
LONG = f"{BEST}: long"
CONTROL = "pruned parent, distillation: long"
LONG_RUN: Changes = {"tokens": "headline", "evals": 24}

QUESTION = Question(
    name="recovery",
    title="Recovery: tokens to close the gap to the parent",
    paper="none of its figures: it spent 200 billion tokens",
    about="50 % of the FFN active. The gap is from the plain mixture before training to the parent, for all alike. "
    "All text that is read counts: what `recover` learns from (four times over), what rows and scale were measured on. "
    "The 33 thousand tokens that say where the parent is pruned count in its long run only. The fitted start trains "
    "folded. The last two rows are the long runs: 5 % of what the parent was trained on.",
    settings=(
        *(Setting(name, {"evals": 16, **changes}) for name, changes in WAYS.items()),
        *(
            Setting(f"{name}, against the control", {"evals": 16, **WAYS[name]}, against="pruned parent, distillation")
            for name in ("recover, distillation", BEST)
        ),
        Setting(LONG, {**LONG_RUN, **WAYS[BEST]}, against=LONG),
        Setting(
            CONTROL, {**LONG_RUN, **WAYS["pruned parent, distillation"], "count_calibration": True}, against=LONG
        ),
    ),
    panels=(
        Panel("one way each", "closed", ("plain", "fitted start", "recover", "recover, routers only", "distillation",
                                         "dense_mi", "sparsemixer2")),
        Panel("together", "closed", ("plain", "distillation alone", "fitted start, distillation",
                                     "recover, distillation", "dense_mi, distillation",
                                     "fitted start, recover, distillation")),
        Panel("and at a lower rate", "closed", ("plain", "recover, distillation",
                                                "recover, distillation, 0.3 of the rate",
                                                "recover, distillation, 0.15 of the rate",
                                                "recover on twice the text, distillation, 0.3 of the rate",
                                                "router first, recover, distillation, 0.3 of the rate",
                                                "pruned parent, distillation")),
        Panel("the long runs", "closed", (LONG, CONTROL)),
    ),
)  # fmt: skip
