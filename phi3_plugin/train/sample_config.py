"""The two dictionaries of Microsoft's fine-tuning samples, as a YAML for our recipe.

Their ``training_config`` is what transformers' TrainingArguments takes, their ``peft_config`` what
PEFT's LoraConfig takes. Every key is mapped, or has no effect here and is named in a note, or is
refused by name: a key that is skipped in silence is a run that does something else.

Source: sample_finetune.py and the notebooks of microsoft/Phi-3CookBook, code/03 and 04;
transformers 5.23 TrainingArguments for what a key that is not given means.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_plugin.errors import ConfigError
from phi3_plugin.train.sample_adapter import adapter_section
from phi3_plugin.train.sample_keys import (
    HANDLED,
    NO_EFFECT,
    ONLY,
    OPTIMIZERS,
    SAME,
    SCHEDULES,
    ZERO_IS_NULL,
)
from phi3_plugin.train.sample_values import TRAINING, wrong_values
from phi3_plugin.train.stock_keys import closest, shown

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
            :data:`phi3_plugin.train.sample_targets.TARGETS`.

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
