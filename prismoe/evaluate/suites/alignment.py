"""What LLaMA-MoE measures after instruction tuning, with the numbers of examples of the first Open LLM Leaderboard."""

TASKS = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0}
