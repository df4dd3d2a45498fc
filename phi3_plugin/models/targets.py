"""Which linear layers get an adapter, and how a recipe says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.lora import DoRALinear, Linear, LoRALinear
from phi3_plugin.models.merged import MergedLoRALinear

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of one Phi-3 block, under Hugging Face's names."""

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the fused ones hold, in the order of their rows, under the names of HF's Llama."""

FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}

MLP_TARGETS = TARGETS[2:]

HEAD = "lm_head"

SYNONYMS = {
    **dict.fromkeys(("output_proj", "out_proj"), "o_proj"),
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""Names people know from other models, and ours."""


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

    def __post_init__(self) -> None:
        """Check everything at once."""
        if problems := [*self._wrong_targets(), *self._wrong_numbers()]:
            raise AdapterError("\n".join(problems))

    def make(self, name: str, in_dim: int, out_dim: int) -> nn.Module:
        """Return the layer of this name, with an adapter if it or a part of it is a target."""
        quantize = self.quantize_base and name != HEAD
        adapter = self.lora_rank, int(self.lora_alpha), self.lora_dropout, quantize
        if name in self.lora_attn_modules or (name == HEAD and self.apply_lora_to_output):
            kind = DoRALinear if self.use_dora else LoRALinear
            return kind(in_dim, out_dim, *adapter)
        if any(part in self.lora_attn_modules for part in PARTS.get(name, ())):
            rows = _part_rows(name, in_dim, out_dim)
            return MergedLoRALinear(in_dim, rows, self.lora_attn_modules, *adapter)
        return Linear(in_dim, out_dim, quantize)

    def _wrong_targets(self) -> list[str]:
        targets = list(self.lora_attn_modules)
        problems = [_unknown_target(n) for n in targets if n not in TARGETS and n not in FUSED]
        problems += self._wrong_parts()
        if not targets and not self.apply_lora_to_output:
            problems.append(f"lora_attn_modules: empty, so nothing is trained. {_available()}")
        mlp = [name for name in targets if FUSED.get(name, name) in MLP_TARGETS]
        in_mlp = bool(mlp)
        if not problems and in_mlp != bool(self.apply_lora_to_mlp):
            problems.append(
                f"apply_lora_to_mlp: {self.apply_lora_to_mlp} disagrees with lora_attn_modules "
                f"{targets}. Set it to {in_mlp}, or {'drop' if in_mlp else 'add'} "
                f"{' and '.join(mlp or MLP_TARGETS)}."
            )
        return problems

    def _wrong_parts(self) -> list[str]:
        given = [part for part in FUSED if part in self.lora_attn_modules]
        problems = []
        for fused in PARTS:
            parts = [repr(part) for part in given if FUSED[part] == fused]
            if parts and fused in self.lora_attn_modules:
                problems.append(
                    f"lora_attn_modules: {fused!r} and its part{'s' * (len(parts) > 1)} "
                    f"{', '.join(parts)} would be adapted twice. Keep either."
                )
        if given and self.use_dora:
            whole = ", ".join(repr(fused) for fused in dict.fromkeys(map(FUSED.get, given)))
            problems.append(
                "use_dora: True needs whole layers, but lora_attn_modules has "
                f"{', '.join(map(repr, given))}. Use {whole}, or set use_dora to False."
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


def _part_rows(fused: str, in_dim: int, out_dim: int) -> dict[str, int]:
    """Return how many rows each part has; all query heads together are as wide as the model."""
    first = in_dim if fused == "qkv_proj" else out_dim // 2
    others = PARTS[fused][1:]
    return {PARTS[fused][0]: first, **dict.fromkeys(others, (out_dim - first) // len(others))}


def _unknown_target(name: str) -> str:
    if name in SYNONYMS:
        return f"lora_attn_modules: {name!r} is called {SYNONYMS[name]!r} here. {_available()}"
    return f"lora_attn_modules: {name!r} matches no linear layer of a block. {_available()}"


def _available() -> str:
    return f"Available: {', '.join(TARGETS)}, and the parts {', '.join(FUSED)}."


def _is_whole(value: object) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value > 0  # type: ignore[operator]
