"""Which linear layers get an adapter, and how a recipe says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.lora import DoRALinear, Linear, LoRALinear

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of one Phi-3 block, under Hugging Face's names."""

MLP_TARGETS = TARGETS[2:]

HEAD = "lm_head"

SPLIT_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("output_proj", "out_proj"), "o_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    "w2": "down_proj",
}
"""Names people know from other models, and the fused layer that holds them here."""


@dataclass(frozen=True)
class LoRASettings:
    """The adapter settings of a recipe, with the keys as its YAML spells them.

    Raises:
        AdapterError: Something is wrong; all problems, one line each.
    """

    lora_attn_modules: Sequence[str]
    """Any of `TARGETS`."""
    apply_lora_to_mlp: bool
    """Must say whether the list holds one of `MLP_TARGETS`."""
    apply_lora_to_output: bool
    """An adapter on the head as well."""
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    use_dora: bool
    quantize_base: bool

    def __post_init__(self) -> None:
        """Check everything at once."""
        if problems := [*self._wrong_targets(), *self._wrong_numbers()]:
            raise AdapterError("\n".join(problems))

    def make(self, name: str, in_dim: int, out_dim: int) -> nn.Module:
        """Return the layer of this name, with an adapter if it is a target."""
        quantize = self.quantize_base and name != HEAD
        if name in self.lora_attn_modules or (name == HEAD and self.apply_lora_to_output):
            kind = DoRALinear if self.use_dora else LoRALinear
            scale = self.lora_rank, int(self.lora_alpha)
            return kind(in_dim, out_dim, *scale, self.lora_dropout, quantize)
        return Linear(in_dim, out_dim, quantize)

    def _wrong_targets(self) -> list[str]:
        targets = list(self.lora_attn_modules)
        problems = [_unknown_target(name) for name in targets if name not in TARGETS]
        if not targets and not self.apply_lora_to_output:
            problems.append(f"lora_attn_modules: empty, so nothing is trained. {_available()}")
        in_mlp = any(name in MLP_TARGETS for name in targets)
        if not problems and in_mlp != bool(self.apply_lora_to_mlp):
            problems.append(
                f"apply_lora_to_mlp: {self.apply_lora_to_mlp} disagrees with lora_attn_modules "
                f"{targets}. Set it to {in_mlp}, or {'drop' if in_mlp else 'add'} "
                f"{' and '.join(MLP_TARGETS)}."
            )
        return problems

    def _wrong_numbers(self) -> list[str]:
        problems = []
        if not _is_whole(self.lora_rank):
            problems.append(f"lora_rank: {self.lora_rank!r} must be a whole number above 0.")
        if not _is_whole(self.lora_alpha):
            problems.append(
                f"lora_alpha: {self.lora_alpha!r} must be a whole number above 0, since ollama "
                "and others read it as an integer."
            )
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            problems.append(f"lora_dropout: {p!r} must be at least 0 and below 1.")
        return problems


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
