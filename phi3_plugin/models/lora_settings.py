"""The options of LoRA: what they may be, the layers they make, and which ones an adapter needs."""

import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Annotated, Any, get_type_hints

from torch import nn
from torchtune.recipe_interfaces import FTRecipeInterface

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.lora import (
    DoRALinear,
    Embedding,
    Linear,
    LoRAEmbedding,
    LoRALinear,
    LowRank,
    MergedLoRALinear,
    WholeEmbedding,
    WholeLinear,
)
from phi3_plugin.options import (
    Advice,
    Kind,
    OnResume,
    Positive,
    Share,
    Switch,
    is_positive,
    is_whole,
    mistakes,
)

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linear layers of one Phi-3 block, under Hugging Face's names."""

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the fused ones hold, in the order of their rows, under the names of HF's Llama."""

FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}

MLP_TARGETS = TARGETS[2:]

HEAD, EMBEDDING = "lm_head", "embed_tokens"

ALIASES = {"output": HEAD, "tok_embeddings": EMBEDDING}
"""torchtune's names, which are those of our modules, for Hugging Face's."""

SYNONYMS = {
    "output_proj": "o_proj",
    "out_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""Names people know from other models, and ours."""

INITS = ("kaiming", "gaussian", "pissa", "loftq")
"""Where an adapter starts: drawn, or split off the base weight."""
FROM_BASE = INITS[2:]

Place = tuple[int | None, str]
"""Number of the layer, which head and embedding have not, and target."""


# What an option may be. A list may be of OmegaConf's.


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(name, str) for name in value)


def _are_layers(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(is_whole(n, least=0) for n in value)


def _is_width(value: Any) -> bool:
    return is_positive(value) and float(value).is_integer()


Width = Annotated[int, Kind("a whole number above 0", _is_width)]
Init = Annotated[str, Kind(f"one of {', '.join(INITS)}", lambda v: v in INITS)]
Targets = Annotated[Sequence[str], Kind("a list of names, as in [o_proj]", _are_names)]
Layers = Annotated[Sequence[int], Kind("a list of layer numbers from 0 on", _are_layers)]
_PATTERN = Kind(
    "a section such as {o_proj: 8, 3.o_proj: 4}", lambda value: isinstance(value, Mapping)
)


@dataclass(frozen=True)
class LoRASettings:
    """The options of LoRA, as the YAML of a recipe spells them.

    The first eight are those of torchtune's own builders, in their order.

    Raises:
        AdapterError: Something is wrong; all problems, one line each.
    """

    lora_attn_modules: Targets
    """Any of qkv_proj, o_proj, gate_up_proj, down_proj; or of q_proj, k_proj, v_proj, gate_proj,
    up_proj, for an adapter on that part of a fused layer alone. The name is torchtune's; its
    recipes read it."""
    apply_lora_to_mlp: Switch = False
    """Must say whether the list holds gate_up_proj, down_proj or such a part."""
    apply_lora_to_output: Switch = False
    """An adapter on the head as well."""
    lora_rank: Width = 8
    """Inner width of every adapter."""
    lora_alpha: Annotated[Width, Advice("PEFT declares it an integer.")] = 16
    """The adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: Annotated[Share, OnResume.HONOURED] = 0.0
    """Dropout on the adapters' input."""
    use_dora: Switch = False
    """Train the magnitude of each row as well."""
    quantize_base: Switch = False
    """Store the base weights in NF4, all linear layers but the head."""
    _: KW_ONLY
    use_rslora: Switch = False
    """Scale by lora_alpha / sqrt(lora_rank) instead."""
    rank_pattern: Annotated[Mapping[str, int], _PATTERN] | None = None
    """Other ranks, by target (``o_proj: 8``) or by layer and target (``3.o_proj: 4``), which comes
    first. Head and embedding are ``lm_head`` and ``embed_tokens``, or ``output`` and
    ``tok_embeddings``."""
    alpha_pattern: Annotated[Mapping[str, float], _PATTERN] | None = None
    """Other alphas, likewise."""
    layers_to_transform: Layers | None = None
    """Numbers of the layers that get adapters; None is all."""
    lora_init: Init = "kaiming"
    """How the adapters start: kaiming or gaussian draw A; pissa takes the largest directions of
    the base weight, loftq what NF4 loses of it, each for our recipe only."""
    apply_lora_to_embedding: Switch = False
    """An adapter on the embedding as well."""
    modules_to_save: Targets | None = None
    """lm_head, embed_tokens: trained whole beside the adapters."""

    def __post_init__(self) -> None:
        """Check everything at once."""
        if problems := _problems(self):
            raise AdapterError("\n".join(problems))

    @property
    def whole(self) -> set[str]:
        """What is trained whole, under Hugging Face's names."""
        return {ALIASES.get(name, name) for name in self.modules_to_save or ()}

    def make(self, name: str, in_dim: int, out_dim: int) -> nn.Module:
        """Return the layer of this name, with an adapter if it or a part of it is a target.

        Args:
            name: As in the patterns: ``3.qkv_proj``, or ``lm_head``.
            in_dim: Width of the input.
            out_dim: Width of the output.
        """
        layer, target = parse_place(name)
        quantize = self.quantize_base and target != HEAD
        if target in self.whole:
            return WholeLinear(in_dim, out_dim)
        if layer is not None and layer not in (self.layers_to_transform or [layer]):
            return Linear(in_dim, out_dim, quantize)
        # A head that is not quantized has no error for LoftQ to make up for
        init = "kaiming" if self.lora_init == "loftq" and not quantize else self.lora_init
        how: Any = {"use_rslora": self.use_rslora, "init": init}
        if target in self.lora_attn_modules or (target == HEAD and self.apply_lora_to_output):
            kind = DoRALinear if self.use_dora else LoRALinear
            how |= {"dropout": self.lora_dropout, "quantize_base": quantize}
            return kind(in_dim, out_dim, *self._rank_and_alpha(layer, target), **how)
        rows = _part_rows(target, in_dim, out_dim)
        adapters = {
            part: LowRank(in_dim, count, *self._rank_and_alpha(layer, part), **how)
            for part, count in rows.items()
            if part in self.lora_attn_modules
        }
        if adapters:
            return MergedLoRALinear(in_dim, rows, adapters, self.lora_dropout, quantize)
        return Linear(in_dim, out_dim, quantize)

    def make_embedding(self, vocabulary: int, dim: int) -> nn.Embedding:
        """Return the embedding, with an adapter or trained whole if that is asked for."""
        if self.apply_lora_to_embedding:
            numbers = self._rank_and_alpha(None, EMBEDDING)
            return LoRAEmbedding(vocabulary, dim, *numbers, use_rslora=self.use_rslora)
        return (WholeEmbedding if EMBEDDING in self.whole else Embedding)(vocabulary, dim)

    def _rank_and_alpha(self, layer: int | None, target: str) -> tuple[int, float]:
        """A key with the layer's number comes before one without."""
        rank, alpha = int(self.lora_rank), float(self.lora_alpha)
        for where in ((None, target), (layer, target)):
            rank = int(_at(where, self.rank_pattern, rank))
            alpha = float(_at(where, self.alpha_pattern, alpha))
        return rank, int(alpha) if alpha.is_integer() else alpha


def parse_place(key: str) -> Place:
    """Return layer and target of a pattern's key: ``qkv_proj``, ``3.qkv_proj``, ``output``.

    The layer is None where the key means all of them.
    """
    if numbered := re.fullmatch(r"(?:layers\.)?(\d+)\.(\w+)", key):
        return int(numbered[1]), numbered[2]
    return None, ALIASES.get(key, key)


def _at(where: Place, pattern: Mapping[str, float] | None, otherwise: float) -> float:
    return next((v for key, v in (pattern or {}).items() if parse_place(key) == where), otherwise)


def _part_rows(fused: str, in_dim: int, out_dim: int) -> dict[str, int]:
    """Return how many rows each part has; all query heads together are as wide as the model."""
    if fused not in PARTS:
        return {}
    first = in_dim if fused == "qkv_proj" else out_dim // 2
    others = PARTS[fused][1:]
    return {PARTS[fused][0]: first, **dict.fromkeys(others, (out_dim - first) // len(others))}


# What is wrong with settings: in themselves, for a model, and for torchtune's recipes; a line each.


def _problems(s: LoRASettings) -> list[str]:
    hints = get_type_hints(LoRASettings, include_extras=True)
    wrong = {f.name: mistakes(f.name, getattr(s, f.name), hints[f.name]) for f in fields(s)}
    found = [line for lines in wrong.values() for line in lines]
    # What follows takes lists, sections and switches for granted, but reads no numbers
    if any(lines for key, lines in wrong.items() if key not in NUMBERS):
        return found
    targets = [*_wrong_targets(s), *_wrong_whole(s)]
    patterns = [] if targets else [*_wrong_patterns(s)]
    return [*targets, *found, *patterns, *_wrong_start(s)]


NUMBERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_init")
"""Options, and a word, without which the others can be checked."""


def misfits(s: LoRASettings, layers: int, *, tied: bool) -> Iterator[str]:
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
        numbers += [(key, parse_place(name)[0] or 0) for name in getattr(s, key) or ()]
    for key, number in numbers:
        if number >= layers:
            yield f"{key}: there is no layer {number}. The last one is {layers - 1}."


def under_torchtune(s: LoRASettings) -> Iterator[str]:
    """Say which settings the running program cannot train or save, if it is torchtune's recipe.

    Those, and copies of them, load the weights themselves, save what is called lora or magnitude,
    and tell a checkpointer one rank and one alpha.
    """
    main = vars(sys.modules["__main__"]).values()
    if not any(FTRecipeInterface in v.__mro__[1:] for v in main if isinstance(v, type)):
        return
    keys = ["use_rslora", "rank_pattern", "alpha_pattern", "apply_lora_to_embedding"]
    asked = [key for key in [*keys, "modules_to_save"] if getattr(s, key)]
    for key in asked + (["lora_init"] if s.lora_init in FROM_BASE else []):
        value = getattr(s, key)
        shown = value if isinstance(value, bool) else repr(value)
        yield (
            f"{key}: {shown} is not supported by torchtune's recipes, which would start from or "
            "save something else. Use phi3_lora_finetune with the same YAML, or remove the key."
        )


def _wrong_targets(s: LoRASettings) -> list[str]:
    targets = list(s.lora_attn_modules)
    available = f"Available: {', '.join(TARGETS)}, and the parts {', '.join(FUSED)}."
    problems = []
    for name in [name for name in targets if name not in (*TARGETS, *FUSED)]:
        why = "matches no linear layer of a block"
        if name in SYNONYMS:
            why = f"is called {SYNONYMS[name]!r} here"
        problems.append(f"lora_attn_modules: {name!r} {why}. {available}")
    problems += _wrong_parts(s)
    if not targets and not s.apply_lora_to_output and not s.apply_lora_to_embedding:
        problems.append(f"lora_attn_modules: empty, so no adapter is trained. {available}")
    mlp = [name for name in targets if FUSED.get(name, name) in MLP_TARGETS]
    if not problems and bool(mlp) != s.apply_lora_to_mlp:
        problems.append(
            f"apply_lora_to_mlp: {s.apply_lora_to_mlp} disagrees with lora_attn_modules "
            f"{targets}. Set it to {bool(mlp)}, or {'drop' if mlp else 'add'} "
            f"{' and '.join(mlp or MLP_TARGETS)}."
        )
    return problems


def _wrong_parts(s: LoRASettings) -> Iterator[str]:
    parts = [part for part in FUSED if part in s.lora_attn_modules]
    for fused in PARTS:
        own = [repr(part) for part in parts if FUSED[part] == fused]
        if own and fused in s.lora_attn_modules:
            yield (
                f"lora_attn_modules: {fused!r} and its part{'s' if len(own) > 1 else ''} "
                f"{', '.join(own)} would be adapted twice. Keep either."
            )
    needs_whole = [("use_dora: True", "set use_dora to False")] if s.use_dora else []
    if s.lora_init in FROM_BASE:
        needs_whole.append((f"lora_init: {s.lora_init!r}", "take 'kaiming'"))
    for asked, instead in needs_whole if parts else ():
        whole = ", ".join(repr(fused) for fused in dict.fromkeys(FUSED[part] for part in parts))
        yield (
            f"{asked} needs whole layers, but lora_attn_modules has "
            f"{', '.join(map(repr, parts))}. Use {whole}, or {instead}."
        )


def _wrong_whole(s: LoRASettings) -> Iterator[str]:
    for name in s.modules_to_save or ():
        if parse_place(name)[1] not in (HEAD, EMBEDDING):
            yield (
                f"modules_to_save: {name!r} cannot be trained whole beside adapters. "
                f"Available: {HEAD}, {EMBEDDING}."
            )
    for key, module in (("apply_lora_to_output", HEAD), ("apply_lora_to_embedding", EMBEDDING)):
        if getattr(s, key) and module in s.whole:
            yield f"modules_to_save: {module!r} conflicts with {key}: True. Keep either."
    if s.use_dora and s.apply_lora_to_embedding:
        yield (
            "apply_lora_to_embedding: True conflicts with use_dora: True, which would need a "
            "magnitude for the embedding as well. Set either to False."
        )


def _wrong_patterns(s: LoRASettings) -> Iterator[str]:
    for key, hint in (("rank_pattern", Width), ("alpha_pattern", Positive)):
        pattern = getattr(s, key) or {}
        places = [parse_place(str(name)) for name in pattern]
        for where, (name, value) in zip(places, pattern.items(), strict=True):
            if problem := _misplaced(where, s):
                yield f"{key}: {name!r} {problem}"
            if places.count(where) > 1:
                yield f"{key}: {name!r} is there twice, under two names. Keep one."
            yield from mistakes(f"{key}.{name}", value, hint)


def _misplaced(where: Place, s: LoRASettings) -> str:
    """Say why a pattern's key names no adapter, or return nothing if it does."""
    layer, target = where
    adapted = [*s.lora_attn_modules]
    adapted += [HEAD] if s.apply_lora_to_output else []
    adapted += [EMBEDDING] if s.apply_lora_to_embedding else []
    if target not in adapted or (layer is not None and target in (HEAD, EMBEDDING)):
        return (
            "matches no adapter. Name a target as in o_proj, or with its layer as in 3.o_proj; "
            f"adapted are {', '.join(adapted)}."
        )
    if layer is not None and s.layers_to_transform and layer not in s.layers_to_transform:
        return f"is in a layer without adapters, says layers_to_transform: {s.layers_to_transform}."
    return ""


def _wrong_start(s: LoRASettings) -> Iterator[str]:
    if s.lora_init == "pissa" and s.quantize_base:
        yield (
            "lora_init: 'pissa' needs a base that is not quantized, or the adapter could not be "
            "exported for the original one. Use 'loftq', or set quantize_base to False."
        )
    if s.lora_init == "loftq" and not s.quantize_base:
        yield "lora_init: 'loftq' makes up for what NF4 loses. Set quantize_base to True."


# The way back: which keys of a recipe make a model that an adapter fits.


def keys_of(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    whole: Collection[str],
    *,
    layers: int,
    use_dora: bool,
    use_rslora: bool,
) -> dict[str, Any]:
    """Return the keys of `LoRASettings` that give these adapters; equal adapters, equal keys.

    Args:
        ranks: By module, our names.
        scales: What B A is multiplied with, likewise.
        whole: Tensors that are trained whole.
        layers: How many the model has.
        use_dora: Whether they have magnitudes.
        use_rslora: How the keys are to say the scale.

    Raises:
        AdapterError: No keys say that a layer has adapters on other targets than the next one.
    """
    places = {module: _module_place(module) for module in ranks}
    used = {target for _, target in places.values()}
    targets = [t for t in (*TARGETS, *FUSED) if t in used]
    rank, rank_pattern = _pattern({place: ranks[m] for m, place in places.items()})
    alphas = {
        place: _tidy(scales[m] * (math.sqrt(ranks[m]) if use_rslora else ranks[m]))
        for m, place in places.items()
    }
    alpha, alpha_pattern = _pattern(alphas)
    return {
        "lora_attn_modules": targets,
        "apply_lora_to_mlp": any(FUSED.get(t, t) in MLP_TARGETS for t in targets),
        "apply_lora_to_output": HEAD in used,
        "apply_lora_to_embedding": EMBEDDING in used,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "layers_to_transform": _layers(places.values(), targets, layers),
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "modules_to_save": sorted(ALIASES[n.removesuffix(".weight")] for n in whole) or None,
    }


def keys_of_model(model: nn.Module) -> dict[str, Any]:
    """Return the keys that gave a model its adapters, as :func:`keys_of` says them.

    Args:
        model: torchtune's decoder; knows what is trained.
    """
    adapted: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_a")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return keys_of(
        {name: module.rank for name, module in adapted.items()},
        {name: module.scaling for name, module in adapted.items()},
        trained & {f"{module}.weight" for module in ALIASES},
        layers=len(model.layers),  # type: ignore[arg-type]
        use_dora=any(hasattr(module, "magnitude") for module in adapted.values()),
        use_rslora=any(module.use_rslora for module in adapted.values()),
    )


def _module_place(module: str) -> Place:
    words = module.split(".")
    layer = int(words[1]) if words[0] == "layers" else None
    return layer, ALIASES.get(words[-1], words[-1])


def _layers(places: Collection[Place], targets: list[str], layers: int) -> list[int] | None:
    """Return the layers that have adapters, or None for all."""
    at = {t: sorted(n for n, other in places if other == t and n is not None) for t in targets}
    numbers: list[int] = next(iter(at.values()), [])
    if odd := [f"{t} in {own}" for t, own in at.items() if own != numbers]:
        raise AdapterError(
            f"{targets[0]} is adapted in the layers {numbers}, but {' and '.join(odd)}. "
            "layers_to_transform is for all targets alike."
        )
    return numbers if numbers and numbers != list(range(layers)) else None


def _pattern(values: Mapping[Place, float]) -> tuple[int, dict[str, float]]:
    """Return the commonest whole number, and what differs, by target or layer and target."""
    whole = Counter(value for value in values.values() if value == int(value))
    # Of several as common the smallest, so that the order of the modules decides nothing
    usual = int(min(whole, key=lambda value: (-whole[value], value))) if whole else 1
    pattern: dict[str, float] = {}
    for target in dict.fromkeys(target for _, target in values):
        own = {layer: value for (layer, name), value in values.items() if name == target}
        alike = len(set(own.values())) == 1
        for layer, value in own.items():
            if value != usual:
                pattern[target if alike else f"{layer}.{target}"] = value
    return usual, pattern


def _tidy(alpha: float) -> float:
    """Return the whole number that rounding hid, if there is one."""
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-9) else alpha
