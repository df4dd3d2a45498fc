"""Which layers the names in a ``peft_config`` mean, as PEFT would find them in a Phi-3.

Source: PEFT 0.21.2 ``check_target_module_exists`` and ``get_pattern_key``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_plugin.train.stock_keys import shown

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The layers that a Phi-3 fuses, and the names of their parts in other models."""

WHOLE = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

HEAD = {"lm_head": "apply_lora_to_output", "embed_tokens": "apply_lora_to_embedding"}
"""Beyond the blocks, and the keys for an adapter on them."""

TARGETS = ("as-published", "as-intended", "as-intended-parts")
"""Ways to read names of parts. PEFT finds none of them in a Phi-3, and leaves them out without a
word: ``as-published`` does the same, and says so. ``as-intended`` takes the fused layer where all
of its parts are named, and the parts where not; ``as-intended-parts`` always the parts."""

PARTS = {part: fused for fused, inside in FUSED.items() for part in inside}

_PATH = re.compile(r"(?:(?:model\.)?layers\.(\d+)\.|(\d+)\.)?(?:(self_attn|mlp)\.)?(\w+)")
_OTHER = re.compile(r"(?:.*\.)?(?:model|layers|\d+|self_attn|mlp|\w*norm)")
"""What is in a Phi-3 and is no linear layer; PEFT ends with an error there."""


def path(name: str) -> tuple[int | None, str] | None:
    """Return layer and target of a name in a Phi-3 of transformers, or None if it is not there.

    Names of parts count as if the layer were not fused.

    Args:
        name: As in PEFT, from any dot on: ``o_proj``, ``mlp.down_proj``,
            ``layers.3.self_attn.o_proj``.
    """
    if name == "model.embed_tokens":
        return None, "embed_tokens"
    if not (found := _PATH.fullmatch(name)):
        return None
    layer, block, target = found[1] or found[2], found[3], found[4]
    if target in HEAD:
        return None if layer or block else (None, target)
    inside = "self_attn" if target in ("o_proj", *FUSED["qkv_proj"], "qkv_proj") else "mlp"
    known = target in WHOLE or target in PARTS
    if not known or block not in (None, inside) or (layer and not block):
        return None
    return (int(layer) if layer else None), target


def names(given: Any, targets: str) -> tuple[list[str], list[str], list[str]]:
    """Return the layers that get an adapter, as our recipe names them, notes and problems.

    Args:
        given: ``target_modules``, text or a list of it.
        targets: One of `TARGETS`.
    """
    if given == "all-linear":
        return list(WHOLE), [], []
    if isinstance(given, str):
        problem = f"target_modules: {shown(given)} is a pattern for PEFT. List the names instead."
        return [], [], [problem]
    places = {name: path(name) for name in given or ()}
    problems = [*_unlike_any_of_ours(places)]
    plain = [place[1] if place else name for name, place in places.items()]
    meant = plain if targets == "as-published" else _meant(plain, targets)
    there = {*WHOLE, *HEAD, *(() if targets == "as-published" else PARTS)}
    kept = [name for name in dict.fromkeys(meant) if name in there]
    lost = [name for name, place in places.items() if not place or place[1] not in there]
    if not kept and not problems:
        problems.append(
            f"target_modules: {shown(given)} matches no layer of a Phi-3. "
            f"It has {', '.join(WHOLE)}. For names of their parts add --targets as-intended."
        )
    return kept, [] if problems or not lost else [_lost(lost)], problems


def pattern(key: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` with our names, and problems.

    Args:
        key: Which of them it is.
        given: As PEFT takes it: of the names that fit a layer the first counts.
    """
    ours: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if not (place := path(name)):
            problems.append(
                f"{key}: {name!r} is no layer of a Phi-3. Name a target as in o_proj, or with its "
                "layer as in layers.3.self_attn.o_proj."
            )
            continue
        layer, target = place
        if target in ours:  # here the layer's own would count
            problems.append(f"{key}: {name!r} is never reached after {target!r}. Put it first.")
        ours[target if layer is None else f"{layer}.{target}"] = value
    return ours, problems


def _unlike_any_of_ours(places: Mapping[str, tuple[int | None, str] | None]) -> Iterator[str]:
    for name, place in places.items():
        if place and place[0] is not None:
            yield (
                f"target_modules: {shown(name)} is in one layer. Name {place[1]!r}, and the layer "
                "in layers_to_transform."
            )
        elif not place and _OTHER.fullmatch(name):
            yield f"target_modules: {shown(name)} is no linear layer. Remove it."


def _meant(given: Sequence[str], targets: str) -> list[str]:
    """Put the fused layer in the place of its parts where they are all there, or it is itself."""
    complete = {f for f, inside in FUSED.items() if f in given or {*inside} <= {*given}}
    if targets == "as-intended-parts":
        complete &= {*given}
    return [PARTS[name] if PARTS.get(name) in complete else name for name in given]


def _lost(names: Sequence[str]) -> str:
    hint = " Their layers are fused: --targets as-intended." if PARTS.keys() & {*names} else ""
    written = ", ".join(name if name.isidentifier() else repr(name) for name in names)
    return f"target_modules: these match nothing in a Phi-3: {written}.{hint}"
