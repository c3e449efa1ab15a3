"""MT-Bench (arXiv 2306.05685): answers in FastChat's files, judged by any endpoint that speaks chat completions.

A folder of it is laid out as FastChat's own `data/mt_bench`: `question.jsonl`, `model_answer/MODEL.jsonl`,
`model_judgment/JUDGE_single.jsonl`.
"""
