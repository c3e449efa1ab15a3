"""What a training run would need, for the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismoe.console import Screen, bytes_text, count_text, seconds_text

__all__ = ["show_forecast"]


def show_forecast(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """Memory, traffic, disk and time of a dry run, and the lines that launch it."""
    parts = ["weights", "gradients", "optimizer", "gathered", "activations", "logits"]
    keys = ["weight_bytes", "gradient_bytes", "optimizer_bytes", "gathered_bytes", "activation_bytes", "logit_bytes"]
    if receipt.get("teacher_bytes"):
        parts, keys = [*parts, "teacher"], [*keys, "teacher_bytes"]
    of_a_device = ", ".join(f"{name} {bytes_text(receipt[key])}" for name, key in zip(parts, keys, strict=True))
    sent = ", ".join(f"{name.replace('_', '-')} {bytes_text(n)}" for name, n in receipt["sent_bytes"].items() if n)
    copies = receipt["layout"]["replicate"]
    facts = {
        "processes": f"{receipt['processes']} ({copies} {'copy' if copies == 1 else 'copies'} of the training state)",
        "parameters": count_text(receipt["parameters"]),
        "FLOPs per token": count_text(receipt["flops_per_token"]),
        "memory of a device": f"{bytes_text(receipt['memory_bytes'])}: {of_a_device}",
        "memory of its host": f"{bytes_text(receipt['saving_bytes'])} more while saving, or training waits",
        "sent by a device in a step": sent or "nothing",
        "disk": f"{bytes_text(receipt['disk_bytes'])} (a checkpoint {bytes_text(receipt['checkpoint_bytes'])})",
    }
    if receipt["tokens_per_second"]:
        days, rate = receipt["days"], count_text(receipt["tokens_per_second"])
        lasts = f"{days:.1f} days" if days >= 1 else seconds_text(86400 * days)
        assumed = f"if {receipt['assumed_mfu']:.0%} of the peak of {receipt['hardware']} is reached"
        facts["speed"] = f"{rate} tokens/s, {lasts} {assumed}"
    if receipt["not_checked"]:
        facts["not there yet, not checked"] = ", ".join(receipt["not_checked"])
    screen.pairs(facts)
    for name, lines in receipt["launch"].items():
        screen.title(name)
        for line in lines.split("\n"):
            screen.line(line)
