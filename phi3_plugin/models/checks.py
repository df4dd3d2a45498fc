"""What is wrong with adapter settings: in themselves, for a model, and for torchtune's recipes."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchtune.recipe_interfaces import FTRecipeInterface

from phi3_plugin.models.targets import (
    EMBEDDING,
    FUSED,
    HEAD,
    MLP_TARGETS,
    PARTS,
    SYNONYMS,
    TARGETS,
    place,
)

if TYPE_CHECKING:
    from phi3_plugin.models.settings import LoRASettings

INITS = ("kaiming", "gaussian", "pissa", "loftq")
"""Where an adapter starts: drawn, or split off the base weight."""
FROM_BASE = INITS[2:]
SWITCHES = (
    *("apply_lora_to_mlp", "apply_lora_to_output", "apply_lora_to_embedding"),
    *("use_dora", "use_rslora", "quantize_base"),
)


def problems(s: "LoRASettings") -> list[str]:
    """Say all that is wrong with settings by themselves, a line each."""
    if kinds := [*_wrong_kinds(s)]:
        return kinds  # what follows takes lists and switches for granted
    targets = [*_wrong_targets(s), *_wrong_whole(s)]
    patterns = [] if targets else [*_wrong_patterns(s)]
    return [*targets, *_wrong_numbers(s), *patterns, *_wrong_layers(s), *_wrong_start(s)]


def misfits(s: "LoRASettings", layers: int, *, tied: bool) -> Iterator[str]:
    """Say what settings ask of a model that it does not have.

    Args:
        s: Right by themselves.
        layers: How many the model has.
        tied: Whether its head is its embedding.
    """
    for key, what in (
        ("apply_lora_to_output", "a head of its own, but this checkpoint ties it to the embedding"),
        ("apply_lora_to_embedding", "an embedding of its own, but this checkpoint ties the head"),
        ("modules_to_save", "a head and an embedding of their own, but this checkpoint ties them"),
    ):
        if tied and (value := getattr(s, key)):
            shown = value if isinstance(value, bool) else list(value)
            yield (
                f"{key}: {shown} needs {what}, so that what is trained on the one would change "
                f"the other as well. Set it to {False if value is True else 'null'}."
            )
    numbers = [("layers_to_transform", layer) for layer in s.layers_to_transform or ()]
    for key in ("rank_pattern", "alpha_pattern"):
        numbers += [(key, place(name)[0] or 0) for name in getattr(s, key) or ()]
    for key, number in numbers:
        if number >= layers:
            yield f"{key}: there is no layer {number}. The last one is {layers - 1}."


def under_torchtune(s: "LoRASettings") -> Iterator[str]:
    """Say which settings the running program cannot train or save, if it is torchtune's recipe.

    Those, and copies of them, load the weights themselves, save what is called lora or magnitude,
    and tell a checkpointer one rank and one alpha.
    """
    main = vars(sys.modules["__main__"]).values()
    if not any(FTRecipeInterface in v.__mro__[1:] for v in main if isinstance(v, type)):
        return
    keys = ("use_rslora", "rank_pattern", "alpha_pattern", "apply_lora_to_embedding")
    asked = [key for key in (*keys, "modules_to_save") if getattr(s, key)]
    for key in [*asked, *(["lora_init"] if s.lora_init in FROM_BASE else [])]:
        value = getattr(s, key)
        shown = value if isinstance(value, bool) else repr(value)
        yield (
            f"{key}: {shown} is not supported by torchtune's recipes, which would start from or "
            "save something else. Use phi3_lora_finetune with the same YAML, or remove the key."
        )


def _wrong_kinds(s: "LoRASettings") -> Iterator[str]:
    for key, example in (("lora_attn_modules", "o_proj"), ("modules_to_save", HEAD)):
        names = getattr(s, key) or ()
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) for name in names):
            yield f"{key}: {names!r} must be a list of names, as in [{example}]."
    for key in SWITCHES:
        if type(value := getattr(s, key)) is not bool:  # 'False' would be true
            yield f"{key}: {value!r} must be True or False."


def _wrong_targets(s: "LoRASettings") -> list[str]:
    targets = list(s.lora_attn_modules)
    found = [_unknown_target(n) for n in targets if n not in TARGETS and n not in FUSED]
    found += _wrong_parts(s)
    if not targets and not s.apply_lora_to_output and not s.apply_lora_to_embedding:
        found.append(f"lora_attn_modules: empty, so no adapter is trained. {_available()}")
    mlp = [name for name in targets if FUSED.get(name, name) in MLP_TARGETS]
    in_mlp = bool(mlp)
    if not found and in_mlp != bool(s.apply_lora_to_mlp):
        found.append(
            f"apply_lora_to_mlp: {s.apply_lora_to_mlp} disagrees with lora_attn_modules "
            f"{targets}. Set it to {in_mlp}, or {'drop' if in_mlp else 'add'} "
            f"{' and '.join(mlp or MLP_TARGETS)}."
        )
    return found


def _wrong_parts(s: "LoRASettings") -> list[str]:
    given = [part for part in FUSED if part in s.lora_attn_modules]
    found = []
    for fused in PARTS:
        parts = [repr(part) for part in given if FUSED[part] == fused]
        if parts and fused in s.lora_attn_modules:
            found.append(
                f"lora_attn_modules: {fused!r} and its part{'s' * (len(parts) > 1)} "
                f"{', '.join(parts)} would be adapted twice. Keep either."
            )
    whole = ", ".join(repr(fused) for fused in dict.fromkeys(map(FUSED.get, given)))
    for asked, instead in (
        ("use_dora: True" if s.use_dora else "", "set use_dora to False"),
        (f"lora_init: {s.lora_init!r}" if s.lora_init in FROM_BASE else "", "take 'kaiming'"),
    ):
        if given and asked:
            found.append(
                f"{asked} needs whole layers, but lora_attn_modules has "
                f"{', '.join(map(repr, given))}. Use {whole}, or {instead}."
            )
    return found


def _wrong_whole(s: "LoRASettings") -> Iterator[str]:
    for name in s.modules_to_save or ():
        if place(name)[1] not in (HEAD, EMBEDDING):
            yield (
                f"modules_to_save: {name!r} cannot be trained whole beside adapters. "
                f"Available: {HEAD}, {EMBEDDING}."
            )
    for key, module in (
        ("apply_lora_to_output", HEAD),
        ("apply_lora_to_embedding", EMBEDDING),
    ):
        if getattr(s, key) and module in s.whole:
            yield f"modules_to_save: {module!r} conflicts with {key}: True. Keep either."
    if s.use_dora and s.apply_lora_to_embedding:
        yield (
            "apply_lora_to_embedding: True conflicts with use_dora: True, which would need a "
            "magnitude for the embedding as well. Set either to False."
        )


def _wrong_numbers(s: "LoRASettings") -> Iterator[str]:
    if not _is_whole(s.lora_rank):
        yield f"lora_rank: {s.lora_rank!r} must be a whole number above 0."
    if not _is_whole(s.lora_alpha):
        yield (
            f"lora_alpha: {s.lora_alpha!r} must be a whole number above 0, since PEFT "
            "declares it an integer."
        )
    p = s.lora_dropout
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        yield f"lora_dropout: {p!r} must be at least 0 and below 1."


def _wrong_patterns(s: "LoRASettings") -> Iterator[str]:
    for key, right, words in (
        ("rank_pattern", _is_whole, "a whole number above 0"),
        ("alpha_pattern", _is_positive, "a number above 0"),
    ):
        pattern = getattr(s, key) or {}
        if not isinstance(pattern, Mapping):
            yield f"{key}: {pattern!r} must be a section such as {{o_proj: 8, 3.o_proj: 4}}."
            continue
        names = {name: place(str(name)) for name in pattern}
        for name, value in pattern.items():
            if problem := _misplaced(names[name], s):
                yield f"{key}: {name!r} {problem}"
            if list(names.values()).count(names[name]) > 1:
                yield f"{key}: {name!r} is there twice, under two names. Keep one."
            if not right(value):
                yield f"{key}.{name}: {value!r} must be {words}."


def _misplaced(where: tuple[int | None, str], s: "LoRASettings") -> str:
    """Say why a pattern's key names no adapter, or return nothing if it does."""
    layer, target = where
    adapted = [*s.lora_attn_modules]
    adapted += [HEAD] * bool(s.apply_lora_to_output) + [EMBEDDING] * bool(s.apply_lora_to_embedding)
    if target not in adapted or (layer is not None and target in (HEAD, EMBEDDING)):
        return (
            "matches no adapter. Name a target as in o_proj, or with its layer as in 3.o_proj; "
            f"adapted are {', '.join(adapted)}."
        )
    if layer is not None and s.layers_to_transform and layer not in s.layers_to_transform:
        return f"is in a layer without adapters, says layers_to_transform: {s.layers_to_transform}."
    return ""


def _wrong_layers(s: "LoRASettings") -> Iterator[str]:
    layers = s.layers_to_transform
    if layers is None:
        return
    listed = isinstance(layers, Sequence) and not isinstance(layers, str) and bool(layers)
    if not listed or not all(type(n) is int and n >= 0 for n in layers):
        yield (
            f"layers_to_transform: {layers!r} must be a list of layer numbers from 0 on, or null "
            "for all."
        )


def _wrong_start(s: "LoRASettings") -> Iterator[str]:
    if s.lora_init not in INITS:
        yield f"lora_init: {s.lora_init!r} must be one of {', '.join(INITS)}."
    if s.lora_init == "pissa" and s.quantize_base:
        yield (
            "lora_init: 'pissa' needs a base that is not quantized, or the adapter could not be "
            "exported for the original one. Use 'loftq', or set quantize_base to False."
        )
    if s.lora_init == "loftq" and not s.quantize_base:
        yield "lora_init: 'loftq' makes up for what NF4 loses. Set quantize_base to True."


def _unknown_target(name: str) -> str:
    if name in SYNONYMS:
        return f"lora_attn_modules: {name!r} is called {SYNONYMS[name]!r} here. {_available()}"
    return f"lora_attn_modules: {name!r} matches no linear layer of a block. {_available()}"


def _available() -> str:
    return f"Available: {', '.join(TARGETS)}, and the parts {', '.join(FUSED)}."


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf


def _is_whole(value: Any) -> bool:
    return _is_positive(value) and float(value).is_integer()
