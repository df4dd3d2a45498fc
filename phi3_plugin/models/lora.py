"""Linear layers with low-rank adapters, and without."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear as TorchtuneDoRALinear
from torchtune.modules.peft import LoRALinear as TorchtuneLoRALinear
from typing_extensions import Self

from phi3_plugin.models.nf4 import is_nf4, nf4_linear, nf4_zeros, plain

# A frozen linear map and its adapters as one operation, with its own backward pass.
#
# Autograd would keep the output of every factor and pass over the wide outputs again for the scale
# and for each sum. Here the input and what is as narrow as the rank are kept, the frozen weight has
# no gradient, and both products are added into one output, in either direction.


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


# The linear layers of the model: frozen, and frozen with a low-rank adapter.


class Linear(nn.Module):
    """A frozen, bias-free linear layer that starts at zero, since a checkpoint follows.

    Drawing 3.8 billion random numbers that are overwritten at once would take minutes on a CPU.
    """

    def __init__(self, in_dim: int, out_dim: int, quantize: bool = False) -> None:
        """Allocate the weight ``[out_dim, in_dim]``.

        Args:
            in_dim: Width of the input.
            out_dim: Width of the output.
            quantize: Store it in NF4.
        """
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        self.weight = zeros(out_dim, in_dim, quantize)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        return linear(x, self.weight)


class LowRank(TorchtuneLoRALinear):  # type: ignore[misc]
    """An adapter alone: ``(alpha / rank) B A dropout(x)``, B zero and A drawn at the start.

    A subclass of torchtune's, because its recipes initialize nothing else.

    Source: Hu et al. 2021, LoRA, section 4.1; Kalajdzievski 2023, rsLoRA, section 3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        init: str = "kaiming",
    ) -> None:
        """Allocate A ``[rank, in_dim]`` and B ``[out_dim, rank]``.

        Args:
            in_dim: Width of the input.
            out_dim: Width of the output.
            rank: Inner width.
            alpha: Numerator of the scale.
            dropout: Probability with which an input is zeroed in training.
            use_rslora: Scale by alpha / sqrt(rank) instead.
            init: One of :data:`phi3_plugin.models.lora_settings.INITS`. What splits the base weight is
                drawn like kaiming until :mod:`phi3_plugin.train.start` has that weight.
        """
        nn.Module.__init__(self)  # torchtune's own draws random base weights
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.use_rslora, self.init = use_rslora, init
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.use_bias = self.disabled = self.merged = False
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw A and zero B: the adapter starts as the identity."""
        draw(self.lora_a.weight, self.init)
        nn.init.zeros_(self.lora_b.weight)

    def adapter(self, start: int = 0) -> Adapter:
        """Return the factors, for rows of a weight from ``start`` on."""
        return Adapter(start, self.scaling, self.lora_a.weight, self.lora_b.weight)


class LoRALinear(LowRank):
    """``W x + (alpha / rank) B A dropout(x)`` with W frozen; it starts at zero as in `Linear`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        quantize_base: bool = False,
        **how: Any,
    ) -> None:
        """Allocate the base weight and the adapter.

        Args:
            in_dim: Width of the input.
            out_dim: Width of the output.
            rank: Inner width of the adapter.
            alpha: Numerator of its scale.
            dropout: Probability with which an input of the adapter is zeroed in training.
            quantize_base: Store the base weight in NF4.
            **how: ``use_rslora`` and ``init``, see `LowRank`.
        """
        super().__init__(in_dim, out_dim, rank, alpha, dropout, **how)
        self._quantize_base = quantize_base
        self.weight = zeros(out_dim, in_dim, quantize_base)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        if self.disabled:
            return linear(x, self.weight)
        return lora_linear(x, self.weight, [self.adapter()], probability(self.dropout))


class DoRALinear(LoRALinear, TorchtuneDoRALinear):  # type: ignore[misc]
    """LoRA whose rows are rescaled to a trained magnitude: ``m V / ||V||``, V = W + s B A.

    The norm is a constant in the backward pass, as in PEFT.

    Source: Liu et al. 2024, DoRA, sections 4.1 and 4.3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        quantize_base: bool = False,
        **how: Any,
    ) -> None:
        """Allocate base weight, adapter and magnitude; see `LoRALinear`.

        Recipes call ``initialize_dora_magnitude`` once the base weight is loaded.
        """
        super().__init__(in_dim, out_dim, rank, alpha, dropout, quantize_base, **how)
        self.magnitude = nn.Parameter(torch.zeros(out_dim))

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Allocate the adapter, magnitude included, on a device."""
        return TorchtuneDoRALinear.to_empty(self, device=device, recurse=recurse)  # type: ignore[no-any-return]

    def initialize_parameters(self) -> None:
        """Start as the identity; a magnitude of zero is one that is not set yet."""
        super().initialize_parameters()
        if "magnitude" in self._parameters:
            nn.init.zeros_(self.magnitude)

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Set the magnitude to the norms of the rows, once base weight and adapter are there.

        A magnitude that was loaded is left alone: on resume torchtune's distributed recipe asks
        for this after it has restored the adapter. Rows are computed where they lie, since an
        NF4 weight that is sharded can only be dequantized locally.
        """
        magnitude, base = local_rows(self.magnitude), local_rows(self.weight)
        if magnitude.any():
            return
        a = self.lora_a.weight
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        magnitude.copy_(row_norms(base, a, local_rows(self.lora_b.weight), self.scaling))

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["lora_a.weight", "lora_b.weight", "magnitude"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        out = super().forward(x)
        if self.disabled:
            return out
        factors = self.lora_a.weight, self.lora_b.weight
        stretch = self.magnitude / row_norms(self.weight, *factors, self.scaling)
        stretched: Tensor = (stretch * out).to(out.dtype)
        return stretched


def draw(lora_a: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fill A ``[rank, in_dim]`` with random numbers, in place.

    Source: PEFT 0.21 ``reset_lora_parameters``.
    """
    if init == "gaussian":
        return nn.init.normal_(lora_a, std=1 / lora_a.shape[0], generator=generator)
    return nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)


def probability(dropout: nn.Module) -> float:
    """Return with which probability a module drops its input now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of ``W + s B A``, without making that matrix.

    Args:
        weight: W ``[out, in]``, plain or NF4.
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scaling: s.

    Returns:
        ``[out]`` in the precision of the factors.
    """
    base, b = plain(weight, weight.dtype), b.float() * scaling
    squares: Tensor = torch.linalg.vector_norm(base, dim=1, dtype=torch.float32).square_()
    squares += 2 * ((base @ a.to(base.dtype).t()) * b).sum(dim=1)
    squares += ((b @ (a.float() @ a.float().t())) * b).sum(dim=1)
    return squares.clamp_(min=0).sqrt_().to(a.dtype)


def local_rows(weight: Tensor) -> Tensor:
    """Return the rows that this process holds."""
    rows: Tensor = getattr(weight, "_local_tensor", weight)
    return rows


def zeros(out_dim: int, in_dim: int, quantize: bool) -> nn.Parameter:
    """Return a weight of zeros, in NF4 if asked for."""
    return nf4_zeros(out_dim, in_dim) if quantize else nn.Parameter(torch.zeros(out_dim, in_dim))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map ``x [..., in]`` to ``[..., out]`` by a plain or an NF4 weight."""
    return nf4_linear(x, weight) if is_nf4(weight) else F.linear(x, weight)


# Adapters on some parts of a layer that fuses several, such as q and v of ``qkv_proj``.


class MergedLoRALinear(Linear):
    """A frozen linear layer whose rows are parts, some of which have an adapter of their own.

    On q and v of ``qkv_proj``, with scale s::

        q: W_q x + s B_q A_q d(x)      k: W_k x      v: W_v x + s B_v A_v d(x)

    All see the same dropout d. An adapter is a submodule with its part's name,
    ``q_proj.lora_a.weight``: torchtune's recipes check that a trained parameter is named after a
    member of ``lora_attn_modules``.

    Source: loralib 0.1.2 ``MergedLinear``, whose parts are of equal size.
    """

    def __init__(
        self,
        in_dim: int,
        rows: Mapping[str, int],
        adapters: Mapping[str, LowRank],
        dropout: float = 0.0,
        quantize_base: bool = False,
    ) -> None:
        """Allocate the base weight and the adapters.

        Args:
            in_dim: Width of the input.
            rows: Every part and how many rows of the weight it has, from the first row on.
            adapters: By part, for those that have one; without a dropout of their own.
            dropout: Probability with which an input of the adapters is zeroed in training.
            quantize_base: Store the base weight in NF4.
        """
        super().__init__(in_dim, sum(rows.values()), quantize_base)
        self.rows = dict(rows)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.adapters = [name for name in rows if name in adapters]
        for name in self.adapters:
            self.add_module(name, adapters[name])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., rows of all parts]``."""
        active = self.active()
        if not active:
            return linear(x, self.weight)
        return lora_linear(x, self.weight, active, probability(self.dropout))

    def active(self) -> list[Adapter]:
        """Return the adapters that are not disabled, each for the rows of its part."""
        active, start = [], 0
        for name, count in self.rows.items():
            module = getattr(self, name, None)
            if module is not None and not module.disabled:
                active.append(module.adapter(start))
            start += count
        return active


# Embedding and head beyond plain ones: trained whole, and the embedding with an adapter.


# Shapes: B batch, S sequence, D model, V vocabulary, R rank
class Embedding(nn.Embedding):
    """A frozen embedding that starts at zero, since a checkpoint follows."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        """Allocate the weight ``[V, D]``."""
        super().__init__(vocabulary, dim, _weight=torch.zeros(vocabulary, dim))


class WholeEmbedding(Embedding):
    """An embedding that is trained whole beside adapters, in their precision."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        """Allocate the weight ``[V, D]``."""
        super().__init__(vocabulary, dim)
        self._dtype = self.weight.dtype

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["weight"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens [B, S]`` to ``[B, S, D]``, in the dtype of the other layers."""
        return super().forward(tokens).to(self._dtype)


class WholeLinear(Linear):
    """A linear layer that is trained whole beside adapters, in their precision."""

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``, in the dtype of the weight."""
        return F.linear(x.to(self.weight.dtype), self.weight)


class LoRAEmbedding(Embedding):
    """``W[t] + scale A[:, t]^T B^T`` for a token t; A starts at zero and B is drawn.

    Source: loralib 0.1.2 ``Embedding``.
    """

    def __init__(
        self, vocabulary: int, dim: int, rank: int, alpha: float, *, use_rslora: bool = False
    ) -> None:
        """Allocate the weight ``[V, D]`` and the adapter: A ``[R, V]``, B ``[D, R]``.

        Args:
            vocabulary: V.
            dim: D.
            rank: R.
            alpha: Numerator of the scale.
            use_rslora: Divide it by sqrt(rank) instead of rank.
        """
        super().__init__(vocabulary, dim)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.disabled = False
        self.lora_a = nn.Linear(vocabulary, rank, bias=False)
        self.lora_b = nn.Linear(rank, dim, bias=False)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Zero A and draw B: the adapter starts as the identity."""
        nn.init.zeros_(self.lora_a.weight)
        nn.init.normal_(self.lora_b.weight)

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens [B, S]`` to ``[B, S, D]``."""
        out = super().forward(tokens)
        if self.disabled:
            return out
        low: Tensor = self.lora_b(F.embedding(tokens, self.lora_a.weight.T)) * self.scaling
        return (out + low).to(out.dtype)
