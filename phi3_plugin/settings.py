"""What a training YAML may say, read strictly: every mistake at once, before any work.

The YAML is that of torchtune's LoRA recipes with more keys. One YAML drives their recipes and ours:
a key of theirs that means nothing here is accepted at the value under which it changes nothing, and
refused at any other, for a key that is skipped in silence is a run that does something else.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from inspect import Parameter, signature
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _get_component_from_path

from phi3_plugin import options
from phi3_plugin.config import checkpoint_folder
from phi3_plugin.errors import ConfigError, MissingFileError
from phi3_plugin.hub import REPOSITORY, has_token, is_repository
from phi3_plugin.options import (
    AdapterFolder,
    Advice,
    AnyText,
    Checkpoint,
    Count,
    Dtype,
    Folder,
    Kind,
    OnResume,
    PartsOnResume,
    Positive,
    Section,
    Seed,
    Share,
    Switch,
    Texts,
    Unresolved,
    WideDtype,
    closest,
    marks,
    spelled,
    unknown_key,
    unset,
)

_T = TypeVar("_T")


def bytes_of(amount: Any) -> int | None:
    """Return the bytes of an amount like ``16GiB``, ``12.5 GB`` or 8000000000; None if it is none.

    Args:
        amount: Of any type, as a YAML may hold it.
    """
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    if isinstance(amount, bool) or not isinstance(amount, (int, float, str)):
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) *([a-z]*)", str(amount).strip().lower())
    size = float(parts[1]) * units.get(parts[2], 0) if parts else 0
    return int(size) or None if isfinite(size) else None


Memory = Annotated[
    int, Kind("an amount of memory: 16GiB, 12GB or a number of bytes", bytes_of, bytes_of)
]
Component = Annotated[
    dict[str, Any],
    Kind(
        "a section with _component_",
        lambda v: isinstance(v, dict) and isinstance(v.get("_component_"), str),
    ),
]
Resume = Annotated[
    str,
    Kind(
        "auto, never or a checkpoint folder that exists",
        lambda v: isinstance(v, str) and (v in ("auto", "never") or Path(v).is_dir()),
    ),
]
Repository = Annotated[
    str,
    Kind(
        "a name of the Hub's, USER/NAME",
        lambda v: isinstance(v, str) and REPOSITORY.fullmatch(v) is not None,
    ),
]


class Handed(NamedTuple):
    """Marks a key that names a component, and says what the recipe itself hands to it."""

    positional: int = 0
    """So many arguments by position."""
    name: str | None = None
    """One by this name."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run, with the keys as its YAML spells them.

    An annotation says all that there is to check of a key by itself, and by an `OnResume` whether
    a run may go on with another value.
    """

    checkpoint_dir: Annotated[Checkpoint, OnResume.CONTENT]
    output_dir: Annotated[Folder, OnResume.FREE]
    model: Annotated[Component, Handed(), OnResume.CONTENT]
    tokenizer: Annotated[Component, Handed(), OnResume.CONTENT]
    dataset: Annotated[
        Component,
        Handed(1),
        Advice("For several files, let dataset.source be a folder or a glob."),
        OnResume.CONTENT,
    ]
    dataset_val: Annotated[Component | None, Handed(1), OnResume.CONTENT] = None
    val_fraction: Annotated[Share | None, OnResume.CONTENT] = None
    """Share of the training set that is split off for validation, chosen by the seed; null is a
    twentieth, of at most 200 samples, where there are 200 or more and no dataset_val."""
    batch_size: Annotated[Count, OnResume.CONTENT]
    """Samples that one device sees at once."""
    gradient_accumulation_steps: Annotated[Count, OnResume.CONTENT] = 1
    collate_fn: Annotated[AnyText, Handed(1, "padding_idx"), OnResume.HONOURED] = (
        "phi3_plugin.data.collate.concatenate"
    )
    shuffle: Annotated[Switch, OnResume.CONTENT] = True
    group_by_length: Annotated[Switch, OnResume.CONTENT] = False
    """Steps of samples of similar length: less padding, where collate_fn pads."""
    seed: Annotated[Seed, OnResume.CONTENT] = 0
    """null is 0."""

    init_adapter: Annotated[AdapterFolder | None, OnResume.REFUSED] = None
    """An adapter, anyone's, to train on from; the model's keys must be those that it fits."""
    epochs: Annotated[Count, OnResume.HONOURED] = 1
    max_steps: Annotated[Count | None, OnResume.HONOURED] = None
    """Optimizer steps of the whole run, instead of its epochs; the data is repeated for them."""
    optimizer: Annotated[
        Component,
        Handed(1),
        OnResume.REFUSED,  # what else there is, momentum or amsgrad, decides what is kept
        PartsOnResume(
            honoured=("lr", "weight_decay", "betas", "eps", "dampening", "nesterov", "alpha"),
            free=("fused", "foreach", "capturable", "differentiable"),
        ),
    ]
    lr_scheduler: Annotated[
        Component | None, Handed(1, "num_training_steps"), OnResume.HONOURED
    ] = None
    lora_plus_ratio: Annotated[Positive | None, OnResume.HONOURED] = None
    """The learning rate of the B matrices, as a multiple of that of the A matrices."""
    loss: Annotated[Component | None, Handed(), OnResume.REFUSED] = None
    """null, or any cross entropy, is that of the labelled tokens; `phi3_plugin.train.losses` has
    those that compare answers, dpo, simpo, orpo and kto, and distill, which learns of a teacher."""
    reference: Annotated[Literal["live", "cached"], OnResume.FREE] = "live"
    """When the base without its adapter, with which dpo and kto compare, is computed: in each step,
    or once before the first, and kept with the tokenized data."""
    teacher_dir: Annotated[Checkpoint | None, OnResume.CONTENT] = None
    """Of distill: the teacher's checkpoint; null is the base of the student itself, which is in
    memory once for both."""
    teacher_adapter: Annotated[AdapterFolder | None, OnResume.CONTENT] = None
    """An adapter, anyone's, of the teacher's base."""
    teacher_quantized: Annotated[Switch, OnResume.REFUSED] = False
    """Whether the checkpoint of teacher_dir is stored in NF4."""
    clip_grad_norm: Annotated[Positive | None, OnResume.HONOURED] = None
    max_nonfinite_steps: Annotated[Count, OnResume.FREE] = 3
    """Steps in a row without a finite gradient, after which the run stops."""

    dtype: Annotated[
        Dtype,
        Advice("fp16 is for cards without bf16, such as T4 and V100."),
        OnResume.REFUSED,
    ]
    """fp16 keeps adapters and optimizer in fp32 and scales the loss."""
    adapter_dtype: Annotated[WideDtype | None, OnResume.REFUSED] = "fp32"
    """null is dtype; adapters in fp32 over a base in bf16 keep updates that bf16 rounds away."""
    device: Annotated[
        Literal["cpu", "cuda", "xpu", "mps"] | None,
        Advice("Choose a card with CUDA_VISIBLE_DEVICES."),
        OnResume.FREE,
    ] = None
    """null is a GPU that CUDA or ROCm drives, else the CPU."""
    neftune_alpha: Annotated[Positive | None, OnResume.HONOURED] = None
    """NEFTune: noise on the embeddings in training, 5 to begin with; null is none."""
    compile: Annotated[Switch | None, OnResume.FREE] = None
    """Compile each layer; null does on CUDA in a long run, where a trial shows that it can be."""
    enable_activation_checkpointing: Annotated[Switch | Count, OnResume.FREE] = False
    """A number n recomputes every n-th layer only."""
    memory_budget: Annotated[Memory | None, OnResume.FREE] = None
    """Recompute as few layers as the memory of one device allows, instead of naming them; bytes."""
    enable_activation_offloading: Annotated[Switch, OnResume.FREE] = False
    """Keep what recomputed layers need in the CPU's memory; on a GPU."""
    fsdp_cpu_offload: Annotated[Switch, OnResume.FREE] = False
    fsdp_reshard_after_forward: Annotated[Switch, OnResume.FREE] = True
    fsdp_replicas: Annotated[Count, OnResume.FREE] = 1
    """Whole copies of the model; the processes of a copy share it. As many copies as processes
    is the fastest where a model fits one device: only gradients travel then."""

    save_every_n_steps: Annotated[Count | None, OnResume.FREE] = 100
    save_every_epoch: Annotated[Switch, OnResume.FREE] = True
    save_total_limit: Annotated[Count | None, OnResume.FREE] = 2
    """Checkpoints kept beside best and final; the oldest go first. null keeps all."""
    save_in_background: Annotated[Switch, OnResume.FREE] = False
    """Train on while a checkpoint is written; takes a copy of it in the CPU's memory."""
    resume: Annotated[Resume, OnResume.FREE] = "auto"
    """auto goes on from the newest checkpoint of output_dir if there is one."""
    checkpointer: Annotated[Section | None, OnResume.FREE] = None
    """For torchtune's recipes, whose other keys must not ask for more; this one reads `card`."""
    run_val_every_n_steps: Annotated[Count | None, OnResume.HONOURED] = 50
    """Where there is validation data; null validates at the end alone."""
    early_stop_patience: Annotated[Count | None, OnResume.HONOURED] = None
    """Validations without an improvement, after which the run stops."""
    keep_best: Annotated[Switch, OnResume.FREE] = True
    """Save a checkpoint at each new lowest validation loss, as output_dir/best."""

    metric_logger: Annotated[Component | None, Handed(), OnResume.FREE] = None
    log_every_n_steps: Annotated[Count, OnResume.FREE] = 1
    sample_prompts: Annotated[Texts, OnResume.HONOURED] = field(default_factory=list)
    """Questions answered before and after training and at each validation, for the report."""
    sample_max_new_tokens: Annotated[Count, OnResume.FREE] = 64
    """Tokens of such an answer, at most."""
    plan: Annotated[Switch | Count, OnResume.FREE] = False
    """Print what the run would take, for so many devices, and do nothing."""
    report: Annotated[Switch, OnResume.FREE] = True
    prove: Annotated[Switch, OnResume.FREE] = True
    """Compare the final adapter's logits in PEFT with ours, if PEFT is installed and memory is
    there."""
    push_to_hub: Annotated[Repository | None, OnResume.FREE] = None
    """USER/NAME: upload the result to the Hub, see docs/hub.md."""


HINTS = get_type_hints(Settings, include_extras=True)
"""The annotation of each key."""


def read(cfg: DictConfig, processes: int | None = None) -> Settings:
    """Check a configuration, YAML and command line merged.

    Args:
        cfg: As torchtune's ``config.parse`` hands it to a recipe.
        processes: That the run is to have; None: as many as this one is of.

    Returns:
        The settings; sections are plain dictionaries with all interpolations resolved.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    given = options.resolved(cfg)
    if found := settings_problems(given, processes):
        raise ConfigError("\n".join(found))
    return options.made(Settings, given)


def is_quantized(model: Mapping[str, Any]) -> bool:
    """Whether a run with this model trains over a base in NF4."""
    name = str(model["_component_"]).rpartition(".")[2]
    return bool(model.get("quantize_base", name.startswith("qlora_")))


def without_weights(cfg: DictConfig) -> DictConfig:
    """Return a configuration of what needs no weights: a base of the Hub is there without them."""
    small = {
        key: str(checkpoint_folder(base, weights=False))
        for key in ("checkpoint_dir", "teacher_dir")
        if isinstance(base := OmegaConf.select(cfg, key), str) and is_repository(base)
    }
    return cast("DictConfig", OmegaConf.merge(cfg, small)) if small else cfg


def read_beside(
    cfg: DictConfig, own: type[_T], processes: int | None = None
) -> tuple[Settings, _T]:
    """Check a configuration that also has keys of a recipe that trains nothing.

    Args:
        cfg: As for :func:`read`.
        own: Dataclass of the recipe's own keys.
        processes: As for :func:`read`.

    Raises:
        ConfigError: Something is wrong with the keys of either; all problems, one line each.
    """
    given = options.resolved(cfg)
    names = [f.name for f in fields(own)]  # type: ignore[arg-type]
    beside = {name: given.pop(name) for name in names if name in given}
    found = settings_problems(given, processes, names, trains=False)
    found += options.option_problems(own, beside, "this recipe")
    if found:
        raise ConfigError("\n".join(found))
    given |= {"teacher_dir": None, "teacher_adapter": None}  # which may have to be downloaded
    return options.made(Settings, given), options.made(own, beside)


def settings_problems(
    given: dict[str, Any],
    processes: int | None = None,
    others: Iterable[str] = (),
    *,
    trains: bool = True,
) -> list[str]:
    """Say what is wrong with the configuration of a training run, a line each.

    Args:
        given: The whole of it, resolved; ``key=null`` of the command line is tidied up in it.
        processes: That the run is to have; None: as many as this one is of.
        others: Keys that another reader has taken out.
        trains: Whether a run is to be made of it; else only model and data matter.
    """
    for key, value in given.items():
        if isinstance(value, dict) and value.get("_component_", ...) is None:
            given[key] = None  # what torchtune makes of `key=null`
    if given.get("seed", 0) is None:
        given["seed"] = 0
    given.update(own_distillation(given))
    if isinstance(given.get("loss"), dict):
        given["loss"] = own_loss(given["loss"])
    beside = (*STOCK_KEYS, *STOCK_DISTILLATION, "profiler", *others)
    found = options.option_problems(Settings, given, "this recipe", others=beside)
    given = {key: value for key, value in given.items() if not isinstance(value, Unresolved)}
    folder = given.get("checkpoint_dir")
    if isinstance(folder, str) and not is_repository(folder):  # which takes long, so it comes last
        try:
            checkpoint_folder(folder)
        except MissingFileError as error:
            found.append(str(error))
    for key in HINTS if trains else ("model", "tokenizer", "dataset", "dataset_val"):
        found += component_problems(key, given.get(key))
    found += data_conflicts(given)
    if not trains:
        return found
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", 1))
    if not any(line.startswith("optimizer") for line in found):
        found += optimizer_problems(given.get("optimizer"))
    return [
        *found,
        *logger_problems(given.get("metric_logger")),
        *upload_problems(given.get("push_to_hub")),
        *_checkpointer(given),
        *loss_problems(given),
        *distillation_problems(given),
        *stock_problems(given),
        *conflicts(given, processes),
    ]


# torchtune's own keys.

STOCK_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_steps_per_epoch": ((None,), "Use max_steps, which counts the steps of the whole run."),
    "resume_from_checkpoint": (
        (False,),
        "Use resume=auto, which goes on from the newest checkpoint if there is one.",
    ),
    "save_adapter_weights_only": (
        (True,),
        "Set it to True and merge the saved adapter with phi3-tune adapter merge.",
    ),
    "optimizer_in_bwd": ((False,), "Set it to False: the optimizer of an adapter is small."),
    "log_peak_memory_stats": ((True, False), "Set it to True or False."),
    "low_cpu_ram": ((False,), "Set it to False; dtype and model decide what memory it takes."),
    "cudnn_deterministic_mode": ((None,), "Set it to null."),
    "custom_sharded_layers": ((None, []), "Set it to null."),
}
"""Keys that mean nothing here: the values that change nothing, what to do instead of others."""

CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "CrossEntropyLoss", "LinearCrossEntropyLoss")
LOSS_NEUTRAL = {"ignore_index": -100, "reduction": "mean", "weight": None}
OF_ENTROPY = ("_component_", "num_output_chunks", "label_smoothing")
"""What a section of torch's or torchtune's cross entropy may hold, whatever the values."""


def stock_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Say which of torchtune's keys ask for something that this recipe does not do.

    Args:
        given: The whole configuration, resolved.
    """
    for key, (neutral, instead) in STOCK_KEYS.items():
        value = given.get(key, neutral[0])
        if not any(type(value) is type(one) and value == one for one in neutral):  # 0 is not False
            yield f"{key}: {spelled(value)} is not supported by this recipe. {instead}"
    profiler = given.get("profiler")
    enabled = profiler.get("enabled", False) if isinstance(profiler, Mapping) else profiler
    if enabled not in (None, False):
        yield (
            f"profiler.enabled: {spelled(enabled)} is not supported by this recipe. Set it to "
            "False, and profile with torchtune's own recipe."
        )


LOSSES = "phi3_plugin.train.losses."
"""What those of ours are called begins so."""

PLAIN_SFT = LOSSES + "sft"

STOCK_LOSSES = {"torchtune.rlhf.loss.DPOLoss": "dpo", "torchtune.rlhf.loss.dpo.DPOLoss": "dpo"}
"""Losses of torchtune's that are ones of ours, with the same options."""


def own_loss(section: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section of a loss under the name that it has here; None is plain cross entropy.

    One that asks for what no loss here does stays as it is.
    """
    name = str(section.get("_component_"))
    options = {key: value for key, value in section.items() if key != "_component_"}
    if name in STOCK_LOSSES:
        return {**section, "_component_": LOSSES + STOCK_LOSSES[name]}
    if name.rpartition(".")[2] in CROSS_ENTROPIES and all(
        key in OF_ENTROPY or LOSS_NEUTRAL.get(key, ...) == value for key, value in options.items()
    ):
        name, options = PLAIN_SFT, {"label_smoothing": options.get("label_smoothing", 0)}
        section = {"_component_": name, **options}
    return None if name == PLAIN_SFT and not any(options.values()) else section


STOCK_DISTILLATION = ("kd_loss", "kd_ratio", "teacher_model", "teacher_checkpointer")
"""Keys of torchtune's recipes of distillation."""

FORWARD_KLS = ("ForwardKLLoss", "ForwardKLWithChunkedOutputLoss")


def own_distillation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of this recipe that torchtune's keys of distillation stand for.

    Args:
        given: The whole configuration, resolved.
    """
    loss = given.get("loss")
    if not isinstance(loss, dict | None):
        return {}
    if _is_forward(given.get("kd_loss")) and (loss is None or own_loss(loss) is None):
        loss = {"_component_": LOSSES + "distill"}
    if loss is None or not _is_distill(loss.get("_component_")):
        return {}
    ratio = given.get("kd_ratio")
    found: dict[str, Any] = {"loss": loss if ratio is None else {"kd_ratio": ratio, **loss}}
    for key, (section, part) in TEACHER_SECTIONS.items():
        values = given.get(section)
        if given.get(key) is None and isinstance(values, Mapping) and values.get(part) is not None:
            found[key] = values[part]
    return found


TEACHER_SECTIONS = {
    "teacher_dir": ("teacher_checkpointer", "checkpoint_dir"),
    "teacher_quantized": ("teacher_model", "quantize_base"),
}
"""Where torchtune's recipes have what a key of this recipe says."""


def _is_forward(section: Any) -> bool:
    name = section.get("_component_") if isinstance(section, Mapping) else None
    return str(name).rpartition(".")[2] in FORWARD_KLS


def _is_distill(name: Any) -> bool:
    return str(name).lower() == LOSSES + "distill"


def distillation_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with a teacher by itself, and with the loss and the model for it.

    Args:
        given: The whole configuration, resolved.
    """
    loss, kd_loss = given.get("loss"), given.get("kd_loss")
    distills = isinstance(loss, Mapping) and _is_distill(loss.get("_component_"))
    if isinstance(kd_loss, Mapping) and not (distills and _is_forward(kd_loss)):
        yield (
            f"kd_loss._component_: {spelled(kd_loss.get('_component_'))} is not supported by "
            "this recipe with that loss. Use torchtune.modules.loss.ForwardKLLoss beside "
            f"cross entropy, or loss._component_={LOSSES}distill alone."
        )
    elif not distills:
        for key in ("teacher_dir", "teacher_adapter", "teacher_quantized", *STOCK_DISTILLATION):
            if given.get(key):
                yield (
                    f"{key}: {spelled(given[key])} is of no use to another loss than distill. Set "
                    f"loss._component_={LOSSES}distill, or remove it."
                )
    if not distills:
        return
    assert isinstance(loss, Mapping)
    ratio = given.get("kd_ratio")
    if ratio is not None and ratio != loss.get("kd_ratio", ratio):
        yield f"kd_ratio: {spelled(ratio)} conflicts with loss.kd_ratio. Keep one."
    for key, (section, part) in TEACHER_SECTIONS.items():
        values = given.get(section)
        value = values.get(part) if isinstance(values, Mapping) else None
        if value is not None and value != given.get(key):
            yield f"{section}.{part}: {spelled(value)} conflicts with {key}. Keep one."
    folder, adapter = given.get("teacher_dir"), given.get("teacher_adapter")
    if isinstance(folder, str) and not is_repository(folder):
        try:
            checkpoint_folder(folder)
        except MissingFileError as error:
            yield f"teacher_dir: {str(error).removeprefix('checkpoint_dir: ')}"
    if isinstance(adapter, str) and not Path(adapter).exists() and not is_repository(adapter):
        yield f"teacher_adapter: {adapter!r} is not there. Give the folder of an adapter."
    if folder is not None:
        return
    if given.get("teacher_quantized") is True:
        yield (
            "teacher_quantized: True is for a teacher_dir; the base of the student is stored as "
            "the student's model says."
        )
    if adapter is None and loss.get("kd_ratio") == 1:
        yield (
            "loss.kd_ratio: 1 with the base as the teacher leaves nothing to learn: the student "
            "starts as it. Name a teacher_dir or a teacher_adapter, or lower it."
        )
    if isinstance(model := given.get("model"), dict):
        other = "name a teacher_dir, which is loaded beside it"
        yield from _reference_problems(f"{LOSSES}distill", model, other)


def loss_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with a loss by itself, and with the data and the model for it.

    Args:
        given: The whole configuration, resolved.
    """
    section, data = given.get("loss"), given.get("dataset")
    named = data.get("_component_") if isinstance(data, Mapping) else None
    name = section.get("_component_") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or name == PLAIN_SFT:
        if named in PREFERENCE_DATASETS:
            yield (
                f"loss: {spelled(name)} would learn rejected answers as well. Compare them, as "
                f"with loss._component_={LOSSES}dpo, or learn the chosen ones alone with "
                "dataset._component_=phi3_plugin.data.chat_dataset."
            )
        return
    if str(name).rpartition(".")[2] in CROSS_ENTROPIES:
        for key, value in section.items():
            is_neutral = LOSS_NEUTRAL.get(key, ...) == value
            if key not in OF_ENTROPY and not is_neutral:
                yield f"loss.{key}: {spelled(value)} is not supported by this recipe. Remove it."
        return
    try:
        loss = component(str(name))
    except Exception:  # reported with the other components
        return
    if _is_distill(name):
        if named in PREFERENCE_DATASETS:
            yield (
                f"dataset._component_: {named} has rejected answers too, which distill would "
                "learn. Use phi3_plugin.data.chat_dataset."
            )
        return
    if not hasattr(loss, "compares"):  # as those of answers have
        yield (
            f"loss._component_: {spelled(name)} is no loss of this recipe. Use sft, distill, dpo, "
            f"simpo, orpo or kto, as in {LOSSES}dpo."
        )
        return
    for key in ("dataset", "dataset_val"):
        own = given.get(key)
        if isinstance(own, Mapping) and str(own.get("_component_")).startswith(CHAT_DATASETS):
            yield (
                f"{key}._component_: {spelled(own['_component_'])} has one answer a row, and "
                f"{name} compares answers. Use phi3_plugin.data.preference_dataset."
            )
    if given.get("collate_fn", CONCATENATE) != CONCATENATE:
        yield (
            f"collate_fn: {spelled(given['collate_fn'])} does not keep the answers of a row "
            f"together. Remove it: {CONCATENATE} does."
        )
    model = given.get("model")
    if loss.compares and isinstance(model, dict):
        yield from _reference_problems(str(name), model, f"use {LOSSES}simpo or orpo")


def _reference_problems(loss: str, model: Mapping[str, Any], other: str) -> Iterator[str]:
    """Say why a model has no base to compare with once it is trained, and what other way is."""
    instead = "Train adapters with phi3_plugin.models.lora_phi3"
    if model.get("_component_") in WHOLE_MODELS:
        yield (
            f"model._component_: {model['_component_']} changes as a whole, and {loss} compares "
            f"with the base. {instead}, or {other}."
        )
    for key, neutral in (("modules_to_save", None), ("lora_init", "kaiming")):
        value = model.get(key) or neutral
        if value not in (neutral, "gaussian", []):
            yield (
                f"model.{key}: {spelled(value)} changes what is under the adapter, and {loss} "
                f"compares with the base. Remove it, or {other}."
            )


CHAT_DATASETS = ("phi3_plugin.data.chat_dataset", "phi3_plugin.data.dataset.chat_dataset")
PREFERENCE_DATASETS = (
    *("phi3_plugin.data.preference_dataset", "phi3_plugin.data.preferences.preference_dataset"),
)
TEXT_DATASETS = ("phi3_plugin.data.text_dataset", "phi3_plugin.data.text.text_dataset")
CONCATENATE = "phi3_plugin.data.collate.concatenate"

WHOLE_MODELS = ("phi3_plugin.models.phi3", "phi3_plugin.models.phi3_mini")
"""Those without adapters."""

CHECKPOINTER = "phi3_plugin.checkpoint.Phi3Checkpointer"


def _checkpointer(given: Mapping[str, Any]) -> Iterator[str]:
    """Say where a section for torchtune's recipes asks for what this one does not do."""
    section = given.get("checkpointer")
    if not isinstance(section, Mapping):
        return
    if (name := section.get("_component_", CHECKPOINTER)) != CHECKPOINTER:
        yield (
            f"checkpointer._component_: {spelled(name)} is not supported: this recipe writes "
            f"PEFT folders. Use {CHECKPOINTER}, or remove the section."
        )
        return
    if not isinstance(card := section.get("card", {}), Mapping):
        yield f"checkpointer.card: {spelled(card)} must be a section of names and values."
    fixed = {
        "checkpoint_dir": given.get("checkpoint_dir"),
        "output_dir": given.get("output_dir"),
        "layout": "fused",
        "should_load_recipe_state": False,
        # Wrong at the top is reported there, once
        "save_adapter_weights_only": given.get("save_adapter_weights_only", True),
    }
    known = ["_component_", *signature(component(CHECKPOINTER)).parameters]
    for key, value in section.items():
        if key not in known:
            yield unknown_key(f"checkpointer.{key}", value, CHECKPOINTER, known)
        elif fixed.get(key) is not None and value != fixed[key]:
            yield (
                f"checkpointer.{key}: {spelled(value)} differs from {spelled(fixed[key])}, which "
                "this recipe uses. Remove it."
            )


# Components: whether each could be called as its section asks. It is imported, not called.


def component_problems(key: str, section: Any) -> Iterator[str]:
    """Say why a component could not be called as its section asks.

    Args:
        key: Of `Settings`; one that is marked as `Handed` to.
        section: Its section, or the name alone; what is neither was reported as such.
    """
    where = f"{key}._component_"
    if key == "collate_fn":  # a name without a section
        section, where = {"_component_": section}, key
    named = isinstance(section, Mapping) and isinstance(section.get("_component_"), str)
    handed = marks(HINTS[key], Handed)
    if not handed or not named:
        return
    dotpath = section["_component_"]
    try:
        factory = component(dotpath)
    except Exception as error:  # importing a module of the user's can raise anything
        yield f"{where}: {spelled(dotpath)} cannot be imported. {_reason(dotpath, error)}"
        return
    if not callable(factory):
        yield f"{where}: {spelled(dotpath)} cannot be called. Name a function or a class."
        return
    try:
        parameters = signature(factory).parameters
    except ValueError:  # written in C, so nothing is known of its arguments
        return
    count, by_name = handed[0]
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    if by_name and by_name not in parameters and not takes_any:
        yield f"{where}: {spelled(dotpath)} takes no {by_name}, which the recipe hands it."
        return
    ours = [*list(parameters)[:count], by_name]
    open_ended = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    free = {n: p for n, p in parameters.items() if n not in ours and p.kind not in open_ended}
    # null is how the YAMLs say that the user must name the data
    asked = {name: section.get(name, p.default) for name, p in free.items()}
    unset_names = [n for n, v in asked.items() if v is Parameter.empty or v == "???"]
    unset_names += ["source"] if asked.get("source", ...) is None else []
    for name, value in section.items():
        where = f"{key}.{name}"
        if name in ours:
            yield f"{where}: {spelled(value)} is set by the recipe. Remove it."
        elif name in free and name not in unset_names:
            hint = free[name].annotation
            if options.says_all(hint):
                yield from options.mistakes(where, value, hint)
        elif name not in ("_component_", *free) and not takes_any:
            available = f"Available: {', '.join(free)}."
            yield unknown_key(where, value, dotpath, free, available)
    yield from (unset(f"{key}.{name}") for name in unset_names)
    if key == "optimizer" and "lr" in section:
        yield from options.mistakes("optimizer.lr", section["lr"], Positive)


def component(dotpath: str) -> Any:
    """Import what a dotted path names, also from the current folder."""
    if os.getcwd() not in sys.path:  # as torchtune does when it creates the component
        sys.path.append(os.getcwd())
    return _get_component_from_path(dotpath)


def optimizer_problems(section: Any) -> Iterator[str]:
    """Say which arguments an optimizer of torch's or another known package refuses, by a trial."""
    if not isinstance(section, Mapping):
        return
    name, *_ = str(section.get("_component_")).split(".")
    if name not in ("torch", "torchao", "bitsandbytes"):  # nobody else's may need other weights
        return
    named = {key: value for key, value in section.items() if key != "_component_"}
    try:
        component(section["_component_"])([torch.nn.Parameter(torch.zeros(2, 2))], **named)
    except Exception as error:
        yield f"optimizer: {section['_component_']} does not take these values. {error}."


LOGGER_PACKAGES = {
    "WandBLogger": "wandb",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
    "MLFlowLogger": "mlflow",
}
"""What torchtune's loggers import when a run begins."""


def logger_problems(section: Any) -> Iterator[str]:
    """Say whether the package of a logger is missing."""
    name = section.get("_component_") if isinstance(section, Mapping) else None
    package = LOGGER_PACKAGES.get(str(name).rpartition(".")[2])
    if package and str(name).startswith("torchtune.") and find_spec(package) is None:
        yield (
            f"metric_logger._component_: {spelled(name)} needs the package {package}, which is not "
            f"installed. Run: pip install {package}, or use phi3_plugin.train.DiskLogger."
        )


def upload_problems(name: str | None) -> Iterator[str]:
    """Say at the start what an upload at the end would lack."""
    if name and not has_token():
        yield (
            f"push_to_hub: {name} is to be uploaded, and there is no token. Give one that may "
            "write as HF_TOKEN, or run 'hf auth login'."
        )


def _reason(dotpath: str, error: Exception) -> str:
    parent, _, name = dotpath.rpartition(".")
    try:
        meant = closest(name, dir(component(parent)))
    except Exception:  # the parent is no better
        meant = None
    return f"Did you mean {meant!r}?" if meant else f"{error.__cause__ or error!r}."


# What does not go together.


def data_conflicts(given: Mapping[str, Any]) -> Iterator[str]:
    """Say which keys of the data are right by themselves and do not go together.

    Args:
        given: The whole configuration, resolved.
    """
    get = given.get
    if get("dataset_val") and get("val_fraction"):
        yield f"val_fraction: {spelled(get('val_fraction'))} conflicts with dataset_val. Keep one."
    if get("group_by_length") is True:
        dataset = get("dataset")
        if isinstance(dataset, dict) and dataset.get("packed"):
            yield (
                "group_by_length: True conflicts with dataset.packed: "
                f"{spelled(dataset['packed'])}, whose packs are of one length. Keep one."
            )
        if get("shuffle") is False:
            yield "group_by_length: True conflicts with shuffle: False. Keep one."


def conflicts(given: Mapping[str, Any], processes: int) -> Iterator[str]:
    """Say what is wrong with keys of a training run that are right by themselves.

    Args:
        given: The whole configuration, resolved.
        processes: That share the run.
    """
    get = given.get
    patience = get("early_stop_patience")
    if get("val_fraction") == 0 and not get("dataset_val"):
        for key in ("run_val_every_n_steps", "early_stop_patience"):
            if get(key) is not None:
                yield (
                    f"{key}: {spelled(get(key))} needs validation data. Set dataset_val, or "
                    "val_fraction=0.05 to split it off the training set."
                )
    elif patience is not None and given.get("run_val_every_n_steps", 50) is None:
        yield (
            f"early_stop_patience: {spelled(patience)} counts validations, and there is none "
            "before the end. Set run_val_every_n_steps=50."
        )
    schedule = get("lr_scheduler")
    if isinstance(schedule, dict) and "num_warmup_steps" in schedule:
        warmup = schedule["num_warmup_steps"]
        own = str(schedule.get("_component_")).startswith("phi3_plugin.")  # says what it takes
        if warmup is not None and not own:
            yield from options.mistakes("lr_scheduler.num_warmup_steps", warmup, Seed)
    model = get("model")
    if isinstance(model, dict) and model.get("_component_") in WHOLE_MODELS:
        for key in ("lora_plus_ratio", "adapter_dtype"):
            if get(key) is not None:
                yield (
                    f"{key}: {spelled(get(key))} is for adapters, which "
                    f"{model['_component_']} has not. Set it to null."
                )

    if get("dtype") == "fp16":
        if isinstance(model, dict) and model.get("_component_") in WHOLE_MODELS:
            yield (
                f"dtype: 'fp16' is too coarse for weights that are trained, and "
                f"{model['_component_']} trains all. Train adapters with "
                "phi3_plugin.models.lora_phi3, or use dtype=bf16 or fp32."
            )
        elif get("adapter_dtype", "fp32") != "fp32":
            yield (
                f"adapter_dtype: {spelled(get('adapter_dtype'))} is too coarse over a base in "
                "fp16. Set it to fp32."
            )

    tokenizer = get("tokenizer")
    if isinstance(tokenizer, dict) and isinstance(model, dict) and tokenizer.get("add_tokens"):
        for key in ("apply_lora_to_output", "apply_lora_to_embedding"):
            if model.get(key) is True:
                yield (
                    f"tokenizer.add_tokens: {spelled(tokenizer['add_tokens'])} conflicts with "
                    f"model.{key}: True, whose adapter is on all rows. Set that to False; or name "
                    "lm_head and embed_tokens in model.modules_to_save, to train all rows."
                )

    if isinstance(adapter := get("init_adapter"), str):
        if not Path(adapter).exists() and not is_repository(adapter):
            yield f"init_adapter: {adapter!r} is not there. Give the folder of an adapter."
        init = get("model", {}).get("lora_init") if isinstance(get("model"), dict) else None
        if init in ("gaussian", "pissa"):
            yield f"init_adapter: {adapter!r} conflicts with lora_init: {init!r}. Keep one."

    if get("device") == "mps" and processes > 1:
        yield "device: 'mps' is one device. Train in one process."

    recompute = get("enable_activation_checkpointing")
    if get("memory_budget") is not None and recompute:
        yield (
            f"memory_budget: {spelled(get('memory_budget'))} conflicts with "
            f"enable_activation_checkpointing: {spelled(recompute)}. One decides which layers "
            "recompute: add enable_activation_checkpointing=False, or remove the budget."
        )
    if get("enable_activation_offloading") is True:
        if get("device") not in (None, "cuda") or not torch.cuda.is_available():
            yield (
                "enable_activation_offloading: True moves what layers keep from a GPU's memory to "
                "the CPU's by CUDA, and this run is on another device. Set it to False."
            )
        if not recompute:
            yield (
                "enable_activation_offloading: True moves what recomputed layers keep; without "
                "recompute it is too much to move. Add enable_activation_checkpointing=True."
            )

    if isinstance(optimizer := get("optimizer"), dict):
        if (ratio := get("lora_plus_ratio")) and "lr" not in optimizer:
            yield f"lora_plus_ratio: {spelled(ratio)} multiplies optimizer.lr. Set that."
        component = str(optimizer.get("_component_"))
        if component.startswith("bitsandbytes.") and get("fsdp_replicas", 1) != processes:
            yield (
                f"optimizer._component_: {spelled(component)} cannot update weights that processes "
                f"share. Set fsdp_replicas={processes}, or use torchao.optim.AdamW8bit."
            )
