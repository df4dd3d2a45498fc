"""The ``peft_config`` and ``bnb_config`` of Microsoft's samples, as the model section of a YAML.

Source: PEFT 0.21.2 LoraConfig; transformers 5.23 BitsAndBytesConfig.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_plugin.train.stock_keys import closest, shown

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The layers that a Phi-3 fuses, and the names of their parts in other models."""

WHOLE = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

TARGETS = ("as-published", "as-intended", "as-intended-parts")
"""Ways to read names of parts. PEFT finds none of them in a Phi-3, and leaves them out without a
word: ``as-published`` does the same, and says so. ``as-intended`` takes the fused layer where all
of its parts are named, and the parts where not; ``as-intended-parts`` always the parts."""

SAME = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
}

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "task_type": (("CAUSAL_LM", None), 'Use "CAUSAL_LM".'),
    "peft_type": (("LORA", None), 'Use "LORA".'),
    # A Phi-3 has no biases, so none is trained whatever is asked for.
    "bias": (("none", "all", "lora_only"), 'Use "none".'),
    "fan_in_fan_out": ((False,), "Set it to false."),
    "inference_mode": ((False,), "Set it to false."),
    "exclude_modules": ((None, []), "Leave them out of target_modules."),
    "layers_pattern": ((None, "layers", ["layers"]), "Remove it."),
}
"""Keys that must have one of these values, and what to do about another."""

INITS = {True: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}

QUANTIZED: dict[str, tuple[Any, ...]] = {
    "load_in_4bit": (True, False),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True,),
    "bnb_4bit_compute_dtype": ("bfloat16", "float32", "torch.bfloat16", "torch.float32"),
}
"""What an NF4 base of ours can be asked for; its compute type is dtype."""


def adapter_section(
    peft: Mapping[str, Any], quantized: Mapping[str, Any] | None, targets: str
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the model section, notes and problems.

    Args:
        peft: What LoraConfig takes.
        quantized: What BitsAndBytesConfig takes, if there is an NF4 base.
        targets: One of `TARGETS`.
    """
    section: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.0}
    section |= {SAME[key]: value for key, value in peft.items() if key in SAME and value}
    problems = [*_refused(peft), *_not_nf4(quantized or {})]
    names, notes = _names(peft, targets)
    head = {"lm_head": "apply_lora_to_output", "embed_tokens": "apply_lora_to_embedding"}
    section |= {key: True for name, key in head.items() if name in names}
    layers = [name for name in names if name not in head]
    if not layers and not any(name in head for name in names):
        problems.append(
            f"target_modules: {shown(peft.get('target_modules'))} matches no layer of a Phi-3. "
            f"It has {', '.join(WHOLE)}. For names of their parts add --targets as-intended."
        )
    in_mlp = {"gate_up_proj", "down_proj", *FUSED["gate_up_proj"]}
    section |= {"lora_attn_modules": layers, "apply_lora_to_mlp": bool(in_mlp & set(layers))}
    section.setdefault("apply_lora_to_output", False)
    start = peft.get("init_lora_weights", True)
    if start not in INITS:
        problems.append(
            f"init_lora_weights: {shown(start)} must be one of {', '.join(map(str, INITS))}."
        )
    elif start is not True:
        section["lora_init"] = INITS[start]
    kind = "qlora_phi3" if (quantized or {}).get("load_in_4bit") else "lora_phi3"
    return {"_component_": f"phi3_plugin.models.{kind}", **section}, notes, problems


def _names(peft: Mapping[str, Any], targets: str) -> tuple[list[str], list[str]]:
    """Return the layers that get an adapter, as our recipe names them, and notes."""
    given = peft.get("target_modules")
    if given == "all-linear":
        return list(WHOLE), []
    given = [given] if isinstance(given, str) else list(given or ())
    parts = {part: fused for fused, inside in FUSED.items() for part in inside}
    exact = [*WHOLE, "lm_head", "embed_tokens"]
    names = given if targets == "as-published" else _meant(given, parts, targets)
    kept = [
        name for name in dict.fromkeys(names) if name in exact or _is_meant(name, parts, targets)
    ]
    lost = [name for name in given if name not in exact and name not in kept]
    lost = [name for name in lost if targets == "as-published" or name not in parts]
    if not lost:
        return kept, []
    hint = " Their layers are fused: --targets as-intended." if set(lost) & parts.keys() else ""
    return kept, [f"target_modules: these match nothing in a Phi-3: {', '.join(lost)}.{hint}"]


def _is_meant(name: str, parts: Mapping[str, str], targets: str) -> bool:
    return name in parts and targets != "as-published"


def _meant(given: Sequence[str], parts: Mapping[str, str], targets: str) -> list[str]:
    """Put the fused layer in the place of its parts where they are all there."""
    complete = [fused for fused, inside in FUSED.items() if set(inside) <= set(given)]
    if targets == "as-intended-parts":
        complete = []
    fused = {name: parts[name] for name in given if parts.get(name) in complete}
    return [fused.get(name, name) for name in given]


def _refused(peft: Mapping[str, Any]) -> Iterator[str]:
    known = [*SAME, *ONLY, "target_modules", "init_lora_weights"]
    for key, value in peft.items():
        if key in ONLY and value not in ONLY[key][0]:
            yield f"peft_config.{key}: {shown(value)} is not supported. {ONLY[key][1]}"
        elif key not in known and value not in (None, False, {}, []):
            meant = closest(key, known)
            advice = f"Did you mean {meant!r}?" if meant else "Remove it."
            yield f"peft_config.{key}: {shown(value)} is not supported. {advice}"


def _not_nf4(quantized: Mapping[str, Any]) -> Iterator[str]:
    for key, value in quantized.items():
        if key not in QUANTIZED:
            yield f"bnb_config.{key}: there is no such choice. Known: {', '.join(QUANTIZED)}."
        elif value not in QUANTIZED[key]:
            known = ", ".join(map(shown, QUANTIZED[key]))
            yield f"bnb_config.{key}: {shown(value)} must be one of {known}."
