"""Next-token cross entropy, summed, so that a step can divide once by all its labelled tokens."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100

Batch = dict[str, Any]
"""What the model takes, with ``targets`` and ``rows`` of :func:`with_targets`."""


# Shapes: B batch, S sequence, N labelled tokens
def with_targets(batch: Batch) -> Batch:
    """Return a batch that says what is predicted and where, in place of its labels.

    On the CPU, before it goes to the model: a GPU would have to be asked how many there are.

    Args:
        batch: ``labels [B, S]`` at their own tokens' places, -100 where there is none, and what
            the model takes.

    Returns:
        ``targets [N]``, the labels; ``rows [N]``, which tokens predict them, counted over all of
        B and S; and the rest of the batch.
    """
    labels = shifted(batch["labels"]).flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return {**rest, "targets": labels[rows], "rows": rows}


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model and return the summed loss over what is predicted, a scalar in fp32.

    Args:
        model: A decoder that takes ``targets`` and ``rows``.
        batch: From :func:`with_targets`, on the model's device.
    """
    loss: Tensor = model(**batch)
    return loss


def shifted(labels: Tensor) -> Tensor:
    """Put each label at the token that predicts it; the last token predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
