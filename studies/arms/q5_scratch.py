"""Whether it pays to begin with the parent."""

from studies.arms.q1_construction import HALF
from studies.design import Question, Setting

SCRATCH = {"pretrain.init": "random", "pretrain.lr": 3e-3}  # the rate that the parent was trained with

QUESTION = Question(
    name="scratch",
    title="From the parent, from scratch, dense of equal active size",
    paper="table 2 and figure 7",
    about="All have half of the parent's FFN active. What begins from scratch has the rate that the parent was trained "
    "with, what begins with the parent that of the other questions.",
    settings=(
        Setting("mixture from the parent", {}),
        Setting("mixture from scratch", SCRATCH),
        Setting("pruned parent", HALF["static control"]),
        Setting(
            "dense of equal active size from scratch",
            {**HALF["static control"], **SCRATCH},
            against="mixture from scratch",
        ),
    ),
)
