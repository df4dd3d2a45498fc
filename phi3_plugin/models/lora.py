"""The linear layers of the model: frozen, and frozen with a low-rank adapter."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear as TorchtuneLoRALinear

from phi3_plugin.errors import AdapterError

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of one Phi-3 block, under Hugging Face's names."""

MLP_TARGETS = TARGETS[2:]

SPLIT_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("output_proj", "out_proj"), "o_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    "w2": "down_proj",
}
"""Names people know from other models, and the fused layer that holds them here."""


class Linear(nn.Linear):
    """A bias-free linear layer that starts at zero, since a checkpoint follows.

    Drawing 3.8 billion random numbers that are overwritten at once would take minutes on a CPU.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        """Allocate the weight ``[out_dim, in_dim]``."""
        super().__init__(in_dim, out_dim, bias=False)

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        nn.init.zeros_(self.weight)


class LoRALinear(TorchtuneLoRALinear):  # type: ignore[misc]
    """``W x + (alpha / rank) B A dropout(x)`` with W frozen, B zero and A Kaiming at the start.

    A subclass of torchtune's, because its recipes initialize nothing else; the base weight
    starts at zero as in `Linear`.

    Source: Hu et al. 2021, LoRA, section 4.1.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        """Allocate the base weight and the adapter.

        Args:
            in_dim: Width of the input.
            out_dim: Width of the output.
            rank: Inner width of the adapter.
            alpha: Numerator of its scale.
            dropout: Probability with which an input of the adapter is zeroed in training.
        """
        nn.Module.__init__(self)  # torchtune's own draws random base weights
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.use_bias = self.disabled = self.merged = self._quantize_base = False
        self.weight = nn.Parameter(torch.zeros(out_dim, in_dim))
        self.register_parameter("bias", None)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = Linear(in_dim, rank)
        self.lora_b = Linear(rank, out_dim)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw A and zero B: the adapter starts as the identity."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in_dim]`` to ``[..., out_dim]``."""
        out = F.linear(x, self.weight)
        if self.disabled:
            return out
        low: Tensor = self.lora_b(self.lora_a(self.dropout(x)))
        return out + low * (self.alpha / self.rank)


def check_lora(
    targets: list[str], apply_lora_to_mlp: bool, rank: int, alpha: float, dropout: float
) -> None:
    """Check the adapter settings of a recipe, with the keys as its YAML spells them.

    Raises:
        AdapterError: All that is wrong, one line each.
    """
    problems = [_unknown_target(name) for name in targets if name not in TARGETS]
    if not targets:
        problems.append(f"lora_attn_modules: empty, so nothing is trained. {_available()}")
    in_mlp = any(name in MLP_TARGETS for name in targets)
    if not problems and in_mlp != bool(apply_lora_to_mlp):
        problems.append(
            f"apply_lora_to_mlp: {apply_lora_to_mlp} disagrees with lora_attn_modules {targets}. "
            f"Set it to {in_mlp}, or {'drop' if in_mlp else 'add'} {' and '.join(MLP_TARGETS)}."
        )
    if not _is_whole(rank):
        problems.append(f"lora_rank: {rank!r} must be a whole number above 0.")
    if not _is_whole(alpha):
        problems.append(
            f"lora_alpha: {alpha!r} must be a whole number above 0, since ollama and others "
            "read it as an integer."
        )
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout: {dropout!r} must be at least 0 and below 1.")
    if problems:
        raise AdapterError("\n".join(problems))


def _unknown_target(name: str) -> str:
    if name in SPLIT_NAMES:
        return (
            f"lora_attn_modules: {name!r} is not a layer of Phi-3, which fuses it into "
            f"{SPLIT_NAMES[name]!r}. Use that. {_available()}"
        )
    return f"lora_attn_modules: {name!r} matches no linear layer of a block. {_available()}"


def _available() -> str:
    return f"Available: {', '.join(TARGETS)}."


def _is_whole(value: object) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value > 0  # type: ignore[operator]
