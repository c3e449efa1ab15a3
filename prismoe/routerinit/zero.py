"""Zero rows: every token prefers no expert (ties go to the first ones), so only training with noise can use it."""

from prismoe.layerplan import LayerPlan, LayerView, RouterDraw


def rows(layer: LayerView, plan: LayerPlan) -> RouterDraw:
    """Zeros."""
    return RouterDraw(std=0.0, seed=layer.seed)
