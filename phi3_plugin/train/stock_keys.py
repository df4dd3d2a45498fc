"""What a training YAML takes over from torchtune: its recipes' own keys, and its components.

A key that means nothing here is accepted at the value under which it changes nothing, so that
one YAML drives torchtune's recipes and ours. At any other value it is refused: a key that is
skipped silently is a run that does something else than its YAML says.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from torchtune.config._utils import _get_component_from_path

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
