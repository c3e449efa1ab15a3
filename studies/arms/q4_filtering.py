"""Text that is left out of CommonCrawl and C4 before it is tokenised."""

from studies.design import Panel, Question, Setting

SHEARED = {"weights": "sheared-llama"}  # 85 % of the text comes from the two filtered domains

QUESTION = Question(
    name="filtering",
    title="Filtering: none, fluency, advertisements",
    paper="figure 6",
    about="Weights of Sheared-LLaMA, the paper's, of which CommonCrawl and C4 are 85 %. Fluency is the parent's own "
    "bits a byte, advertisements a linear classifier that labels itself; held-out text is never filtered.",
    settings=(
        Setting("no filter", SHEARED),
        Setting("least fluent 15 % dropped", {**SHEARED, "text": "fluent"}),
        Setting("50 % dropped as advertisements", {**SHEARED, "text": "no_advertisements"}),
    ),
    panels=(
        Panel("mean of the domains"),
        Panel("CommonCrawl", "heldout:commoncrawl"),
        Panel("C4", "heldout:c4"),
    ),
)
