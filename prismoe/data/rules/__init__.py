"""Mixing rules: one file, one rule. Its `update(weights, losses, reference, *, …) -> weights` is pure.

`losses` and `reference` are mean losses a held-out token by domain, language modelling only (never with a router loss
in them). What a rule returns goes to `Mixture.set_weights` at the step where the losses were measured.
"""
