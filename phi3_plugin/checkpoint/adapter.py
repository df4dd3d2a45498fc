"""An adapter as it computes, whatever file it came from or goes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from typing_extensions import Self

A, B, MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".magnitude"
"""How the tensors of a module end."""

# Shapes: R rank, which may differ from module to module


@dataclass(frozen=True)
class Adapter:
    """Adds ``scale B A x`` to what each module computes; with a magnitude, as DoRA does.

    Modules have our names: ``layers.3.attn.qkv_proj``, a part of it as
    ``layers.3.attn.qkv_proj.q_proj``, ``tok_embeddings``, ``output``.
    """

    tensors: Mapping[str, Tensor]
    """``lora_a.weight [R, in]``, ``lora_b.weight [out, R]`` and for DoRA ``magnitude [out]`` of
    each module; of the embedding ``[R, V]`` and ``[D, R]``: ``(B A)^T`` is added to its rows."""
    scales: Mapping[str, float]
    """Of each module, what B A is multiplied with: alpha / R, or alpha / sqrt(R) for rsLoRA."""
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights that are trained whole, PEFT's ``modules_to_save``, such as ``output.weight``."""
    dropout: float = 0.0
    """What the adapter was trained with."""
    base: str = ""
    """Repository or folder of the base model, if the file says."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the file says of how the adapter was before it was written, if it is one of ours."""
    base_hash: str = ""
    """Of the weights it was made for, if the file says."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], scale: float, **more: Any) -> Self:
        """Sort the trained tensors of a model whose modules share one scale.

        Args:
            values: Our names; what is no part of a low-rank adapter was trained whole.
            scale: alpha / R.
            more: Other fields.
        """
        tensors = {n: v for n, v in values.items() if n.endswith((A, B, MAGNITUDE))}
        saved = {name: value for name, value in values.items() if name not in tensors}
        scales = {name.removesuffix(A): scale for name in tensors if name.endswith(A)}
        return cls(tensors, scales, saved, **more)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {m.removesuffix(A): t.shape[0] for m, t in self.tensors.items() if m.endswith(A)}

    @property
    def is_dora(self) -> bool:
        """Whether a module has a magnitude."""
        return any(name.endswith(MAGNITUDE) for name in self.tensors)
