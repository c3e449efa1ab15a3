"""The factor on the routed output: none, each rule, folded into down_proj or beside it while training."""

from studies.design import Changes, Panel, Question, Setting

HALF: dict[str, Changes] = {
    "E/K (paper)": {},
    "E/K, folded": {"pretrain.unfold_scale": False},
    "none": {"plan.scale": "none"},
    "unit": {"plan.scale": "unit"},
    "mean": {"plan.scale": "mean"},
    "norm": {"plan.scale": "norm"},
    "measured": {"plan.scale": "measured"},
}
QUARTER: dict[str, Changes] = {name: {**HALF[name], "plan.top_k": 2} for name in ("E/K (paper)", "none", "measured")}
FOLDED = dict.fromkeys(("norm", "measured"), "E/K, folded 50 %")

QUESTION = Question(
    name="rescaling",
    title="Re-scaling: off, each rule, folded or not",
    paper="figure 3 c",
    about="8 experts; with 4 of them active E/K is 2, unit 4, norm 5.7, mean 8. A power of two is taken out of "
    "down_proj while training where nothing else is said; the others (norm, measured) train folded, and are "
    "compared with E/K folded at 50 %; at 25 % measured differs from E/K in that too.",
    settings=(
        *(Setting(f"{name} 50 %", changes, against=FOLDED.get(name, "")) for name, changes in HALF.items()),
        *(Setting(f"{name} 25 %", changes, against="E/K (paper) 25 %") for name, changes in QUARTER.items()),
    ),
    panels=(
        Panel("50 % of the FFN active", settings=tuple(f"{name} 50 %" for name in HALF)),
        Panel("25 % of the FFN active", settings=tuple(f"{name} 25 %" for name in QUARTER)),
    ),
)
