"""Talking to a model: a dialogue within the model's context, and which experts each token went through."""
