"""Embedding and head beyond plain ones: trained whole, and the embedding with an adapter."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phi3_plugin.models.lora import Linear


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
