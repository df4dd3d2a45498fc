"""Losses over the log-probabilities of labelled tokens, summed: a step divides once.

The model gives log p of every labelled token, and its gradient whatever the loss: another loss of
tokens is another function here. One of pairs of answers also needs them in one micro-batch, and a
step that divides by their number.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Batch = dict[str, Any]
"""What the model takes, with ``targets`` and ``rows``; see :func:`phi3_plugin.train.step.ready`."""

Loss = Callable[[Tensor, Batch], Tensor]
"""(log p of each labelled token ``[N]``, their batch) -> loss, a scalar in fp32."""


def sft(logps: Tensor, batch: Batch) -> Tensor:
    """Return the cross entropy: -log p, summed over tokens."""
    return -logps.sum()
