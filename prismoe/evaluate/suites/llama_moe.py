"""The eleven tasks of LLaMA-MoE's table of results, in its order, with its number of examples in the prompt.

Source: LLaMA-MoE (arXiv 2406.16554), its comparison with open models of equal size: `acc_norm` where a task has it,
else `acc`, exact match for NQ; the average is the plain mean of the eleven.
"""

TASKS = {
    "sciq": 0,
    "piqa": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 25,
    "hellaswag": 10,
    "logiqa": 0,
    "boolq": 32,
    "lambada_openai": 0,
    "nq_open": 32,
    "mmlu": 5,
}
