"""Learning rate: linear warm-up to the peak, then half a cosine down to a floor (LLaMA-MoE: 100 steps, floor 10 %)."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate of the update that follows `step` finished updates (0 ≤ step < steps).

    During warm-up the first update already moves: peak · (step + 1) / warmup_steps, so update number
    `warmup_steps` is the first at the peak. The last update runs at exactly peak · min_ratio.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last = steps - 1 - warmup_steps
    done = (step - warmup_steps) / last if last > 0 else 0.0
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))
