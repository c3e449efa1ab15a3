"""Construction methods: one file, one method. Its `split(layer, *, …) -> LayerPlan` looks at one layer and is pure."""
