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
    IN_CACHE,
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
    found: Tensor = _FrozenHead.apply(hidden, head, targets, rows, teaching)  # type: ignore[no-untyped-call]
    return found


class _FrozenHead(torch.autograd.Function):
    """Works out d loss / d hidden in the forward pass, as that of `logps` does."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        targets: Tensor,
        rows: int,
        teaching: Teaching,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        ctx.factor = FP16_FACTOR if hidden.dtype == torch.float16 else 1
        found = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), rows):
            some = slice(first, first + rows)
            piece = hidden[some].detach().requires_grad_(wanted)
            taught = teaching.head(teaching.hidden[some])
            with torch.set_grad_enabled(wanted):
                logits = head(piece)
            by_logits = logits.detach()
            factor = ctx.factor if wanted else None
            _measure(by_logits, taught, targets[some], found[:, some], teaching, slopes=factor)
            if slopes is not None:
                (slopes[some],) = torch.autograd.grad(logits, piece, by_logits)
            del logits, by_logits, taught  # or they would be there beside the next ones
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,), (g,) = ctx.saved_tensors, grads
        # In fp32: rounding the factor would turn the whole gradient
        slopes = (slopes.float() * (g[0][:, None] / ctx.factor)).to(slopes.dtype)
        return slopes, None, None, None, None


def _measure(
    logits: Tensor,
    taught: Tensor,
    targets: Tensor,
    found: Tensor,
    teaching: Teaching,
    *,
    slopes: int | None,
) -> None:
    """Write to ``found [3, n]``; if asked, the slopes of the loss by the logits over these.

    They are multiplied by a factor, ``slopes``. Beside ``logits [n, V]`` and those of the teacher,
    ``taught``, nothing is as wide: they become probabilities a few rows at a time.
    """
    ratio, temperature = teaching.kd_ratio, teaching.temperature
    rows = max(IN_CACHE // logits.shape[1], 1) if logits.device.type == "cpu" else len(logits)
    pieces = [*(whole.split(rows) for whole in (logits, taught, targets)), found.split(rows, dim=1)]
    for some, other, predicted, out in zip(*pieces, strict=True):
        logp = torch.log_softmax(some.float(), dim=-1)
        q = torch.log_softmax(other.float() / temperature, dim=-1)
        p = logp if temperature == 1 else torch.log_softmax(some.float() / temperature, dim=-1)
        at_target = torch.arange(len(logp), device=logp.device), predicted
        out[1] = logp[at_target]
        out[2] = F.kl_div(p, q, reduction="none", log_target=True).sum(dim=-1)
        out[0] = ratio * temperature**2 * out[2] - (1 - ratio) * out[1]
        if slopes is not None:
            if temperature == 1:
                by_logits = logp.exp_().sub_(q.exp_(), alpha=ratio)
            else:
                away = p.exp_().sub_(q.exp_())
                by_logits = logp.exp_().mul_(1 - ratio).add_(away, alpha=ratio * temperature)
            by_logits[at_target] -= 1 - ratio
            some.copy_(by_logits if slopes == 1 else by_logits.mul_(slopes))


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
