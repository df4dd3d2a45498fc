"""The loss of the head, a few rows at a time, and its gradient in the same pass.

Logits are the widest tensors of a model by far; here they never exist beyond some rows, and the
backward pass needs none of them.

Source: the idea of Liger-Kernel's FusedLinearCrossEntropy (Hsu et al. 2024, section 3.2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS = 1 << 25
"""Computed at a time, about."""


# Shapes: N rows, D model, V vocabulary
def summed_loss(
    head: Callable[[Tensor], Tensor],
    x: Tensor,
    targets: Tensor,
    vocabulary: int,
    trained: Sequence[Tensor],
) -> Tensor:
    """Return the sum of -log p over rows, in fp32.

    Args:
        head: Maps ``[n, D]`` to logits ``[n, V]``.
        x: Normalized hidden states ``[N, D]``; N may be 0.
        targets: The token that each row predicts, ``[N]``.
        vocabulary: V.
        trained: Those parameters of the head that have a gradient.
    """
    trained = trained if torch.is_grad_enabled() else ()
    rows = max(LOGITS // vocabulary // 64 * 64, 64)
    given = head, x, targets, rows, *trained
    loss: Tensor = _SummedLoss.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        x: Tensor,
        targets: Tensor,
        rows: int,
        *trained: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[1] or bool(trained)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        # In fp32: many pieces would round many times
        sums = [torch.zeros_like(value, dtype=torch.float32) for value in trained]
        sums = [torch.zeros_like(x), *sums] if wanted else []
        for first in range(0, len(x), rows):
            some = slice(first, first + rows)
            piece = x[some].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(piece)
            logp = torch.log_softmax(logits.detach().float(), dim=-1)
            total -= logp.gather(1, targets[some, None]).sum()
            if wanted:
                slope = _slope(logp, targets[some]).to(logits.dtype)
                # A disabled adapter is not used
                found = torch.autograd.grad(logits, (piece, *trained), slope, allow_unused=True)
                for value, more in zip((sums[0][some], *sums[1:]), found, strict=True):
                    value += 0 if more is None else more
                del slope, found, more
            del logits, logp  # or they would be there beside the next ones
        ctx.save_for_backward(*sums)
        ctx.dtypes = [value.dtype for value in (x, *trained)]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32: rounding the factor would turn the whole gradient
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gx, *others = ((value.float() * grads[0]).to(dtype) for value, dtype in found)
        return None, gx, None, None, *others


def _slope(logp: Tensor, targets: Tensor) -> Tensor:
    """Return the derivative of the loss by the logits, in place: p, less 1 at the target."""
    p = logp.exp_()
    p[torch.arange(len(targets), device=p.device), targets] -= 1
    return p
