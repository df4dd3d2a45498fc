"""How far next tokens are from a teacher's, of labelled tokens, a few rows of logits at a time.

What a teacher predicts in the place of row i depends on its own row i alone, as what is learned
does. So the way of `phi3_plugin.models.logps` holds here too: logits of either never exist beyond
some rows, and the gradient by the hidden state is worked out with the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from phi3_plugin.models.logps import (
    FP16_FACTOR,
    OfPiece,
    recomputed,
    rows_at_once,
    trained_parameters,
)


# Shapes: N labelled tokens, n some of them, D model, V vocabulary
class Teaching(NamedTuple):
    """What a teacher says of the labelled tokens of a batch, and how it is learned."""

    hidden: Tensor
    """Its normalized hidden states, ``[N, its D]``."""
    head: Callable[[Tensor], Tensor]
    """Maps ``[n, its D]`` to logits ``[n, V]``."""
    kd_ratio: float
    """Share of the teacher in the loss; the rest is the label's."""
    temperature: float
    """Logits are divided by it, both model's, where they are compared."""


def token_distances(
    hidden: Tensor,
    head: nn.Module | TiedLinear,
    targets: Tensor,
    vocabulary: int,
    teaching: Teaching,
) -> Tensor:
    """Return the loss of each labelled token, its log p and its distance, ``[3, N]`` in fp32.

    The distance is the forward KL divergence, sum_v q_v (log q_v - log p_v) with q the teacher's,
    at the temperature T. The loss, which alone has a gradient, is ``kd_ratio T**2`` times it, and
    ``-(1 - kd_ratio)`` times log p.

    Args:
        hidden: Normalized hidden states ``[N, D]``; N may be 0.
        head: Maps ``[n, D]`` to logits ``[n, V]``.
        targets: The token that each row predicts, ``[N]``.
        vocabulary: V.
        teaching: The teacher's rows.

    Source: Hinton et al. 2015, Distilling the knowledge in a neural network, section 2.
    """

    def of_piece(piece: Tensor, some: slice) -> Tensor:
        return _distances(head(piece), targets[some], teaching, some)

    rows = rows_at_once(2 * vocabulary)  # those of the teacher are there as well
    trained = trained_parameters(head) if torch.is_grad_enabled() else []
    if trained:
        return recomputed(of_piece, hidden, rows, trained)
    found: Tensor = _FrozenHead.apply(hidden, of_piece, rows)  # type: ignore[no-untyped-call]
    return found


class _FrozenHead(torch.autograd.Function):
    """Works out d loss / d hidden in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, of_piece: OfPiece, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        ctx.factor = FP16_FACTOR if hidden.dtype == torch.float16 else 1
        found = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), rows):
            some = slice(first, first + rows)
            piece = hidden[some].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                values = of_piece(piece, some)
                loss = values[0].sum() * ctx.factor
            found[:, some] = values.detach()
            if slopes is not None:
                (slopes[some],) = torch.autograd.grad(loss, piece)
            del values, loss  # or their graph would be there beside the next one
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,), (g,) = ctx.saved_tensors, grads
        # In fp32: rounding the factor would turn the whole gradient
        return (slopes.float() * (g[0][:, None] / ctx.factor)).to(slopes.dtype), None, None


def _distances(logits: Tensor, targets: Tensor, teaching: Teaching, some: slice) -> Tensor:
    """Return what :func:`token_distances` does for some rows, ``[3, n]``, of whole logits."""
    ratio, temperature = teaching.kd_ratio, teaching.temperature
    with torch.no_grad():
        taught = teaching.head(teaching.hidden[some]).float()
        taught = torch.log_softmax(taught / temperature, dim=-1)
    logits = logits.float()
    logp = torch.log_softmax(logits, dim=-1)
    at_target = logp.gather(1, targets[:, None])[:, 0]
    if temperature != 1:
        logp = torch.log_softmax(logits / temperature, dim=-1)
    distance = F.kl_div(logp, taught, reduction="none", log_target=True).sum(dim=-1)
    loss = ratio * temperature**2 * distance - (1 - ratio) * at_target
    return torch.stack([loss, at_target.detach(), distance.detach()])
