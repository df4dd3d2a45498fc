"""Log-probabilities of labelled tokens, a few rows of logits at a time.

Logits are the widest tensors of a model by far; here they never exist beyond some rows. What row i
gives its own token depends on nothing outside row i, so its gradient by the hidden state is worked
out with it and the backward pass only scales it, whatever loss comes after.

Source: the idea of Liger-Kernel's FusedLinearCrossEntropy (Hsu et al. 2024, section 3.2).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear

LOGITS = 1 << 25
"""Computed at a time, about: 128 MiB in fp32."""
IN_CACHE = 1 << 17
"""Of those, how many become probabilities at a time on a CPU; on a GPU it is all of them."""

FP16_FACTOR = 1024
"""By which gradients in fp16 are larger while they wait for the backward pass: there is nothing
below 6e-8 in fp16, and most tokens are less likely than that. It is too much for weights of 64."""


# Shapes: N labelled tokens, n some of them, D model, V vocabulary
def token_logps(
    hidden: Tensor,
    head: nn.Module | TiedLinear,
    targets: Tensor,
    vocabulary: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return log p of each target, ``[N]`` in fp32.

    Args:
        hidden: Normalized hidden states ``[N, D]``; N may be 0.
        head: Maps ``[n, D]`` to logits ``[n, V]``.
        targets: The token that each row predicts, ``[N]``.
        vocabulary: V.
        label_smoothing: Share of the mean log p of all V tokens in the result, as in torch's
            ``cross_entropy``.
    """
    rows = rows_at_once(vocabulary)
    trained = trained_of(head) if torch.is_grad_enabled() else []
    if trained:

        def of_piece(piece: Tensor, some: slice) -> Tensor:
            return _logps(piece, head, targets[some], label_smoothing)

        return recomputed(of_piece, hidden, rows, trained)

    def measured(some: slice) -> OfLogits:
        return partial(_predict, targets[some], label_smoothing)

    return worked_out(measured, hidden, head, rows, 1)[0]


def rows_at_once(width: int) -> int:
    """Return for how many rows so many logits each are computed at a time."""
    return max(LOGITS // width // 64 * 64, 64)  # kernels like multiples of 64


def trained_of(head: nn.Module | TiedLinear) -> list[Tensor]:
    """Return what of a head is trained."""
    if isinstance(head, TiedLinear):
        head = head.tied_module
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


OfPiece = Callable[[Tensor, slice], Tensor]
"""(some hidden states ``[n, D]``, which rows of all they are) -> values of each row, ``[…, n]``."""


def recomputed(of_piece: OfPiece, hidden: Tensor, rows: int, trained: Sequence[Tensor]) -> Tensor:
    """Return values of all rows ``[…, N]``, so many at a time; each piece is computed twice.

    Args:
        of_piece: May use what is trained.
        hidden: Hidden states ``[N, D]``.
        rows: In a piece.
        trained: Has gradients, summed in fp32.
    """
    values: Tensor = _TrainedHead.apply(hidden, of_piece, rows, *trained)  # type: ignore[no-untyped-call]
    return values


OfLogits = Callable[[slice, Tensor, Tensor, bool], Tensor | None]
"""(some rows of a piece, their logits ``[n, V]``, where to write their values ``[K, n]``, whether
slopes are wanted) -> those of the first value by the logits, ``[n, V]`` in fp32."""


def worked_out(
    measured: Callable[[slice], OfLogits],
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    rows: int,
    kinds: int,
) -> Tensor:
    """Return values of all rows, ``[K, N]`` in fp32; the first of a row alone has a gradient.

    It is worked out with the value, of a few rows at a time: the head must not be trained.

    Args:
        measured: Is told which rows of all a piece has, and returns what measures some of these.
        hidden: Hidden states ``[N, D]``.
        head: Maps ``[n, D]`` to logits ``[n, V]``.
        rows: In a piece.
        kinds: K.
    """
    values: Tensor = _FrozenHead.apply(hidden, head, measured, rows, kinds)  # type: ignore[no-untyped-call]
    return values


class _FrozenHead(torch.autograd.Function):
    """Nothing else is as wide as a piece of logits: slopes replace them a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        measured: Callable[[slice], OfLogits],
        rows: int,
        kinds: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        ctx.factor = FP16_FACTOR if hidden.dtype == torch.float16 else 1
        values = hidden.new_empty(kinds, len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if wanted else None
        for first in range(0, len(hidden), rows):
            some = slice(first, first + rows)
            piece = hidden[some].detach().requires_grad_(wanted)
            measure = measured(some)
            with torch.set_grad_enabled(wanted):
                logits = head(piece)
            by_logits = logits.detach()
            few = max(IN_CACHE // logits.shape[1], 1) if logits.device.type == "cpu" else rows
            for start in range(0, len(piece), few):
                part = slice(start, start + few)
                found = measure(part, by_logits[part], values[:, some][:, part], wanted)
                if found is not None:
                    by_logits[part] = found if ctx.factor == 1 else found.mul_(ctx.factor)
            if slopes is not None:
                (slopes[some],) = torch.autograd.grad(logits, piece, by_logits)
            del logits, by_logits, measure  # or they would be there beside the next ones
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,), (g,) = ctx.saved_tensors, grads
        # In fp32: rounding the factor would turn the whole gradient
        slopes = (slopes.float() * (g[0][:, None] / ctx.factor)).to(slopes.dtype)
        return slopes, None, None, None, None


def _predict(
    targets: Tensor, smoothing: float, some: slice, logits: Tensor, logps: Tensor, wanted: bool
) -> Tensor | None:
    """Write log p of targets; by the hidden state it is W of the target less the mean W by p."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    at_target = torch.arange(len(logp), device=logp.device), targets[some]
    logps[0] = _smoothed(logp[at_target], logp, smoothing)
    if not wanted:
        return None
    slopes = logp.exp_().neg_()
    if smoothing:
        slopes += smoothing / slopes.shape[-1]
    slopes[at_target] += 1 - smoothing
    return slopes


class _TrainedHead(torch.autograd.Function):
    """Computes each piece again in the backward pass, which alone knows how much a row weighs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        of_piece: OfPiece,
        rows: int,
        *trained: Tensor,
    ) -> Tensor:
        ctx.rows, ctx.trained, ctx.pieces = rows, trained, []
        for number, some in enumerate(hidden.split(rows)):
            piece, place = some.detach().requires_grad_(), slice(number * rows, (number + 1) * rows)
            with torch.enable_grad():
                values = checkpoint(of_piece, piece, place, use_reentrant=False)
            ctx.pieces.append((piece, values))
        return torch.cat([values.detach() for _, values in ctx.pieces], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden = []
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        for (piece, values), g in zip(ctx.pieces, grads[0].split(ctx.rows, dim=-1), strict=True):
            # A disabled adapter is not used, and has no gradient
            first, *rest = torch.autograd.grad(values, (piece, *ctx.trained), g, allow_unused=True)
            by_hidden.append(first)
            # Summed in fp32: many pieces would round many times
            sums = [_sum(total, more) for total, more in zip(sums, rest, strict=True)]
        found = zip(sums, ctx.trained, strict=True)
        by_head = [None if total is None else total.to(value.dtype) for total, value in found]
        return torch.cat(by_hidden), None, None, *by_head


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    return more.float() if total is None else total.add_(more)


def _logps(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, smoothing: float
) -> Tensor:
    logp = torch.log_softmax(head(hidden).float(), dim=-1)
    return _smoothed(logp.gather(1, targets[:, None])[:, 0], logp, smoothing)


def _smoothed(at_target: Tensor, logp: Tensor, smoothing: float) -> Tensor:
    """Return log p of targets, [n], with a share of the mean of all, of [n, V]."""
    return at_target.lerp(logp.mean(-1), smoothing) if smoothing else at_target
