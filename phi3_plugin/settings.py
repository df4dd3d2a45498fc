"""What a training YAML may say, read strictly: every mistake at once, before any work."""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from math import inf, isfinite
from operator import eq
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _get_component_from_path

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.errors import ConfigError, MissingFileError

# What a setting may be: each kind of value, in words and as a test.
#
# An annotation carries its kind, so that :class:`phi3_plugin.settings.Settings` reads as types
# and is checked as rules.

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


def kinds_of(hint: Any) -> list[Kind]:
    """Return the kinds of value that an annotation allows."""
    if get_origin(hint) is Annotated:
        return [kind for kind in hint.__metadata__ if isinstance(kind, Kind)]
    if get_origin(hint) is Literal:
        return [Kind(word, partial(eq, word)) for word in get_args(hint)]
    if hint is NoneType:
        return [Kind("null", lambda value: value is None)]
    return [kind for part in get_args(hint) for kind in kinds_of(part)]


# Amounts of memory, as a YAML writes and a terminal shows them, and when memory goes back.

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
GIB = 2**30


def bytes_of(amount: Any) -> int | None:
    """Return the bytes of an amount like ``16GiB``, ``12.5 GB`` or 8000000000; None if it is none.

    Args:
        amount: Of any type, as a YAML may hold it.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float, str)):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) *([a-z]*)", str(amount).strip().lower())
    unit = UNITS.get(found[2].upper()) if found else None
    size = float(found[1]) * unit if found and unit else 0
    return int(size) or None if isfinite(size) else None


def in_gib(size: float) -> str:
    """Return bytes in GiB, as ``14.2``; small amounts keep a digit that says something."""
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def give_memory_back() -> None:
    """Let the memory of a tensor on the CPU go back to the system with the tensor.

    The C library keeps what blocks of up to 32 MiB took, in pieces that the next step's do not
    fit: a step of Phi-3-mini's width takes a sixth more memory, and is one hundredth faster.

    Source: glibc's ``mallopt(3)``, M_MMAP_THRESHOLD; other C libraries have no such choice.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


Memory = Annotated[
    str | int | float, Kind("an amount of memory: 16GiB, 12GB or a number of bytes", bytes_of)
]


# What a training YAML takes over from torchtune: its recipes' own keys, and its components.
#
# A key that means nothing here is accepted at the value under which it changes nothing, so that
# one YAML drives torchtune's recipes and ours. At any other value it is refused: a key that is
# skipped silently is a run that does something else than its YAML says.

CHECKPOINTER = "phi3_plugin.checkpoint.Phi3Checkpointer"

CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "CrossEntropyLoss", "LinearCrossEntropyLoss")

OPEN_ENDED = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

LOSS_NEUTRAL = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0, "weight": None}

PASSED = {
    "model": (0, None),
    "tokenizer": (0, None),
    "dataset": (1, None),
    "dataset_val": (1, None),
    "optimizer": (1, None),
    "lr_scheduler": (1, "num_training_steps"),
    "metric_logger": (0, None),
    "collate_fn": (1, "padding_idx"),
}
"""Components, and what the recipe itself hands to each: how many by position, one by name."""

EXAMPLES = {
    "checkpoint_dir": "checkpoint_dir=/path/to/Phi-3-mini-4k-instruct",
    "output_dir": "output_dir=/path/to/results",
    "model": "model._component_=phi3_plugin.models.lora_phi3",
    "tokenizer": "tokenizer._component_=phi3_plugin.data.phi3_tokenizer",
    "dataset": "dataset._component_=phi3_plugin.data.chat_dataset",
    "dataset.source": "dataset.source=my_chats.jsonl",
    "optimizer": "optimizer._component_=torch.optim.AdamW",
    "batch_size": "batch_size=4",
    "dtype": "dtype=bf16",
}
"""How a user sets what must be set."""

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


def stock_problems(given: Mapping[str, Any]) -> list[str]:
    """Say which of torchtune's keys ask for something that this recipe does not do.

    Args:
        given: The whole configuration, resolved.
    """
    problems = [
        f"{key}: {shown(given[key])} is not supported by this recipe. {instead}"
        for key, (neutral, instead) in STOCK_KEYS.items()
        if key in given and not _among(given[key], neutral)
    ]
    return [*problems, *_loss(given.get("loss")), *_profiler(given.get("profiler"))]


def section_problems(key: str, given: Mapping[str, Any]) -> list[str]:
    """Say why a component could not be called as its section asks; it is imported, not called.

    Args:
        key: Any key. Only that of a component or of the checkpointer has a section.
        given: The whole configuration, resolved.
    """
    section = given[key]
    if section is None:
        return []
    if key == "checkpointer":
        return _checkpointer(section, given)
    if key == "collate_fn":
        section = {"_component_": section}
    return _called(key, section) if key in PASSED else []


def _checkpointer(section: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    component = section.get("_component_", CHECKPOINTER)
    if component != CHECKPOINTER:
        return [
            f"checkpointer._component_: {shown(component)} is not supported: this recipe writes "
            f"PEFT folders. Use {CHECKPOINTER}, or remove the section."
        ]
    fixed = {key: given.get(key) for key in ("checkpoint_dir", "output_dir")}
    fixed |= {"layout": "fused", "should_load_recipe_state": False}
    # Wrong at the top is reported there, once
    fixed["save_adapter_weights_only"] = given.get("save_adapter_weights_only", True)
    known = ["_component_", "card", "lora_attn_modules", "lora_dropout", "model_type", *fixed]
    problems = [
        f"checkpointer.{key}: {shown(section[key])} differs from {shown(value)}, which this "
        "recipe uses. Remove it."
        for key, value in fixed.items()
        if value is not None and section.get(key, value) != value
    ]
    if not isinstance(card := section.get("card", {}), Mapping):
        problems.append(f"checkpointer.card: {shown(card)} must be a section of names and values.")
    return problems + [
        unknown_key(f"checkpointer.{key}", value, CHECKPOINTER, known)
        for key, value in section.items()
        if key not in known
    ]


def _called(key: str, section: Mapping[str, Any]) -> list[str]:
    where = f"{key}._component_" if key != "collate_fn" else key
    dotpath = section["_component_"]
    try:
        component = _component(dotpath)
    except Exception as error:  # Importing a module of the user's can raise anything
        return [f"{where}: {shown(dotpath)} cannot be imported. {_reason(dotpath, error)}"]
    if not callable(component):
        return [f"{where}: {shown(dotpath)} cannot be called. Name a function or a class."]
    try:
        parameters = signature(component).parameters
    except ValueError:  # Written in C, so nothing is known of its arguments
        return []
    handed = PASSED[key][1]
    if handed and handed not in parameters and not _takes_any(parameters):
        return [f"{where}: {shown(dotpath)} takes no {handed}, which the recipe hands it."]
    return _wrong_arguments(key, section, parameters)


def _wrong_arguments(
    key: str, section: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> list[str]:
    count, handed = PASSED[key]
    ours = [*list(parameters)[:count], handed]
    free = {n: p for n, p in parameters.items() if n not in ours and p.kind not in OPEN_ENDED}
    unknown = f"Available: {', '.join(free)}."
    problems = []
    for name, value in section.items():
        where = f"{key}.{name}"
        if name in ours:
            problems.append(f"{where}: {shown(value)} is set by the recipe. Remove it.")
        elif name not in ("_component_", *free) and not _takes_any(parameters):
            problems.append(unknown_key(where, value, section["_component_"], free, unknown))
    return problems + [unset(f"{key}.{n}") for n, p in free.items() if _is_unset(n, section, p)]


def _takes_any(parameters: Mapping[str, Parameter]) -> bool:
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())


def _is_unset(name: str, section: Mapping[str, Any], parameter: Parameter) -> bool:
    value = section.get(name, parameter.default)
    # null is how the YAMLs say that the user must name the data
    return value is Parameter.empty or value == "???" or (name == "source" and value is None)


def _component(dotpath: str) -> Any:
    if os.getcwd() not in sys.path:  # as torchtune does when it creates the component
        sys.path.append(os.getcwd())
    return _get_component_from_path(dotpath)


def _reason(dotpath: str, error: Exception) -> str:
    parent, _, name = dotpath.rpartition(".")
    try:
        meant = closest(name, dir(_component(parent)))
    except Exception:  # The parent is no better
        meant = None
    return f"Did you mean {meant!r}?" if meant else f"{error.__cause__ or error!r}."


def _loss(section: Any) -> list[str]:
    if section is None:
        return []
    if not isinstance(section, Mapping):
        return [f"loss: {shown(section)} must be a section with _component_ or null."]
    component = section.get("_component_")
    if str(component).rpartition(".")[2] not in CROSS_ENTROPIES:
        return [
            f"loss._component_: {shown(component)} is not cross entropy, which this recipe "
            "computes. Use torchtune.modules.loss.CEWithChunkedOutputLoss."
        ]
    return [
        f"loss.{key}: {shown(value)} is not supported by this recipe. Remove it."
        for key, value in section.items()
        if key not in ("_component_", "num_output_chunks") and LOSS_NEUTRAL.get(key, ...) != value
    ]


def _profiler(section: Any) -> list[str]:
    enabled = section.get("enabled", False) if isinstance(section, Mapping) else section
    if section is None or enabled is False:
        return []
    return [
        f"profiler.enabled: {shown(enabled)} is not supported by this recipe. Set it to False, "
        "and profile with torchtune's own recipe."
    ]


def _among(value: Any, neutral: Iterable[Any]) -> bool:
    return any(type(value) is type(one) and value == one for one in neutral)  # 0 is not False


def unknown_key(
    where: str, value: Any, owner: str, known: Iterable[str], otherwise: str = "Remove it."
) -> str:
    """Return the problem of a key that nothing reads."""
    meant = closest(where.rpartition(".")[2], known)
    advice = f"Did you mean {meant!r}?" if meant else otherwise
    return f"{where}: {shown(value)} is given, but {owner} has no such key. {advice}"


def unset(key: str) -> str:
    """Return the problem of a key that the user must set."""
    example = EXAMPLES.get(key, f"{key}=VALUE")
    return f"{key} is not set. Set it in the YAML or add {example} to the command."


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def shown(value: Any) -> str:
    """Return a value as the YAML would spell it, cut if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# What is wrong with the keys of a training YAML together.


def conflicts(given: Mapping[str, Any], processes: int) -> list[str]:
    """Return what is wrong with keys that are right by themselves.

    Args:
        given: The whole configuration, resolved.
        processes: That share the run.
    """
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
    groups = (_start, _memory_conflicts, _order_conflicts)
    problems += [problem for group in groups for problem in group(given)]
    return problems + _optimizer_conflicts(given, processes)


def _start(given: Mapping[str, Any]) -> list[str]:
    adapter, model = given.get("init_adapter"), given.get("model")
    if not isinstance(adapter, str) or not isinstance(model, dict):
        return []
    problems = []
    if not Path(adapter).exists():
        problems.append(f"init_adapter: {adapter!r} is not there. Give the folder of an adapter.")
    if (init := model.get("lora_init")) in ("gaussian", "pissa"):
        problems.append(f"init_adapter: {adapter!r} conflicts with lora_init: {init!r}. Keep one.")
    return problems


def _memory_conflicts(given: Mapping[str, Any]) -> list[str]:
    budget, every = given.get("memory_budget"), given.get("enable_activation_checkpointing")
    problems = []
    if budget is not None and every:
        problems.append(
            f"memory_budget: {shown(budget)} conflicts with enable_activation_checkpointing: "
            f"{shown(every)}. One decides which layers recompute: add "
            "enable_activation_checkpointing=False, or remove the budget."
        )
    if given.get("enable_activation_offloading") is not True:
        return problems
    if given.get("device") == "cpu" or not torch.cuda.is_available():
        problems.append(
            "enable_activation_offloading: True moves what layers keep from a GPU's memory to the "
            "CPU's, and this run is on the CPU. Set it to False."
        )
    if not every:
        problems.append(
            "enable_activation_offloading: True moves what recomputed layers keep; without "
            "recompute it is too much to move. Add enable_activation_checkpointing=True."
        )
    return problems


def _order_conflicts(given: Mapping[str, Any]) -> list[str]:
    if given.get("group_by_length") is not True:
        return []
    problems, dataset = [], given.get("dataset")
    if isinstance(dataset, dict) and dataset.get("packed"):
        problems.append(
            f"group_by_length: True conflicts with dataset.packed: {shown(dataset['packed'])}, "
            "whose packs are of one length. Keep one."
        )
    if given.get("shuffle") is False:
        problems.append("group_by_length: True conflicts with shuffle: False. Keep one.")
    return problems


def _optimizer_conflicts(given: Mapping[str, Any], processes: int) -> list[str]:
    ratio, optimizer = given.get("lora_plus_ratio"), given.get("optimizer")
    problems = []
    if not isinstance(optimizer, dict):
        return []  # already said
    if ratio and "lr" not in optimizer:
        problems.append(f"lora_plus_ratio: {shown(ratio)} multiplies optimizer.lr. Set that.")
    component = optimizer.get("_component_")
    if str(component).startswith("bitsandbytes.") and given.get("fsdp_replicas", 1) != processes:
        problems.append(
            f"optimizer._component_: {shown(component)} cannot update weights that processes "
            f"share. Set fsdp_replicas={processes}, or use torchao.optim.AdamW8bit."
        )
    return problems


# The settings of a training run, read strictly: every mistake of a YAML at once, before any work.
#
# The YAML is that of torchtune's LoRA recipes with more keys; :mod:`phi3_plugin.settings`
# knows what to make of theirs.

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
    given, broken = _resolved(cfg)
    problems = [*broken.values(), *_wrong_keys(given, broken)]
    for key in HINTS:
        if key in given:
            problems += _wrong_value(key, given)
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", 1))
    problems += [*stock_problems(given), *conflicts(given, processes)]
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
