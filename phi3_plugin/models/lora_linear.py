"""A frozen linear map and its adapters as one operation, with its own backward pass.

Autograd would keep the output of every factor and pass over the wide outputs again for the scale
and for each sum. Here the input and what is as narrow as the rank are kept, the frozen weight has
no gradient, and both products are added into one output, in either direction.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi3_plugin.models.nf4_product import plain


# Shapes: N tokens, I input, O output, R rank
class Adapter(NamedTuple):
    """Low-rank factors for consecutive rows of a weight."""

    start: int
    """First of the rows; B says how many there are."""
    scaling: float
    a: Tensor
    """``[R, I]``."""
    b: Tensor
    """``[rows, R]``."""


def lora_linear(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], dropout: float = 0.0
) -> Tensor:
    """Return ``W x`` with ``scaling B A dropout(x)`` added to the rows of each adapter.

    Adapters in another precision than the input's are rounded to it for the products; their
    gradients have their own.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``, plain or NF4; usually frozen.
        adapters: For rows that do not overlap; all see the same dropout.
        dropout: Probability with which an input of the adapters is zeroed.

    Returns:
        ``[..., O]`` in the dtype of ``x``.
    """
    rows = tuple((adapter.start, adapter.scaling) for adapter in adapters)
    factors = [factor for adapter in adapters for factor in (adapter.a, adapter.b)]
    flat = x.flatten(0, -2)
    inside = torch.compiler.is_compiling()  # asked once: a graph break would change the answer
    given = flat, weight, rows, dropout, inside, *factors
    out: Tensor = _LoRALinear.apply(*given)  # type: ignore[no-untyped-call]
    if not inside:
        # After, not in the operation: recomputing it ends as soon as what it keeps is there, so
        # that the largest product of a layer's last operation is not computed twice.
        _add_base(out.detach(), flat.detach(), weight)
    return out.view(*x.shape[:-1], len(weight))


def _add_base(out: Tensor, x: Tensor, weight: Tensor) -> None:
    out.addmm_(x, plain(weight, x.dtype).t())


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rows: tuple[tuple[int, float], ...],
        dropout: float,
        inside: bool,
        *factors: Tensor,
    ) -> Tensor:
        kept = _kept(x, dropout)
        seen = x if kept is None else x * kept / (1 - dropout)
        whole = len(rows) == 1 and len(factors[1]) == len(weight)
        out = (x.new_empty if whole else x.new_zeros)(len(x), len(weight))
        lows = []
        for (start, scaling), a, b in zip(rows, factors[::2], factors[1::2], strict=True):
            low = (seen @ a.to(x.dtype).t()) * scaling
            part = out[:, start : start + len(b)]
            if inside:  # the compiler takes no strided out=
                part.copy_(low @ b.to(x.dtype).t())
            else:
                torch.mm(low, b.to(x.dtype).t(), out=part)
            lows.append(low)
        ctx.rows, ctx.dropout, ctx.count = rows, dropout, len(factors)
        whole_too = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, kept, seen, whole_too, *factors, *lows)
        if inside:
            _add_base(out, x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        weight, kept, seen, whole, *rest = ctx.saved_tensors
        factors, lows = rest[: ctx.count], rest[ctx.count :]
        gx = g @ plain(weight, g.dtype) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for (start, scaling), a, b, low in zip(
            ctx.rows, factors[::2], factors[1::2], lows, strict=True
        ):
            part = g[:, start : start + len(b)]
            inner = (part @ b.to(g.dtype)) * scaling
            if gx is not None:
                _add(gx, inner, a.to(g.dtype), kept, ctx.dropout)
            found += [(inner.t() @ seen).to(a.dtype), (part.t() @ low).to(b.dtype)]
        gweight = None if whole is None else g.t() @ whole
        return gx, gweight, None, None, None, *found


def _kept(x: Tensor, dropout: float) -> Tensor | None:
    return torch.rand_like(x, dtype=torch.float32) >= dropout if dropout else None


def _add(gx: Tensor, inner: Tensor, a: Tensor, kept: Tensor | None, dropout: float) -> None:
    """Add the gradient that an adapter passes to its input."""
    if kept is None:
        gx.addmm_(inner, a)
    else:
        gx.add_((inner @ a).mul_(kept), alpha=1 / (1 - dropout))
