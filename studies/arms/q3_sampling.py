"""Which domains the text comes from: static weights, and weights that follow the held-out losses."""

from studies.design import Changes, Panel, Question, Setting

DYNAMIC = {"pretrain.mixing": "sheared", "pretrain.reference": "parent"}
WEIGHTS: dict[str, Changes] = {
    "static LLaMA-1": {"weights": "llama1"},
    "static Sheared": {"weights": "sheared-llama"},
    "dynamic from LLaMA-1": {"weights": "llama1", **DYNAMIC},
    "dynamic from Sheared": {"weights": "sheared-llama", **DYNAMIC},
}

QUESTION = Question(
    name="sampling",
    title="Sampling weights: static, dynamic",
    paper="figures 4 and 5",
    about="Dynamic weights move at each evaluation by exp(loss − loss of the parent), on the held-out text that they "
    "are judged on too; each is compared with the static weights that it starts from. Proportional is what the parent "
    "was trained with. Losses are means over seven domains, so they reward what is even over the domains.",
    settings=(
        Setting("proportional", {}),
        *(
            Setting(name, changes, against=name.replace("dynamic from", "static") * name.startswith("dynamic"))
            for name, changes in WEIGHTS.items()
        ),
    ),
    panels=(
        Panel("mean of the domains"),
        Panel("CommonCrawl", "heldout:commoncrawl"),
        Panel("C4", "heldout:c4"),
        Panel("GitHub", "heldout:github"),
        Panel("weight of CommonCrawl", "weight:commoncrawl"),
        Panel("weight of GitHub", "weight:github"),
    ),
)
