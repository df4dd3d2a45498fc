"""The settings of a training run, read strictly: every mistake of a YAML at once, before any work.

The YAML is that of torchtune's LoRA recipes with more keys; :mod:`phi3_plugin.train.stock_keys`
knows what to make of theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.errors import ConfigError, MissingFileError
from phi3_plugin.train.conflicts import conflicts
from phi3_plugin.train.kinds import (
    Component,
    Count,
    Folder,
    Positive,
    Resume,
    Section,
    Seed,
    Share,
    Switch,
    Text,
    Texts,
    kinds_of,
)
from phi3_plugin.train.memory import Memory
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
    collate_fn: Text = "phi3_plugin.data.collate.concatenate"
    shuffle: Switch = True
    group_by_length: Switch = False
    """Steps of samples of similar length: less padding, where collate_fn pads."""
    seed: Seed = 0
    """null is 0."""

    init_adapter: Folder | None = None
    """An adapter, anyone's, to train on from; the model's keys must be those that it fits."""
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
    memory_budget: Memory | None = None
    """Recompute as few layers as the memory of one device allows, instead of naming them."""
    enable_activation_offloading: Switch = False
    """Keep what recomputed layers need in the CPU's memory; on a GPU."""
    fsdp_cpu_offload: Switch = False
    fsdp_reshard_after_forward: Switch = True
    fsdp_replicas: Count = 1
    """Whole copies of the model; the processes of a copy share it. As many copies as processes
    is the fastest where a model fits one device: only gradients travel then."""

    save_every_n_steps: Count | None = None
    save_every_epoch: Switch = True
    save_total_limit: Count | None = None
    """Checkpoints kept; the oldest go first."""
    save_in_background: Switch = False
    """Train on while a checkpoint is written; takes a copy of it in the CPU's memory."""
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
    """Questions answered before and after training and at each validation, for the report."""
    sample_max_new_tokens: Count = 64
    """Tokens of such an answer, at most."""
    plan: Switch | Count = False
    """Print what the run would take, for so many devices, and do nothing."""
    report: Switch = True
    prove: Switch = True
    """Compare the final adapter's logits in PEFT with ours, if PEFT is installed and memory is
    there."""


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
    problems += [*stock_problems(given), *conflicts(given)]
    if problems:
        raise ConfigError("\n".join(problems))
    paths = ("checkpoint_dir", "output_dir", "init_adapter")
    folders = {key: Path(given[key]) for key in paths if given.get(key) is not None}
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
    kinds = kinds_of(hint)
    if any(kind.accepts(value) for kind in kinds):
        return []
    words = " or ".join(kind.words for kind in kinds)
    return [f"{key}: {shown(value)} must be {words}.{ADVICE.get(key, '')}"]
