"""The linear layers of the model: frozen, and frozen with a low-rank adapter."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear as TorchtuneDoRALinear
from torchtune.modules.peft import LoRALinear as TorchtuneLoRALinear
from typing_extensions import Self

from phi3_plugin.models.lora_linear import Adapter, lora_linear
from phi3_plugin.models.nf4 import is_nf4, nf4_zeros
from phi3_plugin.models.nf4_product import nf4_linear, plain


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
            init: One of :data:`phi3_plugin.models.checks.INITS`. What splits the base weight is
                drawn like kaiming until :mod:`phi3_plugin.models.start` has that weight.
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
