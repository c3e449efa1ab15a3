"""Measuring models side by side: held-out text of each domain (`heldout`)."""

from prismoe.evaluate.heldout import DomainScore, Scores, evaluate

__all__ = ["DomainScore", "Scores", "evaluate"]
