"""The dictionaries of Microsoft's fine-tuning samples, as a YAML for our recipe.

Their ``training_config`` is what transformers' TrainingArguments takes, their ``peft_config`` what
PEFT's LoraConfig takes. Every key is mapped, or has no effect here and is named in a note, or is
refused by name: a key that is skipped in silence is a run that does something else.

Source: sample_finetune.py and the notebooks of microsoft/Phi-3CookBook, code/03 and 04; for what a
key that is not given means, transformers 5.23 TrainingArguments and BitsAndBytesConfig, and PEFT
0.21.2 LoraConfig.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import yaml

from phi3_plugin.checkpoint.peft_config import IRRELEVANT_KEYS, UNSUPPORTED
from phi3_plugin.config import read_json_object
from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError, OutputError
from phi3_plugin.models.lora_settings import EMBEDDING, FUSED, HEAD, PARTS, TARGETS, LoRASettings
from phi3_plugin.options import (
    Advice,
    AnyText,
    Count,
    ImportConfigOptions,
    Kind,
    Positive,
    Section,
    Seed,
    Share,
    Switch,
    Texts,
    closest,
    is_number,
    is_whole,
    mistakes,
    spelled,
)
from phi3_plugin.pages import write_files

# What each key is here: one line a key.


class Rule(NamedTuple):
    """What a key of transformers or PEFT is here."""

    takes: Any = None
    """What it may be there, an annotation of `options`; None is anything."""
    ours: str | None = None
    """Our key, if it takes the value as it is; None: it decides together with others, below."""
    note: str | None = None
    """Why it has no effect."""


def one_of(*values: Any, instead: str = "") -> Rule:
    """Return the rule of a key that may have these values; ``instead`` is said of another one."""
    words = f"one of {', '.join(map(spelled, values))}" if len(values) > 1 else spelled(values[0])

    def accepts(value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in values)

    takes = Annotated[Any, Kind(words, accepts)]
    return Rule(Annotated[takes, Advice(instead)] if instead else takes)


Whole = Annotated[int, Kind("a whole number", is_whole)]
FromZero = Annotated[float, Kind("a number from 0 on", partial(is_number, least=0))]
Ratio = Annotated[float, Kind("from 0 to 1", partial(is_number, least=0, most=1))]
LayerNumbers = Annotated[
    list[int],
    Kind(
        "a list of layer numbers, as in [0, 1]",
        lambda v: isinstance(v, list) and all(is_whole(n, 0) for n in v),
    ),
]
# What OmegaConf would replace by a variable of the environment, or take as not set.
PlainText = Annotated[
    str,
    Kind("text without ${ or ???", lambda v: isinstance(v, str) and "${" not in v and v != "???"),
]

ADAM = {"_component_": "torch.optim.AdamW", "fused": True}
ADAM_8BIT = {"_component_": "torchao.optim.AdamW8bit"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), ADAM),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), ADAM_8BIT),
}
SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant")
LORA_INITS = {True: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}

SHARDS = "Remove it: `tune run --nproc_per_node N` shards the model."

TRAINING = {
    "output_dir": Rule(PlainText, "output_dir"),
    "learning_rate": Rule(Positive, "optimizer.lr"),
    "weight_decay": Rule(FromZero, "optimizer.weight_decay"),
    "adam_epsilon": Rule(Positive, "optimizer.eps"),
    "adam_beta1": Rule(Share),
    "adam_beta2": Rule(Share),
    "optim": one_of(*OPTIMIZERS),
    "max_grad_norm": Rule(FromZero | None, "clip_grad_norm"),
    "lr_scheduler_type": one_of(*SCHEDULES),
    "warmup_ratio": Rule(Ratio),
    "warmup_steps": Rule(FromZero),
    "per_device_train_batch_size": Rule(Count, "batch_size"),
    "gradient_accumulation_steps": Rule(Count, "gradient_accumulation_steps"),
    "num_train_epochs": Rule(Positive),
    "max_steps": Rule(Whole),
    "seed": Rule(Seed, "seed"),
    "bf16": Rule(Switch),
    "fp16": Rule(Switch),
    "gradient_checkpointing": Rule(Switch, "enable_activation_checkpointing"),
    "group_by_length": Rule(Switch, "group_by_length"),
    "max_seq_length": Rule(Count | None, "tokenizer.max_seq_len"),
    "max_length": Rule(Count | None, "tokenizer.max_seq_len"),
    "packing": Rule(Switch, "dataset.packed"),
    "save_steps": Rule(Count | None),
    "save_strategy": one_of("steps", "epoch", "no"),
    "save_total_limit": Rule(Seed | None, "save_total_limit"),
    "logging_steps": Rule(Count, "log_every_n_steps"),
    "report_to": one_of(
        *("tensorboard", ["tensorboard"], "none", ["none"], [], None),
        instead="Set metric_logger in the YAML instead.",
    ),
    "do_eval": Rule(Switch),
    "eval_steps": Rule(Count | None),
    "eval_strategy": one_of("no", "steps"),
    "evaluation_strategy": one_of("no", "steps"),
    "load_best_model_at_end": Rule(Switch),
    "metric_for_best_model": one_of("loss", "eval_loss", None),
    "greater_is_better": one_of(False, None),
    **dict.fromkeys(
        ("log_level", "disable_tqdm", "logging_dir", "run_name"), Rule(note="it is for the log")
    ),
    "logging_first_step": Rule(note="every step is logged"),
    **dict.fromkeys(
        ("dataset_text_field", "remove_unused_columns"), Rule(note="dataset.* chooses columns")
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory"), Rule(note="data is tokenized first")
    ),
    "data_seed": Rule(note="seed orders the data"),
    "do_train": Rule(note="the recipe is for training"),
    "per_device_eval_batch_size": Rule(note="validation takes batch_size; its loss is the same"),
    "overwrite_output_dir": Rule(
        note="a run that is there is never overwritten: name another output_dir"
    ),
    "tf32": one_of(False, None, instead="Remove it."),
    "logging_strategy": one_of("steps", instead='Use "steps".'),
    "gradient_checkpointing_kwargs": one_of(
        {"use_reentrant": False}, None, instead="Use use_reentrant False."
    ),
    "push_to_hub": one_of(False, instead="Push the folder output_dir/final after the run."),
    "deepspeed": one_of(None, instead=SHARDS),
    "fsdp": one_of(None, "", [], instead=SHARDS),
    "auto_find_batch_size": one_of(False, instead="Set per_device_train_batch_size."),
    "resume_from_checkpoint": one_of(None, False, instead="Add resume=auto to the command."),
    "neftune_noise_alpha": Rule(Positive | None, "neftune_alpha"),
    "label_smoothing_factor": Rule(Share),
}
"""Of TrainingArguments; `packing` and the two names of a length are handed to the trainer."""

PEFT = {
    **dict.fromkeys(
        (*UNSUPPORTED, *IRRELEVANT_KEYS, "base_model_name_or_path"),
        one_of(None, False, {}, [], instead="Remove it."),
    ),
    "r": Rule(Count, "lora_rank"),
    "lora_alpha": Rule(Count, "lora_alpha"),
    "lora_dropout": Rule(Share, "lora_dropout"),
    "use_rslora": Rule(Switch, "use_rslora"),
    "use_dora": Rule(Switch, "use_dora"),
    "target_modules": Rule(AnyText | Texts | None),
    "modules_to_save": Rule(Texts | None),
    "rank_pattern": Rule(Section | None),
    "alpha_pattern": Rule(Section | None),
    "layers_to_transform": Rule(LayerNumbers | Seed | None),
    "init_lora_weights": one_of(*LORA_INITS),
    "task_type": one_of("CAUSAL_LM", None, instead='Use "CAUSAL_LM".'),
    "peft_type": one_of("LORA", None, instead='Use "LORA".'),
    # A Phi-3 has no biases, so none is trained whatever is asked for
    "bias": one_of("none", "all", "lora_only", instead='Use "none".'),
    "fan_in_fan_out": one_of(False, instead="Set it to false."),
    "inference_mode": one_of(False, instead="Set it to false."),
    "exclude_modules": one_of(None, [], instead="Leave them out of target_modules."),
    "layers_pattern": one_of(None, "layers", ["layers"], instead="Remove it."),
}
"""Of LoraConfig."""

NOT_GIVEN = {
    "load_in_4bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
}
"""What the keys of BitsAndBytesConfig are if they are not given."""

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What BitsAndBytesConfig calls them."""
QUANTIZED = {
    "load_in_4bit": one_of(True, False),
    "bnb_4bit_quant_type": one_of("nf4", instead="If it is not given, it is 'fp4'."),
    "bnb_4bit_use_double_quant": one_of(True, instead="If it is not given, it is False."),
    "bnb_4bit_compute_dtype": one_of(
        *COMPUTE_DTYPES.values(), *(f"torch.{name}" for name in COMPUTE_DTYPES.values())
    ),
}
"""Of BitsAndBytesConfig: what an NF4 base of ours can be asked for; its compute type is dtype."""

TOP = ("training_config", "peft_config", "bnb_config", "max_seq_length", "packing")
"""What a sample may hold; the first two must be there."""


# The translation.


@dataclass
class Translation:
    """A YAML in the making."""

    yaml: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What the user should know, a line each."""
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Set ``section.key`` or ``key``."""
        section, _, name = key.rpartition(".")
        (self.yaml.setdefault(section, {}) if section else self.yaml)[name] = value

    def take(
        self, given: Mapping[str, Any], rules: Mapping[str, Rule], section: str = ""
    ) -> dict[str, Any]:
        """Note and refuse what the rules say; return the values that are right.

        Args:
            given: By the names that the keys have there.
            rules: A table.
            section: What stands before each key in a problem.
        """
        right = {}
        for key, value in given.items():
            rule = rules.get(key)
            if rule is None:
                advice = "Remove it, and set its counterpart in the YAML."
                meant = closest(key, rules)
                advice = f"Did you mean {meant!r}?" if meant else advice
                self.problems.append(f"{section}{key}: it is not among the known keys. {advice}")
            elif rule.note:
                self.notes.append(f"{key}: {spelled(value)} has no effect: {rule.note}.")
            elif wrong := mistakes(section + key, value, rule.takes) if rule.takes else []:
                self.problems += wrong
            else:
                right[key] = value
        return right


def translate(sample: Mapping[str, Any], targets: str = "as-published") -> Translation:
    """Turn the dictionaries of a sample into the keys of our recipe.

    Args:
        sample: ``training_config`` and ``peft_config``; also ``bnb_config``, what
            BitsAndBytesConfig takes, and ``max_seq_length`` and ``packing``, which the samples
            hand to their trainer.
        targets: What target_modules that a Phi-3 does not have mean, see :func:`modules`.

    Returns:
        YAML and notes, without problems.

    Raises:
        ConfigError: A key is unknown or asks for what this recipe does not do; all, a line each.
    """
    missing = [name for name in TOP[:2] if not isinstance(sample.get(name), Mapping)]
    if missing:
        raise ConfigError(
            f"The sample has no {' and no '.join(missing)}. It must be one JSON object with the "
            "two dictionaries under these names."
        )
    folder = "${checkpoint_dir}"
    out = Translation(  # what a sample that says nothing is, in the order of our configs
        {
            "checkpoint_dir": None,
            "output_dir": None,
            "model": {},
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
            "save_total_limit": None,
            "resume": "never",
            "val_fraction": 0.0,
            "log_every_n_steps": 500,
        }
    )
    out.take({key: sample[key] for key in sample if key not in TOP}, dict.fromkeys(TOP, Rule()))
    handed = {key: sample[key] for key in TOP[3:] if key in sample}
    _training({**sample["training_config"], **handed}, out)
    of_training = map(sample["training_config"].get, ("max_seq_length", "max_length"))
    given = [handed.get("max_seq_length"), *of_training]
    lengths = dict.fromkeys(spelled(length) for length in given if length is not None)
    if len(lengths) > 1:
        out.problems.append(
            f"max_seq_length and max_length: {' and '.join(lengths)} differ. Keep one."
        )
    is_nf4 = _base(sample.get("bnb_config"), out)
    _adapter(sample["peft_config"], targets, is_nf4, out)
    if out.problems:
        raise ConfigError("\n".join(out.problems))
    return out


def _training(training: Mapping[str, Any], out: Translation) -> None:
    """Translate the `training_config`, with what is handed to the trainer beside it."""
    given = out.take(training, TRAINING)
    get, problems, notes = given.get, out.problems, out.notes
    for key, value in given.items():
        if ours := TRAINING[key].ours:
            # 0 is no limit there
            no_limit = value == 0 and key in ("max_grad_norm", "save_total_limit")
            out.put(ours, None if no_limit else value)
    if get("packing") is True and not (get("max_seq_length") or get("max_length")):
        problems.append("packing: True needs the length of a pack. Add max_seq_length.")
    if get("bf16") and get("fp16"):
        problems.append("fp16: True conflicts with bf16: True. Keep one.")
    out.put("dtype", "bf16" if get("bf16") else "fp16" if get("fp16") else "fp32")

    steps, epochs = get("max_steps", -1), get("num_train_epochs", 3)
    if steps > 0:  # there it overrules the epochs, here the shorter of the two counts
        out.yaml |= {"max_steps": steps, "epochs": steps}
    elif float(epochs).is_integer():
        out.put("epochs", int(epochs))
    else:
        problems.append(f"num_train_epochs: {epochs} must be whole. Set max_steps instead.")

    schedule = get("lr_scheduler_type", "linear")
    if schedule != "constant":
        name = f"phi3_plugin.train.{schedule.removesuffix('_with_warmup')}_with_warmup"
        warmup = {"warmup_ratio": get("warmup_ratio", 0.0)}
        if count := get("warmup_steps", 0):  # below 1 a share, since transformers 5
            warmup = {"num_warmup_steps": int(count)} if count >= 1 else {"warmup_ratio": count}
        out.put("lr_scheduler", {"_component_": name, **warmup})

    optimizer = get("optim", "adamw_torch")
    if optimizer.startswith("paged"):
        notes.append(f"optim: {spelled(optimizer)} becomes an optimizer that pages nothing out.")
    out.put("optimizer", {**OPTIMIZERS[optimizer], **out.yaml["optimizer"]})
    betas = [get("adam_beta1", 0.9), get("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        out.put("optimizer.betas", betas)

    if smoothing := get("label_smoothing_factor"):
        loss = "phi3_plugin.train.losses.sft"
        out.put("loss", {"_component_": loss, "label_smoothing": smoothing})

    saving = get("save_strategy", "steps")
    out.put("save_every_n_steps", get("save_steps", 500) if saving == "steps" else None)
    out.put("save_every_epoch", saving == "epoch")
    if get("report_to") in ("tensorboard", ["tensorboard"]):
        logger = "torchtune.training.metric_logging.TensorBoardLogger"
        out.put("metric_logger", {"_component_": logger, "log_dir": "${output_dir}"})

    validating = get("eval_strategy", get("evaluation_strategy", "no"))
    if validating == "steps":
        out.put("run_val_every_n_steps", get("eval_steps") or out.yaml["log_every_n_steps"])
    if validating != "no" or get("do_eval"):
        out.put("val_fraction", 0.05)
        notes.append("val_fraction: 0.05 is split off the data, the share of the notebooks.")
    if get("load_best_model_at_end") and not out.yaml["val_fraction"]:
        problems.append("load_best_model_at_end: True needs eval_strategy: steps.")
    elif get("load_best_model_at_end"):
        out.put("keep_best", True)
        notes.append("load_best_model_at_end: the best adapter is in best, the last in final.")


def _base(quantized: Any, out: Translation) -> bool:
    """Check a `bnb_config`; return whether it asks for an NF4 base."""
    if quantized is None:
        return False
    if not isinstance(quantized, Mapping):
        line = f"bnb_config: {spelled(quantized)} must be what BitsAndBytesConfig takes, or null."
        out.problems.append(line)
        return False
    is_nf4 = quantized.get("load_in_4bit") is True
    asked = {**NOT_GIVEN, **quantized} if is_nf4 else quantized
    out.take(asked, QUANTIZED, "bnb_config.")
    dtype, kind = out.yaml["dtype"], str(asked.get("bnb_4bit_compute_dtype"))
    if is_nf4 and kind.removeprefix("torch.") != COMPUTE_DTYPES[dtype]:
        line = f"bnb_4bit_compute_dtype: {spelled(kind)} has no effect: dtype is {dtype}."
        out.notes.append(line)
    return is_nf4


def _adapter(peft: Mapping[str, Any], targets: str, is_nf4: bool, out: Translation) -> None:
    """Translate the `peft_config` into the model section."""
    given = out.take(peft, PEFT, "peft_config.")
    kind = "qlora_phi3" if is_nf4 else "lora_phi3"
    model = out.yaml["model"]
    model |= {"_component_": f"phi3_plugin.models.{kind}", "checkpoint_dir": "${checkpoint_dir}"}
    model |= {"lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.0}
    model |= {PEFT[key].ours: value for key, value in given.items() if PEFT[key].ours and value}
    if "target_modules" in given or "target_modules" not in peft:
        names = modules(given.get("target_modules"), targets, out)
        layers = [name for name in names if name not in (HEAD, EMBEDDING)]
        model["lora_attn_modules"] = layers
        model["apply_lora_to_mlp"] = any(FUSED.get(n, n) in TARGETS[2:] for n in layers)
        model["apply_lora_to_output"] = HEAD in names
        if EMBEDDING in names:
            model["apply_lora_to_embedding"] = True
    for key in ("rank_pattern", "alpha_pattern"):
        if given.get(key):
            model[key] = _our_names(key, given[key], out)
    if whole := given.get("modules_to_save"):
        model["modules_to_save"] = [(path(name) or (0, name))[1] for name in whole]
    if (numbers := given.get("layers_to_transform")) not in (None, []):
        model["layers_to_transform"] = numbers if isinstance(numbers, list) else [numbers]

    start = given.get("init_lora_weights", True)
    if start is not True:
        model["lora_init"] = LORA_INITS[start]
    if start == "pissa" and is_nf4:
        out.problems.append(
            "init_lora_weights: 'pissa' needs a base that is not quantized. Remove bnb_config."
        )
    if start == "loftq" and not is_nf4:
        out.problems.append(
            "init_lora_weights: 'loftq' makes up for what NF4 loses. Add bnb_config with "
            "load_in_4bit, bnb_4bit_quant_type nf4 and bnb_4bit_use_double_quant."
        )


# Which layers the names in a `peft_config` mean, as PEFT would find them in a Phi-3.
# Source: PEFT 0.21.2 ``check_target_module_exists`` and ``get_pattern_key``.

_PATH = re.compile(r"(?:(?:model\.)?layers\.(\d+)\.|(\d+)\.)?(?:(self_attn|mlp)\.)?(\w+)")
_NOT_LINEAR = re.compile(r"(?:.*\.)?(?:model|layers|\d+|self_attn|mlp|\w*norm)")
"""What is in a Phi-3 and is no linear layer; PEFT ends with an error there."""


def path(name: str) -> tuple[int | None, str] | None:
    """Return layer and target of a name in a Phi-3 of transformers, or None if it is not there.

    Names of parts count as if the layer were not fused.

    Args:
        name: As in PEFT, from any dot on: ``o_proj``, ``mlp.down_proj``,
            ``layers.3.self_attn.o_proj``.
    """
    if name == "model.embed_tokens":
        return None, EMBEDDING
    if not (words := _PATH.fullmatch(name)):
        return None
    layer, block, target = words[1] or words[2], words[3], words[4]
    if target in (HEAD, EMBEDDING):
        return None if layer or block else (None, target)
    inside = "mlp" if FUSED.get(target, target) in TARGETS[2:] else "self_attn"
    known = target in TARGETS or target in FUSED
    if not known or block not in (None, inside) or (layer and not block):
        return None
    return (int(layer) if layer else None), target


def modules(given: Any, targets: str, out: Translation) -> list[str]:
    """Return the layers that get an adapter, as our recipe names them.

    Args:
        given: ``target_modules``, text or a list of it.
        targets: How to read names of parts. PEFT finds none of them in a Phi-3, and leaves them
            out without a word: ``as-published`` does the same, and says so. ``as-intended`` takes
            the fused layer where all of its parts are named, and the parts where not;
            ``as-intended-parts`` always the parts.
        out: Is told notes and problems.
    """
    if given == "all-linear":
        return [*TARGETS]
    if isinstance(given, str):
        line = f"target_modules: {spelled(given)} is a pattern for PEFT. List the names instead."
        out.problems.append(line)
        return []
    found = {name: path(name) for name in given or ()}
    problems = []
    for name, place in found.items():
        if place and place[0] is not None:
            problems.append(
                f"target_modules: {spelled(name)} is in one layer. Name {place[1]!r}, and the "
                "layer in layers_to_transform."
            )
        elif not place and _NOT_LINEAR.fullmatch(name):
            problems.append(f"target_modules: {spelled(name)} is no linear layer. Remove it.")

    plain = [place[1] if place else name for name, place in found.items()]
    available = {*TARGETS, HEAD, EMBEDDING}
    if targets != "as-published":
        available |= {*FUSED}
        # The fused layer in the place of its parts where they are all there, or it is itself
        whole = {fused for fused, parts in PARTS.items() if fused in plain
                 or (targets == "as-intended" and {*parts} <= {*plain})}  # fmt: skip
        plain = [FUSED[name] if FUSED.get(name) in whole else name for name in plain]
    kept = [name for name in dict.fromkeys(plain) if name in available]
    lost = [name for name, place in found.items() if not place or place[1] not in available]
    if not kept and not problems:
        problems.append(
            f"target_modules: {spelled(given)} matches no layer of a Phi-3. "
            f"It has {', '.join(TARGETS)}. For names of their parts add --targets as-intended."
        )
    out.problems += problems
    if lost and not problems:
        hint = " Their layers are fused: --targets as-intended." if {*FUSED} & {*lost} else ""
        names = ", ".join(name if name.isidentifier() else repr(name) for name in lost)
        out.notes.append(f"target_modules: these match nothing in a Phi-3: {names}.{hint}")
    return kept


def _our_names(key: str, given: Mapping[str, Any], out: Translation) -> dict[str, Any]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` with our names.

    Of the names that fit a layer, the first counts in PEFT; here the layer's own.
    """
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if not (place := path(name)):
            out.problems.append(
                f"{key}: {name!r} is no layer of a Phi-3. Name a target as in o_proj, or with its "
                "layer as in layers.3.self_attn.o_proj."
            )
            continue
        layer, target = place
        if target in ours:
            line = f"{key}: {name!r} is never reached after {target!r}. Put it first."
            out.problems.append(line)
        ours[target if layer is None else f"{layer}.{target}"] = value
    return ours


# `phi3-tune import-config`.

HEADER = """# {o.sample.name} as a YAML for our recipe; --targets {o.targets}.
#   tune run phi3_lora_finetune --config {o.output} \\
#     checkpoint_dir=PATH dataset.source=DATA
"""


def run(o: ImportConfigOptions) -> int:
    """Write the YAML, print what the user should know, and return the exit code.

    Raises:
        ConfigError: The file is not JSON, or asks for what our recipe does not do.
        MissingFileError: There is no such file.
        OutputError: The YAML is there already, or cannot be written.
    """
    if not o.sample.is_file():
        raise MissingFileError(f"{o.sample} is not there. Name a JSON file with both dictionaries.")
    out = translate(read_json_object(o.sample, unique=True), o.targets)
    keys = {**out.yaml["model"], "use_dora": out.yaml["model"].get("use_dora", False)}
    del keys["checkpoint_dir"]
    try:  # what building the model would refuse, where that needs no checkpoint
        LoRASettings(quantize_base=keys.pop("_component_").endswith(".qlora_phi3"), **keys)
    except AdapterError as error:
        raise ConfigError(str(error)) from error
    if o.output.exists():
        raise OutputError(f"{o.output} exists and would be overwritten. Choose another.")
    notes = "".join(f"# {note}\n" for note in out.notes)
    text = yaml.safe_dump(out.yaml, sort_keys=False, allow_unicode=True)
    text = HEADER.format(o=o) + notes + text
    write_files(o.output.parent, {o.output.name: text}, "Choose another place.")
    print("\n".join([*out.notes, f"Wrote {o.output}."]))
    return 0
