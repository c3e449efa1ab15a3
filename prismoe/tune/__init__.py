"""Instruction tuning: from a mixture to a chat model."""
