"""Adapters on some parts of a layer that fuses several, such as q and v of ``qkv_proj``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phi3_plugin.models.lora import Linear, LowRank, linear


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
        out = linear(x, self.weight)
        adapters = {name: getattr(self, name) for name in self.adapters}
        active = {name: adapter for name, adapter in adapters.items() if not adapter.disabled}
        if not active:
            return out
        # Converted once: fp32 adapters over a bf16 base would each keep a copy.
        low = self.dropout(x.to(next(iter(active.values())).lora_a.weight.dtype))
        pieces = zip(self.rows, out.split(list(self.rows.values()), dim=-1), strict=True)
        added = [piece + active[name](low) if name in active else piece for name, piece in pieces]
        return torch.cat(added, dim=-1).to(out.dtype)
