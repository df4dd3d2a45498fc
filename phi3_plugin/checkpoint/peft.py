"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi3_plugin import hub
from phi3_plugin.checkpoint.adapter import (
    Adapter,
    FileContent,
    pattern_content,
    uniform_content,
)
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    NEW_ROWS,
    SAVED_WEIGHTS,
    TOK_EMBEDDINGS,
    A,
    B,
    fused_name,
    hf_name,
    known_hash,
    stored_row_norms,
    to_hf,
    to_hf_reward,
    to_peft,
    write_weights,
)
from phi3_plugin.checkpoint.files import save_tensors
from phi3_plugin.config import read_config, read_json_object, strict_json
from phi3_plugin.data.added_tokens import Entry, tokens_beyond, write_added_tokens
from phi3_plugin.errors import AdapterError, CheckpointError, ConfigError, MissingFileError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTE = "phi3_plugin"
"""Key under which a file has its `Note`: in the metadata of the weights or beside them."""

# The folder that serves: adapter, tokenizer, model card

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every version of transformers. What the family's files name,
such as LlamaTokenizer, makes other ids of it from 5.0 on, unless a config.json beside it says
that the model is a Phi-3. An adapter has none: 5.2 and later would take it for a whole model."""


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
    make = pattern_content if patterns else uniform_content
    content = make(adapter, sizes, partial(stored_row_norms, checkpoint_dir))
    config = adapter_config(content, adapter, base, sizes.num_hidden_layers)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    rows = {m + NEW_ROWS: torch.stack([*own.values()]) for m, own in adapter.rows.items()}
    tensors = {to_peft(n): v for n, v in {**content.tensors, **adapter.saved, **rows}.items()}
    save_tensors(folder / WEIGHTS, tensors, {NOTE: json.dumps(content.note)})
    copy_tokenizer(checkpoint_dir, folder, adapter.new_tokens, alone=True)
    if adapter.new_tokens:
        texts = [str(token["content"]) for token in adapter.new_tokens]
        card = {**card, "new tokens": ", ".join(map(repr, texts))}
    if any(fused_name(module) != module for module in adapter.ranks):
        ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
        trained = f"{', '.join(targets_of(adapter.tensors))}, each of rank {ranks}"
        card = {**card, "trained": trained}
    rows_to_add = adapter.vocabulary if adapter.vocabulary > sizes.vocab_size else None
    (folder / "README.md").write_text(model_card(config, card, rows_to_add), encoding="utf-8")


def export_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    checkpoint_dir: Path,
    new_tokens: Sequence[Mapping[str, Any]] = (),
    *,
    is_reward: bool = False,
) -> None:
    """Write a fully trained model as a Hugging Face checkpoint folder.

    Args:
        folder: An existing folder.
        weights: All of the model, our names.
        checkpoint_dir: Folder of the base model, for tokenizer and configuration.
        new_tokens: As an `Adapter` has them.
        is_reward: Whether its head is the one row of a reward model.
    """
    sizes = {name: weight.nbytes for name, weight in weights.items()}
    name_of = to_hf_reward if is_reward else to_hf
    write_weights(folder, sizes, weights.__getitem__, name_of=name_of)
    copy_tokenizer(checkpoint_dir, folder, new_tokens)
    largest = weights[max(sizes, key=lambda name: sizes[name])]
    keys = read_json_object(checkpoint_dir / "config.json")
    keys["vocab_size"] = len(weights[f"{TOK_EMBEDDINGS}.weight"])
    set_dtype(keys, str(largest.dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Let a config.json say in which precision its weights are: others load them in that one.

    transformers has called it ``torch_dtype``, which it still reads, and since 4.56 ``dtype``.
    """
    for key in {"dtype", "torch_dtype"} & {*config} or {"torch_dtype"}:
        config[key] = dtype


def base_name(checkpoint_dir: Path) -> str:
    """Return how an adapter names its base: the repository it came from, else the folder.

    That of a folder in the Hub's cache is in its path; ``tune download`` and ours leave
    original_repo_id.json beside the weights.
    """
    if name := hub.name_of(checkpoint_dir):
        return name
    file = checkpoint_dir / "original_repo_id.json"
    try:
        name = read_json_object(file).get("repo_id")
    except ConfigError:
        name = None
    return name if isinstance(name, str) and name else str(checkpoint_dir.resolve())


def copy_tokenizer(
    checkpoint_dir: Path,
    folder: Path,
    new_tokens: Sequence[Mapping[str, Any]] = (),
    *,
    alone: bool = False,
) -> None:
    """Copy the tokenizer's files and the ids at which generation stops.

    Args:
        checkpoint_dir: Where they are.
        folder: Where they go.
        new_tokens: What they have beyond the base's, as an `Adapter` says it.
        alone: No config.json comes beside them: they say themselves how tokenizer.json is read.
    """
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if alone and settings.is_file() and (folder / "tokenizer.json").is_file():
        keys = {**read_json_object(settings), "tokenizer_class": TOKENIZER_CLASS}
        settings.write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    write_added_tokens(folder, new_tokens)


def new_tokens_of(adapter: Path, base: Path) -> list[Entry]:
    """Return the tokens that an adapter has rows for and the tokenizer of its base has not.

    Args:
        adapter: Folder or file of it; PEFT's has the tokenizer beside it.
        base: Folder of the base model.

    Raises:
        Phi3Error: A file of the tokenizer or adapter_config.json is damaged.
    """
    folder = adapter if adapter.is_dir() else adapter.parent
    beyond = tokens_beyond(folder, base)
    if not beyond or not (folder / CONFIG).is_file():
        return beyond if is_model(folder) else []
    keys = read_json_object(folder / CONFIG, AdapterError)
    if any(_short(str(name)) == "embed_tokens" for name in keys.get("modules_to_save") or ()):
        return beyond
    ids = token_indices(keys).get("embed_tokens", ())
    return [token for token in beyond if token["id"] in ids]


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model rather than an adapter."""
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()


def token_indices(keys: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the ids of the tokens whose rows an adapter has, by the last word of the module.

    Args:
        keys: Of adapter_config.json, checked. PEFT takes a list for those of the embedding.
    """
    said = keys.get("trainable_token_indices") or {}
    said = {"embed_tokens": said} if isinstance(said, list) else said
    return {_short(name): [*ids] for name, ids in said.items()}


def targets_of(adapter: Iterable[str]) -> list[str]:
    """Return the modules that carry an adapter, told by tensor names, without their place."""
    endings = re.compile(r"\.(lora_[ab]\.weight|magnitude)$")
    modules = (endings.sub("", name) for name in adapter if name not in SAVED_WEIGHTS)
    return sorted({module.rpartition(".")[2] for module in modules})


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
    rank, rank_pattern = _usual_and_others(content.ranks)
    alpha, alpha_pattern = _usual_and_others(content.alphas)
    saved = sorted(_short(hf_name(name.removesuffix(".weight"))) for name in adapter.saved)
    rows = {_short(hf_name(module)): [*own] for module, own in adapter.rows.items()}
    return {
        **({"trainable_token_indices": rows} if rows else {}),  # PEFT reads a head's since 0.18
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


Number = TypeVar("Number", int, float)


def _usual_and_others(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
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


ADAPTER_CARD = """{matter}
# {kind} adapter for {title}

{kind} of rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {targets}.

{table}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
{resize}model = PeftModel.from_pretrained(base, ADAPTER)  # ADAPTER: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

The prompt must follow the chat template in tokenizer_config.json, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json.
"""


def model_card(
    config: Mapping[str, Any], rows: Mapping[str, Any], vocabulary: int | None = None
) -> str:
    """Return the README.md that lies beside an adapter.

    Args:
        config: Content of its adapter_config.json.
        rows: What the adapter was trained on and how, one row of the table each.
        vocabulary: To how many rows the base must be resized, if it must.
    """
    base = config["base_model_name_or_path"]
    return ADAPTER_CARD.format(
        matter=front_matter(base, "peft", ["lora", "phi3", "torchtune"]),
        base=base,
        resize=f"base.resize_token_embeddings({vocabulary})\n" if vocabulary else "",
        title=" ".join(base.split()),
        kind="DoRA" if config["use_dora"] else "LoRA",
        targets=", ".join(config["target_modules"]),
        table=markdown_table("training", rows),
        **{key: config[key] for key in ("r", "lora_alpha", "lora_dropout")},
    )


def front_matter(
    base: str, library: str, tags: Sequence[str], model_name: str | None = None
) -> str:
    """Return what the hub reads of a model card, as YAML.

    The hub refuses a card, and with it the upload, whose base is no name of a repository: that of
    a folder on this machine is left out.
    """
    facts: dict[str, Any] = {"base_model": base} if hub.REPOSITORY.fullmatch(base) else {}
    facts |= {"model_name": model_name} if model_name else {}
    facts |= {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*tags],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def markdown_table(title: str, rows: Mapping[str, Any]) -> str:
    """Return rows of names and values in Markdown; of a file elsewhere on this machine its name."""
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in rows.items():
        text = str(value)  # cards are published
        text = os.path.basename(text) if text.startswith(("/", "~")) else text
        cell = text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {key} | {cell} |")
    return "\n".join(lines)


# What a folder says of its adapter, and what is refused before one is saved or gone on with


def load_note(folder: Path) -> dict[str, Any]:
    """Read what :func:`export_adapter` noted of the adapter; empty for other people's files.

    Raises:
        CheckpointError: The file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        problem = f"{folder} has no {WEIGHTS}: it is not an adapter folder."
        raise MissingFileError(f"{problem}{folders_within(folder)}")
    try:
        with safe_open(file, framework="pt") as tensors:
            return parsed_object((tensors.metadata() or {}).get(NOTE, "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}. Copy it again.") from error


def folders_within(folder: Path) -> str:
    """Say which folders in one are adapters, as PEFT saves those that have a name; or nothing."""
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}"))
    if not inside:
        return ""
    return f" Give {' or '.join(inside[:3])}, which {'are' if inside[1:] else 'is one'}."


def parsed_object(text: str) -> dict[str, Any]:
    """Return the object in a stranger's JSON; empty if it is none."""
    try:
        keys = strict_json(text)
    except ValueError:
        return {}
    return keys if isinstance(keys, dict) else {}


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
