"""How the neurons are shared out among the experts, and what the routers start from."""

from studies.design import Changes, Panel, Question, Setting

METHODS: dict[str, Changes] = {
    "random": {},
    "clustering": {"plan.method": "clustering"},
    "coactivation": {"plan.method": "coactivation"},
    "router first": {"plan.method": "router_first", "plan.router": "auto"},
    "gradient independent": {"plan.method": "gradient", "plan.mode": "independent"},
    "gradient inner": {"plan.method": "gradient", "plan.mode": "inner"},
}
INTER = {"plan.method": "gradient", "plan.mode": "inter", "plan.shared": 96, "target": "granitemoeshared"}
HALF = {name: {**changes, "plan.top_k": 4} for name, changes in METHODS.items()}
HALF["gradient inter"] = {**INTER, "plan.num_experts": 7, "plan.top_k": 3}
# One routed expert of the same width would have a gate of 1 and no gradient: twice as many of half the width.
QUARTER = {name: {**changes, "plan.top_k": 2} for name, changes in METHODS.items()}
QUARTER["gradient inter"] = {**INTER, "plan.num_experts": 14, "plan.top_k": 2}
STATIC = {"plan.method": "prune", "plan.num_experts": None, "plan.scale": None, "plan.router": None, "target": "dense"}
HALF["static control"] = {**STATIC, "plan.top_k": 1, "plan.keep": 0.5}
QUARTER["static control"] = {**STATIC, "plan.top_k": 1, "plan.keep": 0.25}
ROUTED = {
    f"{name}, {rows} rows": {**HALF[name], "plan.router": rows}
    for name in ("random", "clustering", "gradient independent")
    for rows in ("centroid", "regressed")
}
ROUTED["random, regressed rows, measured scale"] = {"plan.router": "regressed", "plan.scale": "measured"}

QUESTION = Question(
    name="construction",
    title="Construction methods, static control, router initialisation",
    paper="figure 3 a, b",
    about="The static control is the parent pruned to the same active width, by activation, and trained alike. Text "
    "that plans were measured on is not counted here. Gradient inter (scale 7/3 and 7) and the measured scale train "
    "folded.",
    settings=(
        *(Setting(f"{name} 50 %", changes) for name, changes in HALF.items()),
        *(Setting(f"{name} 25 %", changes, against="random 25 %") for name, changes in QUARTER.items()),
        *(Setting(f"{name} 50 %", changes) for name, changes in ROUTED.items()),
        Setting("router first 50 %, against the control", HALF["router first"], against="static control 50 %"),
        Setting("router first 25 %, against the control", QUARTER["router first"], against="static control 25 %"),
    ),
    panels=(
        Panel("50 % of the FFN active", settings=tuple(f"{name} 50 %" for name in HALF)),
        Panel("25 % of the FFN active", settings=tuple(f"{name} 25 %" for name in QUARTER)),
        Panel("50 %, router rows", settings=("random 50 %", *(f"{name} 50 %" for name in ROUTED))),
    ),
)
