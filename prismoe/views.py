"""Receipts as a person wants to read them: one line each, or a table. They take the dicts that `--json` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.text import Text

from prismoe.console import Screen, bytes_text, count_text, seconds_text
from prismoe.showforecast import show_forecast
from prismoe.showrecovery import recovery_line, show_recovery
from prismoe.showscores import scores_line, show_scores
from prismoe.showtrace import show_trace, trace_line
from prismoe.showtune import show_tune, tune_line

__all__ = ["branch_rows", "summary", "view"]

Receipt = Mapping[str, Any]


def summary(stage: str, receipt: Receipt) -> str:
    """What a stage did, in one line."""
    return _SUMMARIES[stage](receipt)


def view(screen: Screen, stage: str, receipt: Receipt) -> None:
    """What a stage did, in full."""
    screen.title(stage)
    screen.line(summary(stage, receipt))
    if stage in _VIEWS:
        _VIEWS[stage](screen, receipt)


def _plan_line(receipt: Receipt) -> str:
    shape = receipt["shape"]
    layers = f"{len(shape['moe_layers'])} of {shape['num_layers']} layers"
    shared = f" + {shape['shared_width']} shared neurons" if shape["shared_width"] else ""
    experts = f"{shape['num_experts']} experts × {shape['expert_width']} neurons{shared}"
    return f"{receipt['method']}: {experts}, top-{shape['top_k']}, {layers}, seed {receipt['seed']}"


def branch_rows(receipt: Receipt) -> dict[str, str]:
    """The checkpoints that a plan or a mixture is made of beside its source, and what everything else is."""
    names = [f"{row['name']} ({row['fingerprint'][:12]})" for row in receipt.get("branches", ())]
    rows = {f"branch {number}": name for number, name in enumerate(names, start=1)}
    if "rest" in receipt:
        parts = ["the base" if number == 0 else f"branch {number}" for number in receipt["rest"]]
        rows["all but the experts"] = parts[0] if len(parts) == 1 else f"mean of {', '.join(parts)}"
    return rows


def _plan(screen: Screen, receipt: Receipt) -> None:
    if branches := branch_rows(receipt):
        screen.pairs(branches)
    counts = receipt["account"]
    held = counts["target"] not in counts["objections"]
    if held:
        _sizes(screen, receipt)
    screen.title("targets")
    rows: list[list[str | Text]] = [[_mark(True), name, ""] for name in counts["accepted_by"]]
    for name, objections in counts["objections"].items():
        for index, row in enumerate(objections):
            reason = f"{row['field']} is {row['found']}, needs {row['needed']}"
            rows.append([_mark(False), name, reason] if index == 0 else ["", "", reason])
    screen.table(["", "", ""], rows, justify="lll")
    if held:
        _engines(screen, counts["target"], receipt.get("portability", ()))
        for note in counts["notes"]:
            screen.line(f"note: {note}", style="dim")


def _sizes(screen: Screen, receipt: Receipt) -> None:
    """The dense model beside what its target makes of it."""
    counts = receipt["account"]
    total, dense = counts["total_parameters"], counts["dense_parameters"]
    active = f"{count_text(counts['active_parameters'])} ({100 * counts['active_parameters'] / total:.1f} %)"
    flops, before = counts["flops_per_token"], counts["dense_flops_per_token"]
    scales = ", ".join(f"{scale:g}" for scale in receipt["shape"]["scales"])
    screen.table(
        ["", "dense", counts["target"]],
        [
            ["parameters", count_text(dense), count_text(total)],
            ["active per token", count_text(dense), active],
            ["FFN active", "100 %", f"{counts['ffn_active_percent']:.1f} %"],
            ["FLOPs per token", count_text(before), f"{count_text(flops)} ({100 * flops / before:.1f} %)"],
            ["memory to load", "", bytes_text(counts["ram_bytes"])],
            ["on disk", "", bytes_text(counts["disk_bytes"])],
            ["time to convert", "", f"about {seconds_text(counts['convert_seconds'])}"],
            ["scale of the routed output", "", scales],
        ],
    )


def _engines(screen: Screen, target: str, rows: Sequence[Receipt]) -> None:
    screen.title(f"{target} in other engines")
    screen.table(
        ["", "", ""],
        [[_mark(row["verdict"] == "runs"), row["engine"], f"{row['verdict']}: {row['why']}"] for row in rows],
        justify="lll",
    )


def _convert_line(receipt: Receipt) -> str:
    shards = f"{receipt['num_shards']} file{'s' if receipt['num_shards'] > 1 else ''}"
    what = f"{receipt['target']}: {receipt['num_tensors']} tensors, {bytes_text(receipt['total_bytes'])} in {shards}"
    if receipt["state"] == "dry run":
        return f"{what}; {bytes_text(receipt['free_bytes'])} of disk free"
    rate = f" at {bytes_text(receipt['total_bytes'] / receipt['seconds'])}/s" if receipt["seconds"] else ""
    return what + (rate if receipt["state"] == "written" else f", {receipt['state']}")


def _convert(screen: Screen, receipt: Receipt) -> None:
    rows = {"folder": receipt["out"], "experts": f"{receipt['num_experts']}, top-{receipt['top_k']}"}
    rows |= branch_rows(receipt)
    if receipt.get("absorb"):
        rows["shared neurons"] = "in every expert"
    if receipt["kept_shards"]:
        rows["kept from before"] = f"{receipt['kept_shards']} files"
    if receipt["dropped"]:
        rows["not needed"] = ", ".join(receipt["dropped"])
    screen.pairs(rows)
    _engines(screen, receipt["target"], receipt.get("portability", ()))
    if receipt["files"]:
        rows_ = [[name, bytes_text(row["bytes"]), row["sha256"][:16]] for name, row in receipt["files"].items()]
        screen.table(["file", "size", "sha256"], rows_, justify="lrl")


def _import_line(receipt: Receipt) -> str:
    what = f"{receipt['made_from']} as {receipt['target']}, {receipt['num_experts']} experts, top-{receipt['top_k']}"
    return f"{what}, {bytes_text(receipt['total_bytes'])}, {receipt['state']}"


def _import(screen: Screen, receipt: Receipt) -> None:
    found = receipt["measured"]
    rows = {"folder": receipt["out"], "scale folded in": ", ".join(f"{scale:g}" for scale in receipt["scales"])}
    if found is not None:
        worst = min(range(len(found["agreement"])), key=lambda layer: found["agreement"][layer])
        rows["same experts chosen"] = (
            f"{100 * found['mean_agreement']:.1f} %, least in layer {worst}: {100 * found['agreement'][worst]:.1f} %"
        )
        before, after = found["perplexity_original"], found["perplexity_fitted"]
        rows["perplexity"] = f"{before:.3f} → {after:.3f} ({100 * (after / before - 1):+.2f} %)"
        rows["fitted, measured on"] = f"{found['fit_tokens']:,} and {found['heldout_tokens']:,} tokens"
    elif receipt["state"] != "dry run":
        rows["routers"] = "linear already: moved, not fitted"
    screen.pairs(rows)


def _densify_line(receipt: Receipt) -> str:
    shards = f"{receipt['num_shards']} file{'s' if receipt['num_shards'] > 1 else ''}"
    what = f"{receipt['model_type']} with {receipt['intermediate_size']} neurons a layer from {receipt['made_from']}"
    return f"{what}, {bytes_text(receipt['total_bytes'])} in {shards}, {receipt['state']}"


def _densify(screen: Screen, receipt: Receipt) -> None:
    order = {"plan": "the parent's, from the plan", "stored": "expert after expert"}[receipt["neuron_order"]]
    rows = {"folder": receipt["out"], "order of neurons": order}
    rows["scale taken out"] = ", ".join(f"{scale:g}" for scale in receipt["scales"])
    rows["numbers"] = "kept to the last bit" if receipt["bit_exact"] else "rounded once where the scale was"
    if receipt["zero_neurons"]:
        rows["zero neurons left out"] = f"{receipt['zero_neurons']:,}"
    if receipt["parent"]:
        rows["plan was made for"] = f"checkpoint {receipt['parent'][:16]}"
    screen.pairs(rows)


def _verify_line(receipt: Receipt) -> str:
    passed = sum(check["passed"] for check in receipt["checks"])
    worst = {check["name"]: check["measured"] for check in receipt["checks"]}
    name = next(name for name in ("upcycled", "all_experts", "plan") if name in worst)
    equals = {"upcycled": "equals dense", "all_experts": "all experts on equal dense", "plan": "equals its plan"}[name]
    return f"{passed} of {len(receipt['checks'])} checks hold, {equals} to {_small(worst[name])}"


def _verify(screen: Screen, receipt: Receipt) -> None:
    rows: list[list[str | Text]] = []
    for check in receipt["checks"]:
        limit, measured = "" if check["limit"] is None else _small(check["limit"]), _small(check["measured"])
        rows.append([_mark(check["passed"]), check["name"], measured, check["meaning"], limit, check["where"]])
    heads, sides = ["", "check", "measured", "what", "limit", "worst at"], "llrlrl"
    shown = 6 if screen.width >= 120 else 4  # a narrow terminal would fold every line
    screen.table(heads[:shown], [row[:shown] for row in rows], justify=sides[:shown])
    ratios = [(row["layer"], row["norm_ratio"]) for row in receipt["layers"] if row["kind"] != "dense"]
    screen.line(f"inputs: {receipt['num_tokens']} tokens, {receipt['input']}", style="dim")
    screen.line("")
    screen.line("‖mixture‖ / ‖dense‖ of the FFN output, by layer:")
    screen.line("  " + "  ".join(f"{layer}: {_ratio(ratio)}" for layer, ratio in ratios))


def _small(number: float | str) -> str:
    """An error or a limit; a number that is not finite comes as its name."""
    return number if isinstance(number, str) else f"{number:.1e}" if number else "0"


def _ratio(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.2f}"


def _sift_line(receipt: Receipt) -> str:
    if receipt["state"] == "planned":
        return f"{receipt['files_scored']} files to look at"
    total, kept = (sum(row[key] for row in receipt["domains"]) for key in ("bytes", "kept_bytes"))
    names = ", ".join(dict.fromkeys(row["title"] for row in receipt["filters"]))
    by = f" by {names}" if names else ""
    return f"{100 * kept / max(total, 1):.1f} % of {bytes_text(total)} of text kept{by}"


def _sift(screen: Screen, receipt: Receipt) -> None:
    reasons = list(dict.fromkeys(name for row in receipt["domains"] for name in row["dropped"]))
    estimated = ["tokens dropped*"] if any(row["bytes_per_token"] for row in receipt["domains"]) else []
    rows: list[list[str | Text]] = []
    for row in receipt["domains"]:
        gone = [count_text(row["dropped"][name]["documents"]) if name in row["dropped"] else "" for name in reasons]
        share = f"{100 * row['kept_bytes'] / max(row['bytes'], 1):.1f} %"
        size = row["bytes_per_token"]
        lost = [count_text(round((row["bytes"] - row["kept_bytes"]) / size)) if size else ""] if estimated else []
        rows.append([row["name"], count_text(row["documents"]), *gone, count_text(row["kept_documents"]), share, *lost])
    if rows:
        screen.table(["domain", "documents", *reasons, "kept", "of its text", *estimated], rows)
    if estimated:
        screen.line("* estimated: bytes of text by those of a token in a sample", style="dim")
    cells: list[list[str | Text]] = [
        [row["title"], row["domain"], f"{row['threshold']:.4g}", count_text(row["documents_below"])]
        for row in receipt["filters"]
        if row["drop"] is not None
    ]
    if cells:
        screen.title("thresholds")
        screen.table(["filter", "domain", "score", "below it"], cells, justify="llrr")
    if receipt["audit"]:
        screen.line(f"to look at: {receipt['audit']}")


def _train_filter_line(receipt: Receipt) -> str:
    texts = f"{receipt['keep']:,} texts to keep and {receipt['drop']:,} to drop"
    return f"{receipt['out']}: from {texts}; of the held-out fifth {100 * receipt['accuracy']:.1f} % are judged right"


def _prepare_line(receipt: Receipt) -> str:
    train = sum(row["splits"]["train"]["num_tokens"] for row in receipt["domains"])
    held = sum(row["splits"]["heldout"]["num_tokens"] for row in receipt["domains"])
    count = len(receipt["domains"])
    return f"{count} domain{'s' * (count > 1)}, {count_text(train)} tokens to train on, {count_text(held)} held out"


def _prepare(screen: Screen, receipt: Receipt) -> None:
    rows = []
    for row in receipt["domains"]:
        train, held = row["splits"]["train"], row["splits"]["heldout"]
        per_token = train["num_bytes"] / max(train["num_tokens"], 1)
        unknown = 100 * (train["num_unknown"] + held["num_unknown"]) / max(train["num_tokens"] + held["num_tokens"], 1)
        cells = [count_text(train[key]) for key in ("num_documents", "num_tokens")]
        cells += [bytes_text(train["num_bytes"]), f"{per_token:.2f}", f"{unknown:.2g} %" if unknown else "0"]
        rows.append([row["name"], *cells, count_text(held["num_documents"]), count_text(held["num_tokens"])])
    columns = ["\ndomain", "train\ndocuments", "\ntokens", "\ntext", "bytes/\ntoken", "unknown\ntokens"]
    screen.table([*columns, "held out\ndocuments", "\ntokens"], rows)
    for row in receipt["domains"]:
        if row["num_empty"]:
            screen.line(f"note: {row['name']}: {row['num_empty']} empty documents left out", style="dim")
        if row["num_filtered"]:
            screen.line(f"note: {row['name']}: {row['num_filtered']} documents not kept by the filters", style="dim")
        if row["bad"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in row["bad"].items())
            screen.line(f"note: {row['name']}: unreadable documents left out: {reasons}", style="dim")
    if receipt["encoder"]:
        proof = f": {receipt['proof']}" if receipt["proof"] else ""
        screen.line(f"tokenised with {receipt['encoder']}{proof}", style="dim")
    if receipt["part"] is not None:
        screen.line("part {} of {}; after all of them: the same without --part".format(*receipt["part"]), style="dim")


def _calibrate_line(receipt: Receipt) -> str:
    clusters = receipt["num_clusters"]
    text = f"{', '.join(receipt['quantities'])} on {count_text(receipt['num_tokens'])} tokens"
    text += f" in {clusters} cluster{'s' * (clusters > 1)}"
    if receipt["state"] == "dry run":
        memory, disk = bytes_text(receipt["memory_bytes"]), bytes_text(receipt["disk_bytes"])
        return f"{text}; needs {memory} of memory, {disk} of disk"
    return text + (f", loss {receipt['loss']:.3f}" if receipt["loss"] is not None else "")


def _calibrate(screen: Screen, receipt: Receipt) -> None:
    screen.pairs({"folder": receipt["folder"], "layers": receipt["num_layers"], "sequences": receipt["num_sequences"]})
    if receipt["num_clusters"] > 1 and receipt["cluster_domains"]:
        rows = [[str(cluster), *map(str, counts)] for cluster, counts in enumerate(receipt["cluster_domains"])]
        screen.title("sequences of each domain in each cluster of text")
        screen.table(["cluster", *receipt["domains"]], rows)


def _pretrain_line(receipt: Receipt) -> str:
    if "first_loss" not in receipt:
        fits = "model, domains and settings fit" if not receipt["not_checked"] else "the settings fit"
        return f"{receipt['steps']} steps, {count_text(receipt['tokens'])} tokens: {fits}"
    loss = f"loss {receipt['first_loss']:.3f} → {receipt['last_loss']:.3f}"
    if taught := receipt.get("teacher_loss"):
        loss += f", from the teacher {taught[0]:.3f} → {taught[1]:.3f}"
    rate = receipt.get("tokens_per_second")
    speed = f", {count_text(rate)} tokens/s" if rate else ""
    return f"{receipt['steps']} steps, {count_text(receipt['tokens'])} tokens, {loss}{speed}"


def _pretrain(screen: Screen, receipt: Receipt) -> None:
    if "mixture" not in receipt:
        show_forecast(screen, receipt)
        return
    shares = {row["name"]: row for row in receipt["mixture"]}
    rows = []
    for name, before in receipt["heldout_before"].items():
        share, after = shares.get(name, {}), receipt["heldout_after"][name]
        asked = [f"{100 * share[key]:.1f} %" for key in ("requested", "achieved")] if share else ["", ""]
        epochs = f"{share['epochs']:.2f}" if share else ""
        rows.append([name, *asked, epochs, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"])
    heads = ["\ndomain", "share\nrequested", "\nachieved", "\nepochs", "held-out loss\nstep 0", "\nend", "\nchange"]
    screen.table(heads, rows)
    facts = {"model": receipt["model"]}
    if len(receipt.get("weight_history", ())) > 1:
        facts["mixing rule"] = f"{receipt['rule']}, weights moved {len(receipt['weight_history']) - 1} times"
        facts["weights it ends with"] = ", ".join(f"{name} {w:.3f}" for name, w in receipt["weights"].items())
    if receipt["router"]:
        low, high = receipt["router_gradient_norm"]
        facts["router policy"] = receipt["router"]
        facts["router gradient norm"] = f"{low:.2g} to {high:.2g}"
        facts["idle experts at the end"] = str(receipt["idle_experts"])
    computed = receipt["runtime"]
    on = [name for name in ("fast_matmul", "keep_memory") if computed[name]]
    facts["runtime"] = ", ".join([*([f"experts {computed['experts']}"] if computed["experts"] else []), *on]) or "usual"
    if receipt["resumed_from"]:
        facts["resumed from step"] = str(receipt["resumed_from"])
    screen.pairs(facts)


def _reference_loss(screen: Screen, receipt: Receipt) -> None:
    rows = []
    for name, entry in receipt["losses"].items():
        error = "" if entry["standard_error"] is None else f"{entry['standard_error']:.4f}"
        rows.append([name, f"{entry['loss']:.4f}", error, f"{entry['scored_tokens']:,}", f"{entry['documents']:,}"])
    screen.table(["domain", "loss", "standard error", "tokens", "documents"], rows)
    screen.pairs({"written to": str(receipt["out"]), "windows": f"{receipt['seq_len']} ids"})


def _mark(good: bool) -> Text:
    return Text("✓", style="green") if good else Text("✗", style="red")


_SUMMARIES: dict[str, Callable[[Receipt], str]] = {
    "plan": _plan_line,
    "convert": _convert_line,
    "import": _import_line,
    "densify": _densify_line,
    "verify": _verify_line,
    "sift": _sift_line,
    "train-filter": _train_filter_line,
    "prepare": _prepare_line,
    "calibrate": _calibrate_line,
    "recover": recovery_line,
    "pretrain": _pretrain_line,
    "tune": tune_line,
    "eval": scores_line,
    "reference-loss": lambda receipt: f"{receipt['out']}: {len(receipt['losses'])} domains",
    "trace": trace_line,
    "report": lambda receipt: f"{receipt['report']} ({bytes_text(receipt['bytes'])})",
}
_VIEWS: dict[str, Callable[[Screen, Receipt], None]] = {
    "plan": _plan,
    "convert": _convert,
    "import": _import,
    "densify": _densify,
    "verify": _verify,
    "sift": _sift,
    "prepare": _prepare,
    "calibrate": _calibrate,
    "recover": show_recovery,
    "pretrain": _pretrain,
    "tune": show_tune,
    "eval": show_scores,
    "reference-loss": _reference_loss,
    "trace": show_trace,
}
