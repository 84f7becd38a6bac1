"""Losses as sums: a loss function takes (model, batch) and returns the sum over the batch's targets.

The engine divides once, by the number of targets of the whole step over all micro-batches and ranks. A mean per
micro-batch, averaged again, would weigh a target in a short answer more than one in a long answer.
Source of the pitfall: https://unsloth.ai/blog/gradient (transformers had it until 4.46).
"""

from torch import Tensor, nn

from core.data import Batch


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the targets, a scalar in nats: pretraining and fine-tuning alike."""
    return model(batch.ids, batch.targets, batch.docs).sum()
