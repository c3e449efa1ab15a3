"""Whether a model keeps packed documents apart, as `attend="document"` promises: measured, not known by name."""

from __future__ import annotations

from typing import Any

import torch

from prismoe.errors import UsageError
from prismoe.train.engine.placement import gather_no_more

__all__ = ["check_apart"]

LENGTH = 16  # ids of each of the two documents; what leaks through a recurrence or convolution is greatest at first
TOLERANCE = 1e-3  # of the spread of the logits; rounding is 1e-6 of it in float32 and up to 1e-2 in bfloat16


@torch.no_grad()
def check_apart(model: Any, *, seq_len: int, bf16: bool = False) -> None:
    """Refuse a model whose output for a document depends on the one packed before it.

    Most stock classes, given position ids that begin anew and no mask, keep attention within documents. Recurrent
    layers (Mamba) carry their state across, and `granitemoehybrid` also attends across where all layers are attention.

    Args:
        model: a stock causal LM; its mode is left as it was.
        seq_len: no more ids than this are run.
        bf16: the model computes in bfloat16.

    Raises:
        UsageError: by how much the one changes the other.
    """
    length = max(1, min(LENGTH, seq_len // 2))
    device, vocab_size = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    ids_3T = torch.arange(3 * length, device=device).reshape(3, length) % vocab_size
    packed_BT = torch.stack([torch.cat([ids_3T[0], ids_3T[2]]), torch.cat([ids_3T[1], ids_3T[2]])])
    positions_BT = torch.arange(length, device=device).repeat(2, 2)
    training = model.training
    model.eval()
    try:
        logits_BTV = model(input_ids=packed_BT, position_ids=positions_BT, use_cache=False).logits[:, length:].float()
    finally:
        model.train(training)
        gather_no_more(model)
    leaked = float((logits_BTV[0] - logits_BTV[1]).abs().max() / logits_BTV.std().clamp_min(1e-30))
    if not leaked <= (30 if bf16 else 1) * TOLERANCE:
        name = type(model).__name__
        raise UsageError(
            f"document, but in {name} one document moves the logits of the next by {leaked:.1g} deviations",
            where="pretrain.attend",
            needed="a class whose layers all keep to position ids",
            hint="pretrain.attend=sequence",
        )
