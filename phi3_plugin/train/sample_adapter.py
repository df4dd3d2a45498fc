"""The ``peft_config`` and ``bnb_config`` of Microsoft's samples, as the model section of a YAML.

Source: PEFT 0.21.2 LoraConfig; transformers 5.23 BitsAndBytesConfig.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from phi3_plugin.train.sample_targets import FUSED, HEAD, names, path, pattern
from phi3_plugin.train.sample_values import PEFT, wrong_values
from phi3_plugin.train.stock_keys import closest, shown

SAME = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Keys whose value is the value of ours."""

MAPPED = (
    *("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "init_lora_weights"),
)
"""Keys whose value is written in another way."""

OFF = (
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_config"),
    *("megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("monteclora_config", "layer_replication", "runtime_config", "lora_bias", "arrow_config"),
    *("target_parameters", "kasa_config", "ensure_weight_tying"),
)
"""Keys of PEFT's that must be null, false or empty."""

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

QUANTIZED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "load_in_4bit": (False, (True, False)),
    "bnb_4bit_quant_type": ("fp4", ("nf4",)),
    "bnb_4bit_use_double_quant": (False, (True,)),
    "bnb_4bit_compute_dtype": (
        "float32",
        ("bfloat16", "float32", "torch.bfloat16", "torch.float32"),
    ),
}
"""What it is for transformers if it is not given, and what an NF4 base of ours can be asked for;
its compute type is dtype."""


def adapter_section(
    peft: Mapping[str, Any], quantized: Any, targets: str
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the model section, notes and problems.

    Args:
        peft: What LoraConfig takes.
        quantized: What BitsAndBytesConfig takes, if there is an NF4 base.
        targets: One of `phi3_plugin.train.sample_targets.TARGETS`.
    """
    wrong = {f"peft_config.{key}": line for key, line in wrong_values(peft, PEFT).items()}
    peft = {key: value for key, value in peft.items() if f"peft_config.{key}" not in wrong}
    problems = [*(f"peft_config.{line}" for line in wrong.values()), *_refused(peft)]
    problems += _not_nf4(quantized)
    is_nf4 = isinstance(quantized, Mapping) and quantized.get("load_in_4bit") is True
    section: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.0}
    section |= {SAME[key]: value for key, value in peft.items() if key in SAME and value}
    notes: list[str] = []
    if "peft_config.target_modules" not in wrong:
        found, notes, more = names(peft.get("target_modules"), targets)
        problems += more
        section |= _places(found)
    rest, more = _rest(peft, is_nf4)
    kind = "qlora_phi3" if is_nf4 else "lora_phi3"
    section = {"_component_": f"phi3_plugin.models.{kind}", **section, **rest}
    return section, notes, problems + more


def _places(found: list[str]) -> dict[str, Any]:
    """Return the keys that say where the adapters are."""
    layers = [name for name in found if name not in HEAD]
    in_mlp = {"gate_up_proj", "down_proj", *FUSED["gate_up_proj"]}
    return {
        "lora_attn_modules": layers,
        "apply_lora_to_mlp": bool(in_mlp & set(layers)),
        "apply_lora_to_output": False,
        **{key: True for name, key in HEAD.items() if name in found},
    }


def _rest(peft: Mapping[str, Any], is_nf4: bool) -> tuple[dict[str, Any], list[str]]:
    """Return what is written in another way here, and problems."""
    section: dict[str, Any] = {}
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        if given := peft.get(key):
            section[key], wrong = pattern(key, given)
            problems += wrong
    if whole := peft.get("modules_to_save"):
        section["modules_to_save"] = [(path(name) or (0, name))[1] for name in whole]
    if (layers := peft.get("layers_to_transform")) not in (None, []):
        section["layers_to_transform"] = layers if isinstance(layers, list) else [layers]
    start = peft.get("init_lora_weights", True)
    if start not in INITS:
        known = ", ".join(map(str, INITS))
        problems.append(f"init_lora_weights: {shown(start)} must be one of {known}.")
    elif start is not True:
        section["lora_init"] = INITS[start]
        problems += _wrong_base(start, is_nf4)
    return section, problems


def _wrong_base(start: str, is_nf4: bool) -> Iterator[str]:
    if start == "pissa" and is_nf4:
        yield "init_lora_weights: 'pissa' needs a base that is not quantized. Remove bnb_config."
    if start == "loftq" and not is_nf4:
        yield (
            "init_lora_weights: 'loftq' makes up for what NF4 loses. Add bnb_config with "
            "load_in_4bit, bnb_4bit_quant_type nf4 and bnb_4bit_use_double_quant."
        )


def _refused(peft: Mapping[str, Any]) -> Iterator[str]:
    known = [*SAME, *ONLY, *MAPPED]
    for key, value in peft.items():
        if key in ONLY and value not in ONLY[key][0]:
            yield f"peft_config.{key}: {shown(value)} is not supported. {ONLY[key][1]}"
        elif key not in known and (key not in OFF or value not in (None, False, {}, [])):
            meant = None if key in OFF else closest(key, known)
            advice = f"Did you mean {meant!r}?" if meant else "Remove it."
            yield f"peft_config.{key}: {shown(value)} is not supported. {advice}"


def _not_nf4(quantized: Any) -> Iterator[str]:
    if quantized is None:
        return
    if not isinstance(quantized, Mapping):
        yield f"bnb_config: {shown(quantized)} must be what BitsAndBytesConfig takes, or null."
        return
    unknown = [key for key in quantized if key not in QUANTIZED]
    yield from (
        f"bnb_config.{key}: there is no such choice. Known: {', '.join(QUANTIZED)}."
        for key in unknown
    )
    for key, (default, choices) in QUANTIZED.items():
        value = quantized.get(key, default)
        asked = key in quantized or quantized.get("load_in_4bit") is True
        if asked and not any(type(value) is type(one) and value == one for one in choices):
            known = ", ".join(map(shown, choices))
            left = "" if key in quantized else ", which it is if not given,"
            yield f"bnb_config.{key}: {shown(value)}{left} must be one of {known}."
