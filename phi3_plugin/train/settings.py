"""The settings of a training run, read strictly: every mistake of a YAML at once, before any work.

The YAML is that of torchtune's LoRA recipes with more keys; :mod:`phi3_plugin.train.stock_keys`
knows what to make of theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from math import inf
from operator import eq
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.errors import ConfigError, MissingFileError
from phi3_plugin.train.stock_keys import (
    STOCK_KEYS,
    closest,
    section_problems,
    shown,
    stock_problems,
    unknown_key,
    unset,
)

ADVICE = {
    "dataset": " For several files, let dataset.source be a folder or a glob.",
    "device": " Choose a card with CUDA_VISIBLE_DEVICES.",
    "dtype": " Where a card has no bf16, use dtype=fp32 over an NF4 base, "
    "model=phi3_plugin.models.qlora_phi3: the gradients of fp16 underflow.",
}
"""What more to say of a wrong value."""

REAL = (int, float)  # the types themselves: to isinstance, True is an int


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_component(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("_component_"), str)


def _is_resume(value: Any) -> bool:
    return isinstance(value, str) and (value in ("auto", "never") or Path(value).is_dir())


TEXT = Kind("text; put quotes around a number", lambda v: isinstance(v, str))
Text = Annotated[str, TEXT]
Folder = Annotated[Path, TEXT]
Texts = Annotated[list[str], Kind("a list of texts, as in ['one', 'two']", _is_texts)]
Resume = Annotated[str, Kind("auto, never or a checkpoint folder that exists", _is_resume)]
Count = Annotated[int, Kind("a whole number above 0", lambda v: type(v) is int and v > 0)]
Seed = Annotated[int, Kind("a whole number from 0 on", lambda v: type(v) is int and v >= 0)]
Positive = Annotated[float, Kind("a number above 0", lambda v: type(v) in REAL and 0 < v < inf)]
Share = Annotated[float, Kind("at least 0 and below 1", lambda v: type(v) in REAL and 0 <= v < 1)]
Switch = Annotated[bool, Kind("True or False", lambda v: type(v) is bool)]
Section = Annotated[dict[str, Any], Kind("a section", lambda v: isinstance(v, dict))]
Component = Annotated[dict[str, Any], Kind("a section with _component_", _is_component)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run, with the keys as its YAML spells them."""

    checkpoint_dir: Folder
    output_dir: Folder
    model: Component
    tokenizer: Component
    dataset: Component
    dataset_val: Component | None = None
    val_fraction: Share = 0.0
    """Share of the training set that is split off for validation, chosen by the seed."""
    batch_size: Count
    """Samples that one device sees at once."""
    gradient_accumulation_steps: Count = 1
    collate_fn: Text = "phi3_plugin.data.collate.pad_right"
    shuffle: Switch = True
    seed: Seed = 0
    """null is 0."""

    epochs: Count = 1
    max_steps: Count | None = None
    """Optimizer steps of the whole run, if that is less than its epochs."""
    optimizer: Component
    lr_scheduler: Component | None = None
    lora_plus_ratio: Positive | None = None
    """The learning rate of the B matrices, as a multiple of that of the A matrices."""
    clip_grad_norm: Positive | None = None
    max_nonfinite_steps: Count = 3
    """Steps in a row without a finite gradient, after which the run stops."""

    dtype: Literal["bf16", "fp32"]
    adapter_dtype: Literal["fp32", "bf16"] | None = None
    """null is dtype; adapters in fp32 over a base in bf16 keep updates that bf16 rounds away."""
    device: Literal["cpu", "cuda"] | None = None
    """null is what the machine has."""
    compile: Switch = False
    enable_activation_checkpointing: Switch | Count = False
    """A number n recomputes every n-th layer only."""
    fsdp_cpu_offload: Switch = False
    fsdp_reshard_after_forward: Switch = True

    save_every_n_steps: Count | None = None
    save_every_epoch: Switch = True
    save_total_limit: Count | None = None
    """Checkpoints kept; the oldest go first."""
    resume: Resume = "never"
    """auto goes on from the newest checkpoint of output_dir if there is one."""
    checkpointer: Section | None = None
    """Only ``card`` and ``lora_dropout`` are read."""
    run_val_every_n_steps: Count | None = None
    early_stop_patience: Count | None = None
    """Validations without an improvement, after which the run stops."""
    keep_best: Switch = True
    """Save a checkpoint at each new lowest validation loss, as output_dir/best."""

    metric_logger: Component | None = None
    log_every_n_steps: Count = 1
    sample_prompts: Texts = field(default_factory=list)
    """Questions answered before and after training, for the report."""
    report: Switch = True


HINTS = get_type_hints(Settings, include_extras=True)
REQUIRED = [f.name for f in fields(Settings) if f.default is f.default_factory]  # both MISSING


def read(cfg: DictConfig) -> Settings:
    """Check a configuration, YAML and command line merged.

    Args:
        cfg: As torchtune's ``config.parse`` hands it to a recipe.

    Returns:
        The settings; sections are plain dictionaries with all interpolations resolved.

    Raises:
        ConfigError: Something is wrong; all problems, one line each.
    """
    given, broken = _resolved(cfg)
    problems = [*broken.values(), *_wrong_keys(given, broken)]
    for key in HINTS:
        if key in given:
            problems += _wrong_value(key, given)
    problems += [*stock_problems(given), *_conflicts(given)]
    if problems:
        raise ConfigError("\n".join(problems))
    folders = {key: Path(given[key]) for key in ("checkpoint_dir", "output_dir")}
    return Settings(**{key: given[key] for key in HINTS if key in given} | folders)


def _resolved(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values as plain Python, and the problem of each key that has none."""
    given: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for key in map(str, cfg):
        try:
            value = cfg.get(key)  # None where it is ???
            plain = OmegaConf.is_config(value)
            given[key] = OmegaConf.to_container(value, resolve=True) if plain else value
            if plain and "_component_" in value and value["_component_"] is None:
                given[key] = None  # what `key=null` on the command line becomes
        except OmegaConfBaseException as error:
            broken[key] = f"{error.full_key or key}: {str(error).splitlines()[0]}."
    if given.get("seed", 0) is None:
        given["seed"] = 0
    return given, broken


def _wrong_keys(given: Mapping[str, Any], broken: Mapping[str, str]) -> list[str]:
    known = [*HINTS, *STOCK_KEYS, "loss", "profiler"]
    wrong = [key for key in given if key not in known]
    said = {*broken, *(closest(key, known) for key in wrong)}  # one mistake, one line
    return [unknown_key(key, given[key], "this recipe", known) for key in wrong] + [
        unset(key) for key in REQUIRED if given.get(key) is None and key not in said
    ]


def _wrong_value(key: str, given: Mapping[str, Any]) -> list[str]:
    value = given[key]
    if value is None and key in REQUIRED:
        return []  # already said
    if problems := _mistake(key, value, HINTS[key]):
        return problems
    if key == "checkpoint_dir":
        return _no_folder(value)
    if key == "optimizer" and "lr" in value:
        problems = _mistake("optimizer.lr", value["lr"], Positive)
    return problems + section_problems(key, given)


def _no_folder(checkpoint_dir: str) -> list[str]:
    try:
        checkpoint_folder(checkpoint_dir)
    except MissingFileError as error:
        return [str(error)]
    return []


def _mistake(key: str, value: Any, hint: Any) -> list[str]:
    kinds = _kinds(hint)
    if any(kind.accepts(value) for kind in kinds):
        return []
    words = " or ".join(kind.words for kind in kinds)
    return [f"{key}: {shown(value)} must be {words}.{ADVICE.get(key, '')}"]


def _kinds(hint: Any) -> list[Kind]:
    """Return the kinds of value that an annotation allows."""
    if get_origin(hint) is Annotated:
        return [kind for kind in hint.__metadata__ if isinstance(kind, Kind)]
    if get_origin(hint) is Literal:
        return [Kind(word, partial(eq, word)) for word in get_args(hint)]
    if hint is NoneType:
        return [Kind("null", lambda value: value is None)]
    return [kind for part in get_args(hint) for kind in _kinds(part)]


def _conflicts(given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with keys that are right by themselves."""
    section, share = given.get("dataset_val"), given.get("val_fraction")
    problems = []
    if section and share:
        problems.append(f"val_fraction: {shown(share)} conflicts with dataset_val. Keep one.")
    if not section and not share:
        problems += [
            f"{key}: {shown(given[key])} needs validation data. Set dataset_val, or "
            "val_fraction=0.05 to split it off the training set."
            for key in ("run_val_every_n_steps", "early_stop_patience")
            if given.get(key) is not None
        ]
    ratio, optimizer = given.get("lora_plus_ratio"), given.get("optimizer")
    if ratio and isinstance(optimizer, dict) and "lr" not in optimizer:
        problems.append(f"lora_plus_ratio: {shown(ratio)} multiplies optimizer.lr. Set that.")
    return problems
