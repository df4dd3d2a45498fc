"""Adapters on some parts of a layer that fuses several, such as q and v of ``qkv_proj``."""

from collections.abc import Mapping

from torch import Tensor, nn

from phi3_plugin.models.lora import Linear, LowRank, linear, probability
from phi3_plugin.models.lora_linear import Adapter, lora_linear


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
