"""The dictionaries of Microsoft's fine-tuning samples, as a YAML for our recipe."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any

import yaml

from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError, OutputError
from phi3_plugin.models.lora_settings import LoRASettings
from phi3_plugin.options import (
    Count,
    ImportConfigOptions,
    Kind,
    Positive,
    Section,
    Seed,
    Share,
    Switch,
    Text,
    Texts,
    closest,
    kinds_of,
    shown,
)

REAL = (int, float)

# What the keys of transformers' TrainingArguments are here, or why not.
#
# Source: transformers 5.23 TrainingArguments.

SAME = {
    "output_dir": "output_dir",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "clip_grad_norm",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "save_total_limit": "save_total_limit",
    "group_by_length": "group_by_length",
    "gradient_checkpointing": "enable_activation_checkpointing",
    "logging_steps": "log_every_n_steps",
    "max_seq_length": "tokenizer.max_seq_len",
    "max_length": "tokenizer.max_seq_len",
    "packing": "dataset.packed",
}
"""Keys whose value is the value of ours."""

ZERO_IS_NULL = ("max_grad_norm", "save_total_limit")
"""Of those the ones where 0 is no limit, which is null here."""

NO_EFFECT = {
    **dict.fromkeys(("log_level", "disable_tqdm", "logging_dir", "run_name"), "it is for the log"),
    **dict.fromkeys(("dataset_text_field", "remove_unused_columns"), "dataset.* chooses columns"),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory"), "data is tokenized first"),
    "per_device_eval_batch_size": "validation takes batch_size; its loss is the same",
    "overwrite_output_dir": "a run that is there is never overwritten: name another output_dir",
    "logging_first_step": "every step is logged",
    "data_seed": "seed orders the data",
    "do_train": "the recipe is for training",
}
"""Keys that change nothing of the result here, and why."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "Its gradients underflow. Use bf16, or fp32 over bnb_config's NF4 base."),
    "tf32": ((False, None), "Remove it."),
    "logging_strategy": (("steps",), 'Use "steps".'),
    "gradient_checkpointing_kwargs": (({"use_reentrant": False}, None), "Use use_reentrant False."),
    "push_to_hub": ((False,), "Push the folder output_dir/final after the run."),
    "deepspeed": ((None,), "Remove it: `tune run --nproc_per_node N` shards the model."),
    "fsdp": ((None, "", []), "Remove it: `tune run --nproc_per_node N` shards the model."),
    "auto_find_batch_size": ((False,), "Set per_device_train_batch_size."),
    "resume_from_checkpoint": ((None, False), "Add resume=auto to the command instead."),
    "neftune_noise_alpha": ((None,), "Remove it."),
    "label_smoothing_factor": ((0, 0.0), "Remove it."),
}
"""Keys that must have one of these values, and what to do about another."""

SCHEDULES = {
    "cosine": "cosine_with_warmup",
    "linear": "linear_with_warmup",
    "constant_with_warmup": "constant_with_warmup",
}

ADAM = {"_component_": "torch.optim.AdamW", "fused": True}
ADAM_8BIT = {"_component_": "torchao.optim.AdamW8bit"}
OPTIMIZERS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), ADAM),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), ADAM_8BIT),
}

HANDLED = (
    *("bf16", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("optim", "adam_beta1", "adam_beta2", "save_steps", "save_strategy", "report_to"),
    *("do_eval", "eval_steps", "eval_strategy", "evaluation_strategy"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
"""Keys that decide together with others."""


# What values a sample may have: a wrong one is told under the name that it has there.

Whole = Annotated[int, Kind("a whole number", lambda v: type(v) is int)]
FromZero = Annotated[float, Kind("a number from 0 on", lambda v: type(v) in REAL and 0 <= v < inf)]
Ratio = Annotated[float, Kind("from 0 to 1", lambda v: type(v) in REAL and 0 <= v <= 1)]
Layers = Annotated[
    list[int],
    Kind(
        "a list of layer numbers, as in [0, 1]",
        lambda v: isinstance(v, list) and all(type(n) is int and n >= 0 for n in v),
    ),
]
# What OmegaConf would replace by a variable of the environment, or take as not set.
Folder = Annotated[
    str, Kind("text without ${ or ???", lambda v: isinstance(v, str) and not _is_special(v))
]

TRAINING: dict[str, Any] = {
    **dict.fromkeys(("bf16", "group_by_length", "gradient_checkpointing", "packing"), Switch),
    **dict.fromkeys(("do_eval", "load_best_model_at_end"), Switch),
    **dict.fromkeys(("max_seq_length", "max_length", "save_steps", "eval_steps"), Count | None),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), Count),
    **dict.fromkeys(("lr_scheduler_type", "optim", "save_strategy"), Text),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), Text),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Share),
    **dict.fromkeys(("weight_decay", "warmup_steps"), FromZero),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs"), Positive),
    "output_dir": Folder,
    "max_grad_norm": FromZero | None,
    "save_total_limit": Seed | None,
    "logging_steps": Count,
    "max_steps": Whole,
    "seed": Seed,
    "warmup_ratio": Ratio,
    "greater_is_better": Switch | None,
}
PEFT: dict[str, Any] = {
    **dict.fromkeys(("r", "lora_alpha"), Count),
    **dict.fromkeys(("use_rslora", "use_dora"), Switch),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), Section | None),
    "lora_dropout": Share,
    "modules_to_save": Texts | None,
    "target_modules": Text | Texts | None,
    "layers_to_transform": Layers | Seed | None,
    "init_lora_weights": Switch | Text,
}


def wrong_values(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, str]:
    """Return the problem of each value that is of no kind that its key allows.

    Args:
        given: What transformers or PEFT take.
        hints: `TRAINING` or `PEFT`; keys that are not there may have any value.
    """
    return {
        key: f"{key}: {shown(value)} must be {' or '.join(kind.words for kind in kinds)}."
        for key, value in given.items()
        if (kinds := kinds_of(hints.get(key, ())))
        and not any(kind.accepts(value) for kind in kinds)
    }


def _is_special(text: str) -> bool:
    return "${" in text or text == "???"


# Which layers the names in a ``peft_config`` mean, as PEFT would find them in a Phi-3.
#
# Source: PEFT 0.21.2 ``check_target_module_exists`` and ``get_pattern_key``.

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


# The ``peft_config`` and ``bnb_config`` of Microsoft's samples, as the model section of a YAML.
#
# Source: PEFT 0.21.2 LoraConfig; transformers 5.23 BitsAndBytesConfig.

ADAPTER_SAME = {
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

ADAPTER_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
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
        targets: One of `phi3_plugin.import_config.TARGETS`.
    """
    wrong = {f"peft_config.{key}": line for key, line in wrong_values(peft, PEFT).items()}
    peft = {key: value for key, value in peft.items() if f"peft_config.{key}" not in wrong}
    problems = [*(f"peft_config.{line}" for line in wrong.values()), *_refused(peft)]
    problems += _not_nf4(quantized)
    is_nf4 = isinstance(quantized, Mapping) and quantized.get("load_in_4bit") is True
    section: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.0}
    section |= {
        ADAPTER_SAME[key]: value for key, value in peft.items() if key in ADAPTER_SAME and value
    }
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
    known = [*ADAPTER_SAME, *ADAPTER_ONLY, *MAPPED]
    for key, value in peft.items():
        if key in ADAPTER_ONLY and value not in ADAPTER_ONLY[key][0]:
            yield f"peft_config.{key}: {shown(value)} is not supported. {ADAPTER_ONLY[key][1]}"
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


# The two dictionaries of Microsoft's fine-tuning samples, as a YAML for our recipe.
#
# Their ``training_config`` is what transformers' TrainingArguments takes, their ``peft_config`` what
# PEFT's LoraConfig takes. Every key is mapped, or has no effect here and is named in a note, or is
# refused by name: a key that is skipped in silence is a run that does something else.
#
# Source: sample_finetune.py and the notebooks of microsoft/Phi-3CookBook, code/03 and 04;
# transformers 5.23 TrainingArguments for what a key that is not given means.

SECTIONS = ("training_config", "peft_config", "bnb_config", "max_seq_length", "packing")
"""What a sample may hold at its top; the first two must be there."""

LENGTHS = ("max_seq_length", "max_length")
"""Two names of one key."""


@dataclass
class Translation:
    """A YAML in the making."""

    yaml: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know, a line each."""
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Set ``section.key`` or ``key``."""
        section, _, name = key.rpartition(".")
        (self.yaml.setdefault(section, {}) if section else self.yaml)[name] = value


def translate(sample: Mapping[str, Any], targets: str = "as-published") -> Translation:
    """Turn the dictionaries of a sample into the keys of our recipe.

    Args:
        sample: ``training_config`` and ``peft_config``; also ``bnb_config``, what
            BitsAndBytesConfig takes, and ``max_seq_length`` and ``packing``, which the samples
            hand to their trainer.
        targets: What target_modules that a Phi-3 does not have mean, see
            :data:`phi3_plugin.import_config.TARGETS`.

    Returns:
        YAML and notes, without problems.

    Raises:
        ConfigError: A key is unknown or asks for what this recipe does not do; all, a line each.
    """
    out = Translation(_defaults())
    missing = [name for name in SECTIONS[:2] if not isinstance(sample.get(name), Mapping)]
    if missing:
        raise ConfigError(
            f"The sample has no {' and no '.join(missing)}. It must be one JSON object with the "
            "two dictionaries under these names."
        )
    out.problems += [_unknown(name, SECTIONS) for name in sample if name not in SECTIONS]
    given = _given(sample, out)
    for step in (_simple, _precision, _length, _schedule, _optimizer, _saving, _validation):
        step(given, out)
    model, notes, problems = adapter_section(
        sample["peft_config"], sample.get("bnb_config"), targets
    )
    out.yaml["model"] |= model
    out.notes += [*notes, *_compute(sample.get("bnb_config"), out.yaml["dtype"])]
    out.problems += problems
    if out.problems:
        raise ConfigError("\n".join(out.problems))
    return out


def _given(sample: Mapping[str, Any], out: Translation) -> dict[str, Any]:
    """Return what is said of the training, without what is said wrong."""
    training = sample["training_config"]
    top = {key: sample[key] for key in SECTIONS[3:] if key in sample}
    given = {**training, **top}
    said = (shown(one[key]) for one in (top, training) for key in LENGTHS if key in one)
    lengths = dict.fromkeys(said)
    if len(lengths) > 1:
        out.problems.append(f"{' and '.join(LENGTHS)}: {' and '.join(lengths)} differ. Keep one.")
    wrong = wrong_values(given, TRAINING)
    out.problems += wrong.values()
    if given.get("packing") is True and not any(given.get(key) for key in LENGTHS):
        out.problems.append("packing: True needs the length of a pack. Add max_seq_length.")
    return {key: value for key, value in given.items() if key not in wrong}


def _defaults() -> dict[str, Any]:
    """Return the YAML of a sample that says nothing, in the order of our configs."""
    folder = "${checkpoint_dir}"
    return {
        "checkpoint_dir": None,
        "output_dir": None,
        "model": {"checkpoint_dir": folder},
        "tokenizer": {"_component_": "phi3_plugin.data.phi3_tokenizer", "path": folder},
        "dataset": {"_component_": "phi3_plugin.data.chat_dataset", "source": None},
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "epochs": 3,
        "seed": 42,
        "optimizer": {"lr": 5e-5, "weight_decay": 0.0},
        "clip_grad_norm": 1.0,
        "dtype": "fp32",
        "adapter_dtype": "fp32",
        "enable_activation_checkpointing": False,
        "save_every_n_steps": 500,
        "save_every_epoch": False,
        "log_every_n_steps": 500,
    }


def _compute(quantized: Any, dtype: str) -> Iterable[str]:
    """Say where NF4 weights are computed with in another precision than was asked for."""
    if isinstance(quantized, Mapping) and quantized.get("load_in_4bit"):
        asked = str(quantized.get("bnb_4bit_compute_dtype", "float32"))
        if asked.removeprefix("torch.") != {"bf16": "bfloat16", "fp32": "float32"}[dtype]:
            yield f"bnb_4bit_compute_dtype: {shown(asked)} has no effect: bf16 makes it {dtype}."


def _simple(given: Mapping[str, Any], out: Translation) -> None:
    known = [*SAME, *NO_EFFECT, *ONLY, *HANDLED]
    for key, value in given.items():
        if key in SAME:
            out.put(SAME[key], None if key in ZERO_IS_NULL and value == 0 else value)
        elif key in NO_EFFECT:
            out.notes.append(f"{key}: {shown(value)} has no effect: {NO_EFFECT[key]}.")
        elif key in ONLY:
            allowed, instead = ONLY[key]
            if value not in allowed:
                out.problems.append(f"{key}: {shown(value)} is not supported. {instead}")
        elif key not in HANDLED:
            out.problems.append(_unknown(key, known))


def _precision(given: Mapping[str, Any], out: Translation) -> None:
    out.yaml["dtype"] = "bf16" if given.get("bf16") else "fp32"


def _length(given: Mapping[str, Any], out: Translation) -> None:
    steps, epochs = given.get("max_steps", -1), given.get("num_train_epochs", 3)
    if steps > 0:
        # There it overrules the epochs, here the shorter of the two counts.
        out.yaml |= {"max_steps": steps, "epochs": steps}
    elif float(epochs).is_integer():
        out.yaml["epochs"] = int(epochs)
    else:
        out.problems.append(f"num_train_epochs: {epochs} must be whole. Set max_steps instead.")


def _schedule(given: Mapping[str, Any], out: Translation) -> None:
    kind = given.get("lr_scheduler_type", "linear")
    if kind == "constant":
        return
    if kind not in SCHEDULES:
        known = ", ".join([*SCHEDULES, "constant"])
        out.problems.append(f"lr_scheduler_type: {shown(kind)} must be one of {known}.")
        return
    warmup = {"warmup_ratio": given.get("warmup_ratio", 0.0)}
    if steps := given.get("warmup_steps", 0):  # below 1 a share, since transformers 5
        warmup = {"num_warmup_steps": int(steps)} if steps >= 1 else {"warmup_ratio": steps}
    out.yaml["lr_scheduler"] = {"_component_": f"phi3_plugin.train.{SCHEDULES[kind]}", **warmup}


def _optimizer(given: Mapping[str, Any], out: Translation) -> None:
    name = given.get("optim", "adamw_torch")
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        out.problems.append(f"optim: {shown(name)} must be one of {known}.")
    if str(name).startswith("paged"):
        out.notes.append(f"optim: {shown(name)} becomes an optimizer that pages nothing out.")
    betas = [given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)]
    other = {} if betas == [0.9, 0.999] else {"betas": betas}
    out.yaml["optimizer"] = {**OPTIMIZERS.get(name, {}), **out.yaml["optimizer"], **other}


def _saving(given: Mapping[str, Any], out: Translation) -> None:
    strategy = given.get("save_strategy", "steps")
    if strategy not in ("steps", "epoch", "no"):
        out.problems.append(f"save_strategy: {shown(strategy)} must be steps, epoch or no.")
    steps = given.get("save_steps", 500) if strategy == "steps" else None
    out.yaml |= {"save_every_n_steps": steps, "save_every_epoch": strategy == "epoch"}
    reports = given.get("report_to", "none")
    if reports not in ("none", [], ["none"], None, "tensorboard", ["tensorboard"]):
        out.problems.append(f"report_to: {shown(reports)}. Set metric_logger in the YAML instead.")
    elif reports in ("tensorboard", ["tensorboard"]):
        logger = "torchtune.training.metric_logging.TensorBoardLogger"
        out.yaml["metric_logger"] = {"_component_": logger, "log_dir": "${output_dir}"}


def _validation(given: Mapping[str, Any], out: Translation) -> None:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy", "no"))
    if strategy not in ("no", "steps"):
        out.problems.append(
            f"eval_strategy: {shown(strategy)} must be no, or steps with eval_steps."
        )
    if strategy == "steps":
        out.yaml["run_val_every_n_steps"] = given.get("eval_steps") or out.yaml["log_every_n_steps"]
    if strategy != "no" or given.get("do_eval"):
        out.yaml["val_fraction"] = 0.05
        out.notes.append("val_fraction: 0.05 is split off the data, the share of the notebooks.")
    if given.get("load_best_model_at_end") and "val_fraction" not in out.yaml:
        out.problems.append("load_best_model_at_end: True needs eval_strategy: steps.")
    elif given.get("load_best_model_at_end"):
        out.yaml["keep_best"] = True
        out.notes.append("load_best_model_at_end: the best adapter is in best, the last in final.")
    metric = given.get("metric_for_best_model", "loss")
    if metric not in ("loss", "eval_loss", None) or given.get("greater_is_better"):
        out.problems.append(f"metric_for_best_model: {shown(metric)} must be eval_loss.")


def _unknown(key: str, known: Iterable[str]) -> str:
    meant = closest(key, known)
    return f"{key}: it is not among the keys that are taken. " + (
        f"Did you mean {meant!r}?" if meant else "Remove it, and set its counterpart in the YAML."
    )


# What `phi3-tune import-config` does: Microsoft's two dictionaries into a YAML for our recipe.

CHECKPOINT = "checkpoint_dir"
"""The key of a model that is no setting of its adapter."""

HEADER = """# {sample} as a YAML for our recipe; --targets {targets}.
#   tune run phi3_lora_finetune --config {output} \\
#     checkpoint_dir=PATH dataset.source=DATA
"""


def run(o: ImportConfigOptions) -> int:
    """Write the YAML, print what the user should know, and return the exit code.

    Raises:
        ConfigError: The file is not JSON, or asks for what our recipe does not do.
        MissingFileError: There is no such file.
        OutputError: The YAML is there already, or cannot be written.
    """
    sample, output, targets = o.sample, o.output, o.targets
    out = translate(_read(Path(sample)), targets)
    _check_adapter(out.yaml["model"])
    header = HEADER.format(sample=Path(sample).name, targets=targets, output=output)
    notes = "".join(f"# {note}\n" for note in out.notes)
    text = yaml.safe_dump(out.yaml, sort_keys=False, allow_unicode=True)
    _write(Path(output), header + notes + text)
    print("\n".join([*out.notes, f"Wrote {output}."]))
    return 0


def _check_adapter(model: Mapping[str, Any]) -> None:
    """Refuse now what building the model would refuse, where that needs no checkpoint."""
    keys = {key: value for key, value in model.items() if key not in ("_component_", CHECKPOINT)}
    is_nf4 = model["_component_"].endswith(".qlora_phi3")
    try:
        LoRASettings(**{"use_dora": False, "quantize_base": is_nf4, **keys})
    except AdapterError as error:
        raise ConfigError(str(error)) from error


def _write(file: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            try:
                opened.write(text)
                opened.flush()
            except OSError:
                file.unlink()
                raise
    except FileExistsError as error:
        raise OutputError(f"{file} exists and would be overwritten. Choose another.") from error
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}.") from error


def _read(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise MissingFileError(f"{file} is not there. Name a JSON file with both dictionaries.")
    try:
        sample = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not isinstance(sample, dict):
        raise ConfigError(f"{file} must hold an object, not a {type(sample).__name__}.")
    return sample


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of which no key is there twice, since only the last would count."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(map(repr, twice))} is there twice")
    return dict(pairs)
