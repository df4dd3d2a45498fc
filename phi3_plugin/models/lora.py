"""Linear layers and embeddings with low-rank adapters, and without.

An adapter adds ``scaling B A dropout(x)`` to what a frozen weight gives. It is on all rows of the
weight, or on those of one part of a layer that fuses several, such as q and v of ``qkv_proj``.
"""

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


# Shapes: N tokens, I input, O output, R rank, B batch, S sequence, D model, V vocabulary
class Update(NamedTuple):
    """What an adapter adds to consecutive rows of a weight: ``scaling B A``."""

    start: int
    """First of the rows; B says how many there are."""
    scaling: float
    a: Tensor
    """``[R, I]``."""
    b: Tensor
    """``[rows, R]``."""


def lora_linear(
    x: Tensor, weight: Tensor, updates: Sequence[Update], dropout: float = 0.0
) -> Tensor:
    """Return ``W x`` with ``scaling B A dropout(x)`` added to the rows of each update.

    Factors in another precision than the input's are rounded to it for the products; their
    gradients have their own.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``, plain or NF4; usually frozen.
        updates: For rows that do not overlap; all see the same dropout.
        dropout: Probability with which an input of the updates is zeroed.

    Returns:
        ``[..., O]`` in the dtype of ``x``.
    """
    if not updates:
        return linear(x, weight)
    rows = tuple((update.start, update.scaling) for update in updates)
    factors = [factor for update in updates for factor in (update.a, update.b)]
    compiling = torch.compiler.is_compiling()  # asked once: a graph break would change the answer
    out: Tensor = _LoRALinear.apply(x, weight, rows, dropout, compiling, *factors)  # type: ignore[no-untyped-call]
    if not compiling:
        # After, not in the operation: torch.utils.checkpoint stops recomputing as soon as what is
        # kept is there, so that a layer's last and largest product is not computed twice.
        _add_base(out.detach().flatten(0, -2), x.detach().flatten(0, -2), weight)
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map ``x [..., I]`` to ``[..., O]`` by a plain or an NF4 weight."""
    return nf4_linear(x, weight) if is_nf4(weight) else F.linear(x, weight)


def _add_base(out: Tensor, x: Tensor, weight: Tensor) -> None:
    out.addmm_(x, plain(weight, x.dtype).t())


class _LoRALinear(torch.autograd.Function):
    """Both products in one operation, with its own backward pass.

    Autograd would keep the output of every factor and pass over the wide outputs again for the
    scale and for each sum. Here the input and what is as narrow as the rank are kept, the frozen
    weight has no gradient, and both products are added into one output, in either direction.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # Named one by one, torch's compiler would take two factors for a function without a context
        x, weight, rows, dropout, compiling, *factors = inputs
        # Made as it is returned: who writes to a view in place, as RoPE does, pays for copies
        whole = len(rows) == 1 and len(factors[1]) == len(weight)
        result: Tensor = (x.new_empty if whole else x.new_zeros)(*x.shape[:-1], len(weight))
        ctx.shape = x.shape
        x, out = x.flatten(0, -2), result.flatten(0, -2)
        kept = keep_mask(x, dropout)
        seen = x if kept is None else x * kept / (1 - dropout)
        lows = []
        for (start, scaling), a, b in zip(rows, factors[::2], factors[1::2], strict=True):
            low = (seen @ a.to(x.dtype).t()) * scaling
            part = out[:, start : start + len(b)]
            if compiling:  # the compiler takes no strided out=
                part.copy_(low @ b.to(x.dtype).t())
            else:
                torch.mm(low, b.to(x.dtype).t(), out=part)
            lows.append(low)
        ctx.rows = rows
        ctx.dropout = dropout
        ctx.count = len(factors)
        for_weight = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, kept, seen, for_weight, *factors, *lows)
        if compiling:
            _add_base(out, x, weight)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0].flatten(0, -2)
        weight, kept, seen, for_weight, *rest = ctx.saved_tensors
        factors, lows = rest[: ctx.count], rest[ctx.count :]
        gx = g @ plain(weight, g.dtype) if ctx.needs_input_grad[0] else None
        gfactors: list[Tensor | None] = []
        for (start, scaling), a, b, low in zip(
            ctx.rows, factors[::2], factors[1::2], lows, strict=True
        ):
            part = g[:, start : start + len(b)]
            inner = (part @ b.to(g.dtype)) * scaling
            if gx is not None and kept is None:
                gx.addmm_(inner, a.to(g.dtype))
            elif gx is not None:
                gx.add_((inner @ a.to(g.dtype)).mul_(kept), alpha=1 / (1 - ctx.dropout))
            gfactors += [(inner.t() @ seen).to(a.dtype), (part.t() @ low).to(b.dtype)]
        gweight = None if for_weight is None else g.t() @ for_weight
        gx = None if gx is None else gx.view(ctx.shape)
        return gx, gweight, None, None, None, *gfactors


def keep_mask(x: Tensor, dropout: float) -> Tensor | None:
    """Draw which inputs an adapter sees; None is all."""
    return torch.rand_like(x, dtype=torch.float32) >= dropout if dropout else None


class Linear(nn.Linear):
    """A frozen, bias-free linear layer that starts at zero, since a checkpoint follows.

    Drawing 3.8 billion random numbers that are overwritten at once would take minutes on a CPU.
    It is torch's, because torchao's quantizers replace nothing else.
    """

    def __init__(self, in_dim: int, out_dim: int, quantize: bool = False) -> None:
        """Allocate the weight ``[out_dim, in_dim]``, in NF4 if asked for."""
        nn.Module.__init__(self)  # torch's own draws
        self.in_features = in_dim
        self.out_features = out_dim
        self.weight = _frozen_weight(out_dim, in_dim, quantize)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        return linear(x, self.weight)


def _frozen_weight(out_dim: int, in_dim: int, quantize: bool) -> nn.Parameter:
    return nf4_zeros(out_dim, in_dim) if quantize else nn.Parameter(torch.zeros(out_dim, in_dim))


class LowRank(TorchtuneLoRALinear):  # type: ignore[misc]
    """An adapter alone: ``(alpha / rank) B A dropout(x)``, B zero and A drawn at the start.

    A subclass of torchtune's, because its recipes initialize nothing else. It is not called by
    itself: who holds it adds its :meth:`updates` to the rows of a weight.

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
            init: One of `phi3_plugin.models.lora_settings.INITS`. What splits the base weight is
                drawn like kaiming until :mod:`phi3_plugin.train.start` has that weight.
        """
        nn.Module.__init__(self)  # torchtune's own draws random base weights
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.init = init
        self.scaling = scale_of(rank, alpha, use_rslora)
        self.disabled = False
        self.use_bias = self.merged = False  # torchtune asks
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw A and zero B: the adapter starts as the identity."""
        draw(self.lora_a.weight, self.init)
        nn.init.zeros_(self.lora_b.weight)

    def updates(self, start: int = 0) -> list[Update]:
        """Return what is added to rows of a weight from ``start`` on; nothing when disabled."""
        factors = self.lora_a.weight, self.lora_b.weight
        return [] if self.disabled else [Update(start, self.scaling, *factors)]


class LoRALinear(LowRank):
    """``W x + (alpha / rank) B A dropout(x)`` with W frozen; it starts at zero as in `Linear`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        quantize_base: bool = False,
        **options: Any,
    ) -> None:
        """Allocate the base weight, in NF4 if asked for, and the adapter; see `LowRank`."""
        super().__init__(in_dim, out_dim, rank, alpha, dropout, **options)
        self._quantize_base = quantize_base  # torchtune asks
        self.weight = _frozen_weight(out_dim, in_dim, quantize_base)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        return lora_linear(x, self.weight, self.updates(), probability(self.dropout))


@torch.no_grad()
def dora_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of ``W + s B A``, without making that matrix.

    Args:
        weight: W ``[O, I]``, plain or NF4.
        a: ``[R, I]``.
        b: ``[O, R]``.
        scaling: s.

    Returns:
        ``[O]`` in the precision of the factors.
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


class DoRALinear(LoRALinear, TorchtuneDoRALinear):  # type: ignore[misc]
    """LoRA whose rows are rescaled to a trained magnitude: ``m V / ||V||``, V = W + s B A.

    The norm is a constant in the backward pass, as in PEFT. Recipes call
    ``initialize_dora_magnitude`` once the base weight is loaded.

    Source: Liu et al. 2024, DoRA, sections 4.1 and 4.3.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, *args: Any, **options: Any
    ) -> None:
        """Allocate base weight, adapter and magnitude ``[out_dim]``; see `LoRALinear`."""
        super().__init__(in_dim, out_dim, rank, alpha, *args, **options)
        self.magnitude = nn.Parameter(torch.zeros(out_dim))

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Allocate the adapter, magnitude included; `LoRALinear`'s would come first."""
        return TorchtuneDoRALinear.to_empty(self, device=device, recurse=recurse)  # type: ignore[no-any-return]

    def initialize_parameters(self) -> None:
        """Start as the identity; a magnitude of zero is one that is not set yet."""
        super().initialize_parameters()
        if "magnitude" in self._parameters:  # not yet, when the adapter's constructor asks
            nn.init.zeros_(self.magnitude)

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Set the magnitude to the norms of the rows, once base weight and adapter are there.

        A magnitude that was loaded is left alone: on resume torchtune's distributed recipe asks
        for this after it has restored the adapter. Rows are computed where they lie, since an
        NF4 weight that is sharded can only be dequantized locally.
        """
        magnitude = local_rows(self.magnitude)
        if magnitude.any():
            return
        a = self.lora_a.weight
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        factors = a, local_rows(self.lora_b.weight)
        magnitude.copy_(dora_norms(local_rows(self.weight), *factors, self.scaling))

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["lora_a.weight", "lora_b.weight", "magnitude"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        out = super().forward(x)
        if self.disabled:
            return out
        return (self.stretch() * out).to(out.dtype)

    def stretch(self) -> Tensor:
        """Return what each row is multiplied with, ``[out_dim]``."""
        factors = self.lora_a.weight, self.lora_b.weight
        return self.magnitude / dora_norms(self.weight, *factors, self.scaling)


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
        """Allocate the base weight and take the adapters.

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
        return lora_linear(x, self.weight, self.updates(), probability(self.dropout))

    def updates(self) -> list[Update]:
        """Return what the adapters add, each to the rows of its part."""
        updates, start = list[Update](), 0
        for name, count in self.rows.items():
            if name in self.adapters:
                updates += getattr(self, name).updates(start)
            start += count
        return updates


class WholeLinear(Linear):
    """A linear layer that is trained whole beside adapters, in their precision."""

    def adapter_params(self) -> list[str]:
        """Name the parameters that are trained."""
        return ["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``, in the dtype of the weight."""
        return F.linear(x.to(self.weight.dtype), self.weight)


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


class LoRAEmbedding(Embedding):
    """``W[t] + scale A[:, t]^T B^T`` for a token t; A starts at zero and B is drawn.

    Source: loralib 0.1.2 ``Embedding``.
    """

    def __init__(
        self, vocabulary: int, dim: int, rank: int, alpha: float, *, use_rslora: bool = False
    ) -> None:
        """Allocate the weight ``[V, D]`` and the adapter, A ``[R, V]`` and B ``[D, R]``."""
        super().__init__(vocabulary, dim)
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.scaling = scale_of(rank, alpha, use_rslora)
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


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """Return what B A is multiplied with."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def draw(lora_a: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fill A ``[R, I]`` with random numbers, in place.

    Source: PEFT 0.21 ``reset_lora_parameters``.
    """
    if init == "gaussian":
        return nn.init.normal_(lora_a, std=1 / lora_a.shape[0], generator=generator)
    return nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)


def probability(dropout: nn.Module) -> float:
    """Return with which probability a module drops its input now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
