"""The plan: sizes before and after, which architectures can hold it, and who holds which neurons."""

from __future__ import annotations

from prismoe.console import bytes_text
from prismoe.report.page import Block, Figure, Findings, Section, Table, Text
from prismoe.views import summary

__all__ = ["PLACE", "section"]

PLACE = 60
FILE = "plan.safetensors"


def section(found: Findings) -> Section:
    """Of the stage `plan`, which every run has."""
    receipt, counts = found.receipts["plan"], found.receipts["plan"]["account"]
    names = {
        "parameters": ("dense_parameters", "total_parameters"),
        "active per token": ("dense_parameters", "active_parameters"),
        "FLOPs per token, forward": ("dense_flops_per_token", "flops_per_token"),
    }
    rows = [[name, *(f"{counts[key]:,}" for key in pair)] for name, pair in names.items()]
    rows.append(["FFN active", "100 %", f"{counts['ffn_active_percent']:.1f} %"])
    rows.append(["zero parameters that pad widths", "", f"{counts['padding_parameters']:,}"])
    rows.append(["on disk", "", bytes_text(counts["disk_bytes"])])
    rows.append(["scale of the routed output", "", ", ".join(f"{scale:g}" for scale in receipt["shape"]["scales"])])
    verdicts = [[name, "yes", ""] for name in counts["accepted_by"]]
    for name, objections in counts["objections"].items():
        reasons = "; ".join(f"{row['field']} is {row['found']}, needs {row['needed']}" for row in objections)
        verdicts.append([name, "no", reasons])
    blocks: list[Block] = [Text(summary("plan", receipt) + "."), *map(Text, counts["notes"])]
    blocks += [Text(f"Warning: {text}.", look="bad") for text in receipt.get("warnings", ())]
    blocks += _figures(found)
    blocks.append(Table(["", "dense", counts["target"]], rows, caption="size and cost"))
    blocks.append(Table(["target", "can hold it", "what stands in the way"], verdicts, left=(1, 2)))
    if engines := receipt.get("portability"):
        rows = [[row["engine"], row["verdict"], row["why"]] for row in engines]
        blocks.append(Table(["engine", "", "why"], rows, left=(1, 2), caption=f"{counts['target']} in other engines"))
    return Section("plan", "Plan", blocks)


def _figures(found: Findings) -> list[Figure]:
    from prismoe.plan import Plan
    from prismoe.plan.anatomy import calibration_beside, plan_anatomy
    from prismoe.report.planpicture import figures

    path = found.folder / FILE
    if not path.is_file():  # the receipt is enough for the rest of the page
        return []
    plan = Plan.load(path)
    return figures(plan_anatomy(plan, calibration=calibration_beside(path, plan)[0]))
