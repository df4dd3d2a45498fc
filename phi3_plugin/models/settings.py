"""The adapter settings of a recipe, and the layers that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.checks import problems
from phi3_plugin.models.lora import DoRALinear, Linear, LoRALinear, LowRank
from phi3_plugin.models.merged import MergedLoRALinear
from phi3_plugin.models.targets import ALIASES, EMBEDDING, HEAD, PARTS, place
from phi3_plugin.models.whole import Embedding, LoRAEmbedding, WholeEmbedding, WholeLinear


@dataclass(frozen=True)
class LoRASettings:
    """The adapter settings of a recipe, with the keys as its YAML spells them.

    Raises:
        AdapterError: Something is wrong; all problems, one line each.
    """

    lora_attn_modules: Sequence[str]
    """Any of `TARGETS`, or of their `PARTS`: an adapter on a part leaves the other rows alone."""
    apply_lora_to_mlp: bool
    """Must say whether the list holds one of `MLP_TARGETS` or a part of one."""
    apply_lora_to_output: bool
    """An adapter on the head as well."""
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    use_dora: bool
    quantize_base: bool
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    rank_pattern: Mapping[str, int] | None = None
    """Ranks that differ, by target (``o_proj``) or by layer and target (``3.o_proj``)."""
    alpha_pattern: Mapping[str, float] | None = None
    """Alphas that differ, likewise."""
    layers_to_transform: Sequence[int] | None = None
    """Layers with adapters; None is all."""
    lora_init: str = "kaiming"
    """One of `INITS`."""
    apply_lora_to_embedding: bool = False
    """An adapter on the embedding as well."""
    modules_to_save: Sequence[str] | None = None
    """Head and embedding, under either name: trained whole instead of by an adapter."""

    def __post_init__(self) -> None:
        """Check everything at once."""
        if found := problems(self):
            raise AdapterError("\n".join(found))

    def make(self, name: str, in_dim: int, out_dim: int) -> nn.Module:
        """Return the layer of this name, with an adapter if it or a part of it is a target.

        Args:
            name: As in the patterns: ``3.qkv_proj``, or ``lm_head``.
            in_dim: Width of the input.
            out_dim: Width of the output.
        """
        layer, target = place(name)
        quantize = self.quantize_base and target != HEAD
        if target in self.whole:
            return WholeLinear(in_dim, out_dim)
        if layer is not None and layer not in (self.layers_to_transform or [layer]):
            return Linear(in_dim, out_dim, quantize)
        if target in self.lora_attn_modules or (target == HEAD and self.apply_lora_to_output):
            kind = DoRALinear if self.use_dora else LoRALinear
            numbers = self._numbers(layer, target)
            how = self._how(quantize)
            return kind(in_dim, out_dim, *numbers, self.lora_dropout, quantize, **how)
        if any(part in self.lora_attn_modules for part in PARTS.get(target, ())):
            return self._merged(layer, target, in_dim, out_dim)
        return Linear(in_dim, out_dim, quantize)

    def make_embedding(self, vocabulary: int, dim: int) -> nn.Embedding:
        """Return the embedding, with an adapter or trained whole if that is asked for."""
        if self.apply_lora_to_embedding:
            numbers = self._numbers(None, EMBEDDING)
            return LoRAEmbedding(vocabulary, dim, *numbers, use_rslora=self.use_rslora)
        return (WholeEmbedding if EMBEDDING in self.whole else Embedding)(vocabulary, dim)

    @property
    def whole(self) -> set[str]:
        """What is trained whole, under Hugging Face's names."""
        return {ALIASES.get(name, name) for name in self.modules_to_save or ()}

    def _merged(self, layer: int | None, fused: str, in_dim: int, out_dim: int) -> nn.Module:
        rows, how = _part_rows(fused, in_dim, out_dim), self._how(self.quantize_base)
        adapters = {
            part: LowRank(in_dim, count, *self._numbers(layer, part), **how)
            for part, count in rows.items()
            if part in self.lora_attn_modules
        }
        return MergedLoRALinear(in_dim, rows, adapters, self.lora_dropout, self.quantize_base)

    def _how(self, quantize: bool) -> dict[str, Any]:
        # A head that is not quantized has no error for LoftQ to make up for.
        init = "kaiming" if self.lora_init == "loftq" and not quantize else self.lora_init
        return {"use_rslora": self.use_rslora, "init": init}

    def _numbers(self, layer: int | None, target: str) -> tuple[int, float]:
        """Return rank and alpha; a key with the layer's number comes before one without."""
        rank, alpha = int(self.lora_rank), float(self.lora_alpha)
        for where in ((None, target), (layer, target)):
            rank = int(_at(where, self.rank_pattern, rank))
            alpha = float(_at(where, self.alpha_pattern, alpha))
        return rank, int(alpha) if alpha.is_integer() else alpha


def _at(where: tuple[int | None, str], pattern: Mapping[str, float] | None, other: float) -> float:
    return next((v for key, v in (pattern or {}).items() if place(key) == where), other)


def _part_rows(fused: str, in_dim: int, out_dim: int) -> dict[str, int]:
    """Return how many rows each part has; all query heads together are as wide as the model."""
    first = in_dim if fused == "qkv_proj" else out_dim // 2
    others = PARTS[fused][1:]
    return {PARTS[fused][0]: first, **dict.fromkeys(others, (out_dim - first) // len(others))}
