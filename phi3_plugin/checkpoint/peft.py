"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MODULES, Adapter, FileContent, file_content, original
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    SAVED_WEIGHTS,
    A,
    B,
    from_peft,
    fused_name,
    hf_name,
    known_hash,
    stored_row_norms,
    to_peft,
    write_weights,
)
from phi3_plugin.checkpoint.files import quoted, save_tensors
from phi3_plugin.config import read_config, read_json_object
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "phi3_plugin"
"""Key in the weights file's metadata: what the adapter was before it was made uniform."""

# The folder that serves: adapter, tokenizer, model card

TOKENIZER_FILES = (
    "config.json",  # without it transformers picks the wrong tokenizer class
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    checkpoint_dir: Path,
    card: Mapping[str, Any],
    patterns: bool = False,
) -> None:
    """Write a PEFT adapter with its tokenizer and model card into a folder.

    Args:
        folder: An existing folder.
        adapter: What to write; parts are made whole. Which base weights it was made for goes into
            the file: what it says itself, else those of ``checkpoint_dir``.
        checkpoint_dir: Folder of the base model.
        card: Rows of the model card's table.
        patterns: Leave ranks and scales as they are, said by rank_pattern and alpha_pattern, which
            PEFT reads, but vLLM and llama.cpp do not. Otherwise all modules get one of each.

    Raises:
        AdapterError: The adapter is empty, or no file of PEFT's can hold it.
    """
    base, sizes = base_name(checkpoint_dir), read_config(checkpoint_dir)
    # Somebody else's says nothing, so it is for the base that its user names.
    adapter = replace(adapter, base_hash=adapter.base_hash or known_hash(checkpoint_dir))
    content = file_content(
        adapter, sizes, partial(stored_row_norms, checkpoint_dir), patterns=patterns
    )
    config = adapter_config(content, adapter, base, sizes.num_hidden_layers)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    tensors = {to_peft(n): v for n, v in {**content.tensors, **adapter.saved}.items()}
    save_tensors(folder / WEIGHTS, tensors, {ORIGIN: json.dumps(content.note)})
    copy_tokenizer(checkpoint_dir, folder)
    if any(fused_name(module) != module for module in adapter.ranks):
        ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
        trained = f"{', '.join(targets_of(adapter.tensors))}, each of rank {ranks}"
        card = {**card, "trained": trained}
    (folder / "README.md").write_text(model_card(config, card), encoding="utf-8")


def export_model(folder: Path, weights: Mapping[str, Tensor], checkpoint_dir: Path) -> None:
    """Write a fully trained model as a Hugging Face checkpoint folder.

    Args:
        folder: An existing folder.
        weights: All of the model, our names.
        checkpoint_dir: Folder of the base model, for tokenizer and configuration.
    """
    write_weights(folder, {n: v.nbytes for n, v in weights.items()}, weights.__getitem__)
    copy_tokenizer(checkpoint_dir, folder)


def base_name(checkpoint_dir: Path) -> str:
    """Return how an adapter names its base: the repository it came from, else the folder.

    ``tune download`` leaves original_repo_id.json beside the weights.
    """
    file = checkpoint_dir / "original_repo_id.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["repo_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(checkpoint_dir.resolve())


def copy_tokenizer(checkpoint_dir: Path, folder: Path) -> None:
    """Copy the tokenizer's files, and the configuration without which they are misread."""
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, folder / name)


def targets_of(adapter: Iterable[str]) -> list[str]:
    """Return the modules that carry an adapter, told by tensor names, without their place."""
    endings = re.compile(r"\.(lora_[ab]\.weight|magnitude)$")
    modules = (endings.sub("", name) for name in adapter if name not in SAVED_WEIGHTS)
    return sorted({module.rpartition(".")[2] for module in modules})


Number = TypeVar("Number", int, float)


def adapter_config(
    content: FileContent, adapter: Adapter, base: str, layers: int
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Targets and ranks are read off the tensors, since a recipe's list may name what is not there.

    Args:
        content: What the weights file holds.
        adapter: What it was made of.
        base: Repository id or folder of the base model.
        layers: How many the model has.
    """
    rank, rank_pattern = _pattern(content.ranks)
    alpha, alpha_pattern = _pattern(content.alphas)
    saved = sorted(_short(hf_name(name.removesuffix(".weight"))) for name in adapter.saved)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(adapter.dropout),
        "target_modules": target_modules(content.ranks, layers),
        "bias": "none",
        "use_dora": adapter.is_dora,
        "use_rslora": content.rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }


def target_modules(modules: Iterable[str], layers: int) -> list[str]:
    """Return names by which PEFT finds these modules and no others.

    Args:
        modules: Our names.
        layers: How many the model has. A short name stands for all of them.
    """
    names = [hf_name(module) for module in modules]
    counts = Counter(map(_short, names))
    everywhere = {short for short, n in counts.items() if n == (layers if "_proj" in short else 1)}
    return sorted({_short(name) if _short(name) in everywhere else name for name in names})


def _pattern(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """Return the value that most modules have, and those of the others by name.

    PEFT takes a name in a pattern for a regular expression that the end of a module's name matches.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    by_kind: dict[str, set[Number]] = defaultdict(set)
    named = {hf_name(module): value for module, value in values.items()}
    for name, value in named.items():
        by_kind[_short(name)].add(value)
    return usual, {
        _short(name) if len(by_kind[_short(name)]) == 1 else name: value
        for name, value in named.items()
        if value != usual
    }


def _short(name: str) -> str:
    return name.rpartition(".")[2]


ADAPTER_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- phi3
- torchtune
---

# {kind} adapter for {base}

{kind} of rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {targets}.

{table}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, ADAPTER)  # ADAPTER: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

The prompt must follow the chat template in tokenizer_config.json, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json.
"""


def model_card(config: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Return the README.md that lies beside an adapter.

    Args:
        config: Content of its adapter_config.json.
        rows: What the adapter was trained on and how, one row of the table each.
    """
    return ADAPTER_CARD.format(
        base=config["base_model_name_or_path"],
        kind="DoRA" if config["use_dora"] else "LoRA",
        targets=", ".join(config["target_modules"]),
        table=markdown_table("training", rows),
        **{key: config[key] for key in ("r", "lora_alpha", "lora_dropout")},
    )


def markdown_table(title: str, rows: Mapping[str, Any]) -> str:
    """Return rows of names and values in Markdown."""
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        cell = str(value).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {key} | {cell} |")
    return "\n".join(lines)


# Going on from a folder that we wrote


def load_trained(
    folder: Path, checkpoint_dir: Path, model: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read an adapter as it was trained: what :func:`export_adapter` was given, bit for bit.

    Args:
        folder: What it wrote.
        checkpoint_dir: Folder of the base model.
        model: The adapter of the model that it is for, if that is known by now.

    Returns:
        The low-rank tensors and those that were trained whole.

    Raises:
        AdapterError: The file's metadata do not fit its tensors.
        CheckpointError: A tensor is not part of a Phi-3 adapter, or of the model's.
        MissingFileError: There is no adapter in the folder.
    """
    adapter, origin = load_adapter(folder), load_origin(folder)
    if MODULES in origin:
        tensors, _ = original(adapter, origin, read_config(checkpoint_dir))
        adapter = {**tensors, **{n: v for n, v in adapter.items() if n in SAVED_WEIGHTS}}
    if model is not None:
        check_same(folder, adapter, model)
    return adapter


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the adapter tensors of a folder under our names.

    Raises:
        CheckpointError: A tensor is not part of a Phi-3 adapter, or the file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        return {from_peft(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_origin(folder: Path) -> dict[str, Any]:
    """Read what :func:`export_adapter` noted of the adapter; empty for other people's files.

    Raises:
        CheckpointError: The file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        return parsed_object((file.metadata() or {}).get(ORIGIN, "{}"))


def parsed_object(text: str) -> dict[str, Any]:
    """Return the object in a stranger's JSON; empty if it is none."""
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(f"{folder} has no {WEIGHTS}: it is not an adapter folder.")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or cut short: {error}. Copy it again, or move {folder} "
            "away to go on from the checkpoint before it."
        ) from error


def check_same(folder: Path, saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Refuse to go on with an adapter that is not the model's.

    Args:
        folder: Where it was saved.
        saved: What is there, our names.
        model: What the model has.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    shapes = [{name: value.shape for name, value in one.items()} for one in (saved, model)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"resume: {folder} holds {_summary(saved)}, but the model has {_summary(model)}. "
            "Resume with the model settings the run was started with, or set another output_dir."
        )


def _summary(adapter: Mapping[str, Tensor]) -> str:
    kind = "DoRA" if any(name.endswith(MAGNITUDE) for name in adapter) else "LoRA"
    ranks = {str(value.shape[0]) for name, value in adapter.items() if name.endswith(A)}
    return f"{kind} of rank {', '.join(sorted(ranks))} on {', '.join(targets_of(adapter))}"


def check_trained(adapter: Mapping[str, Tensor], *, may_be_identity: bool = False) -> None:
    """Refuse an adapter that would serve nothing, or nonsense.

    Args:
        adapter: Our names.
        may_be_identity: Whether it may still be what it was at the start.

    Raises:
        AdapterError: It is empty, still the identity, or not finite.
    """
    if not adapter:
        raise AdapterError("The model has no adapter to save. Use a LoRA model builder.")
    if broken := [name for name, value in adapter.items() if not torch.isfinite(value).all()]:
        raise AdapterError(
            f"{len(broken)} of {len(adapter)} adapter tensors hold NaN or infinite numbers, "
            f"first {broken[0]}. Nothing was saved. Lower the learning rate or set clip_grad_norm."
        )
    # Either may be what starts at zero: B, or the A of an embedding.
    modules = [name.removesuffix(A) for name in adapter if name.endswith(A)]
    moved = any(adapter[m + A].any() and adapter[m + B].any() for m in modules)
    if not moved and not may_be_identity:
        raise AdapterError(
            "The adapter is still what it was at the start, so nothing was saved: no optimizer "
            "step with a learning rate above 0 was made. Give more rows than batch_size * "
            "gradient_accumulation_steps, more epochs, or fewer warm-up steps."
        )


# adapter_config.json, whoever wrote it.
#
# PEFT finds ranks and alphas of single modules by regular expressions. A stranger's are matched
# only if they are so plain that matching them takes no time.

PATTERN_NAMES = 2000

PLAIN_PATTERN = re.compile(
    r"\^?(?:[\w.-]|\\\.|\\d\+?|\.\*|\[[\w-]+\]|\((?:[\w.]+\|)*[\w.]+\))+\$?", re.ASCII
)
"""Names, classes of characters, alternatives and wildcards."""

BRANCHES = 2
"""How many of the last two a name in a pattern may hold: time grows with the power of it."""

OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "layer_replication": (),
    "megatron_config": (),
    "monteclora_config": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (False,),
    "velora_config": (),
}
"""Features of PEFT that change what is computed, and what they must be besides absent or null."""

STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starting points that leave the base as it is; after others, such as PiSSA, the adapter belongs to
a base that was changed."""

READ_KEYS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "base_model_name_or_path", "init_lora_weights", ORIGIN),
}

IRRELEVANT_KEYS = {
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying"),
}
"""What the tensors say themselves, or what only training reads."""


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says; values of each kind are checked."""

    file: Path
    keys: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """Return the rank of a module, by Hugging Face's name."""
        return int(self._of(module, "r", "rank_pattern"))

    def alpha(self, module: str) -> float:
        """Return the alpha of a module."""
        return float(self._of(module, "lora_alpha", "alpha_pattern"))

    def scale(self, module: str) -> float:
        """Return what PEFT multiplies B A with in a module."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.keys.get("use_rslora") else rank)

    def _of(self, module: str, key: str, pattern: str) -> Any:
        """Return the value of the first pattern that fits, else that of all modules.

        Source: PEFT 0.21.2, get_pattern_key of utils/other.py; 8 is its default.
        """
        for name, value in (self.keys.get(pattern) or {}).items():
            if _compiled(name).match(module):
                return value
        return self.keys.get(key, 8)


@lru_cache(2 * PATTERN_NAMES)  # re itself remembers 512, fewer than a file may hold
def _compiled(name: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({name})$")


def read_peft_config(file: Path) -> PeftConfig:
    """Read adapter_config.json of an adapter that is to be computed.

    Raises:
        AdapterError: It is broken, or the adapter needs what we do not compute; each is listed, up
            to a limit.
    """
    keys = read_json_object(file, AdapterError)
    needed = [f"{key}: is missing." for key in ("r", "lora_alpha") if key not in keys]
    problems = [*_features(keys), *needed, *wrong_values(keys)]
    if problems:
        raise AdapterError(f"{file} cannot be used:\n{problem_list(problems, 20)}")
    return PeftConfig(file, keys)


def problem_list(problems: Sequence[str], most: int) -> str:
    """Return the first problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join(f"  {line}" for line in (*problems[:most], *more))


def _features(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield the features of PEFT that are not computed here."""
    if keys.get("peft_type", "LORA") != "LORA":
        yield f"peft_type: {quoted(keys['peft_type'])}, only LORA adapters are computed."
    for key, allowed in OFF.items():
        value = keys.get(key)
        if value is not None and value not in allowed and value not in ({}, []):
            yield f"{key}: {quoted(value)} is a feature that is not computed here."
    if (start := keys.get("init_lora_weights", True)) not in STARTS and start is not None:
        yield (
            f"init_lora_weights: {quoted(start)} changes the base that the adapter is for. Save it "
            "with path_initial_model_for_weight_conversion, for the original base."
        )
    for key in sorted(map(str, keys.keys() - (READ_KEYS | IRRELEVANT_KEYS | OFF.keys()))):
        if keys[key] not in (None, False, {}, []):
            unknown = f"{quoted(key)}: {quoted(keys[key])}"
            yield f"{unknown} is an unknown key. Remove it if it is harmless."


def wrong_values(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values that are there, a sentence each."""
    if not is_rank(keys.get("r", 8)):
        yield f"r: {quoted(keys['r'])} must be a whole number above 0."
    if not is_alpha(keys.get("lora_alpha", 8)):
        yield f"lora_alpha: {quoted(keys['lora_alpha'])} must be a number above 0."
    dropout = keys.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        yield f"lora_dropout: {quoted(dropout)} must be at least 0 and below 1."
    for key in ("use_dora", "use_rslora"):
        if not isinstance(keys.get(key) or False, bool):
            yield f"{key}: {quoted(keys[key])} must be true or false."
    if not isinstance(base := keys.get("base_model_name_or_path") or "", str):
        yield f"base_model_name_or_path: {quoted(base)} must be text."
    for key, is_good in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha)):
        pattern = keys.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > PATTERN_NAMES:
            yield f"{key}: must be an object of at most {PATTERN_NAMES} names."
            continue
        for name, value in pattern.items():
            if not is_good(value) or not is_plain(name):
                yield (
                    f"{key}: {quoted(name)}: {quoted(value)} is not read. Use modules' names, and "
                    "numbers above 0."
                )


def is_plain(pattern: str, branches: int = BRANCHES) -> bool:
    """Whether a stranger's pattern is so plain that matching it takes no time."""
    if len(pattern) > 300 or sum(map(pattern.count, "*+(")) > branches:
        return False
    try:
        return bool(PLAIN_PATTERN.fullmatch(pattern) and re.compile(pattern))
    except re.error:
        return False


def is_rank(value: object) -> bool:
    """Whether a value can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_alpha(value: object) -> bool:
    """Whether a value can be an alpha: a number that leaves a scale above 0 and not infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1e-30 < value < 1e30  # type: ignore[operator]
