"""How far next tokens are from a teacher's, of labelled tokens, a few rows of logits at a time.

What a teacher predicts in the place of row i depends on its own row i alone, as what is learned
does. So the way of `phi3_plugin.models.logps` holds here too: logits of either never exist beyond
some rows, and the gradient by the hidden state is worked out with the loss.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from phi3_plugin.models.logps import (
    OfLogits,
    recomputed,
    rows_at_once,
    trained_of,
    worked_out,
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
    trained = trained_of(head) if torch.is_grad_enabled() else []
    if trained:
        return recomputed(of_piece, hidden, rows, trained)

    def measured(some: slice) -> OfLogits:
        taught = teaching.head(teaching.hidden[some])
        return partial(_measure, targets[some], taught, teaching)

    return worked_out(measured, hidden, head, rows, 3)


def _measure(
    targets: Tensor,
    taught: Tensor,
    teaching: Teaching,
    some: slice,
    logits: Tensor,
    found: Tensor,
    wanted: bool,
) -> Tensor | None:
    """Write loss, log p and distance of some rows of a piece, of which ``taught`` is all."""
    ratio, temperature = teaching.kd_ratio, teaching.temperature
    logp = torch.log_softmax(logits.float(), dim=-1)
    q = torch.log_softmax(taught[some].float() / temperature, dim=-1)
    p = logp if temperature == 1 else torch.log_softmax(logits.float() / temperature, dim=-1)
    at_target = torch.arange(len(logp), device=logp.device), targets[some]
    found[1] = logp[at_target]
    found[2] = F.kl_div(p, q, reduction="none", log_target=True).sum(dim=-1)
    found[0] = ratio * temperature**2 * found[2] - (1 - ratio) * found[1]
    if not wanted:
        return None
    if temperature == 1:
        slopes = logp.exp_().sub_(q.exp_(), alpha=ratio)
    else:
        away = p.exp_().sub_(q.exp_())
        slopes = logp.exp_().mul_(1 - ratio).add_(away, alpha=ratio * temperature)
    slopes[at_target] -= 1 - ratio
    return slopes


def _distances(logits: Tensor, targets: Tensor, teaching: Teaching, some: slice) -> Tensor:
    """Return what :func:`token_distances` does for some rows, ``[3, n]``, by autograd."""
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
