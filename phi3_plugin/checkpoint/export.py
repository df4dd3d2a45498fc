"""Write the folder that serves: adapter, tokenizer, model card; and read the adapter back."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.card import model_card
from phi3_plugin.checkpoint.hf import row_norms, save_weights
from phi3_plugin.checkpoint.identity import known_hash
from phi3_plugin.checkpoint.names import SAVED
from phi3_plugin.checkpoint.peft import (
    check_same,
    load_adapter,
    load_origin,
    save_adapter,
    targets_of,
)
from phi3_plugin.checkpoint.served import MODULES, original, served
from phi3_plugin.checkpoint.split import parts_of
from phi3_plugin.config import read_config

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
        adapter: Names of our model or of torchtune's split one; parts are made whole. Which base
            weights it was made for goes into the file: what it says itself, else those of
            ``checkpoint_dir``.
        checkpoint_dir: Folder of the base model.
        card: Rows of the model card's table.
        patterns: Leave ranks and scales as they are, said by rank_pattern and alpha_pattern, which
            PEFT reads, but vLLM and llama.cpp do not. Otherwise all modules get one of each.

    Raises:
        AdapterError: The adapter is empty, or no file of PEFT's can hold it.
    """
    base, config = base_name(checkpoint_dir), read_config(checkpoint_dir)
    # Somebody else's says nothing, so it is for the base that its user names.
    adapter = replace(adapter, base_hash=adapter.base_hash or known_hash(checkpoint_dir))
    if parts_of(adapter.tensors):
        ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
        names = ", ".join(targets_of(adapter.tensors))
        card = {**card, "trained": f"{names}, each of rank {ranks}"}
    norms = partial(row_norms, checkpoint_dir)
    held = served(adapter, config, norms, patterns=patterns)
    save_adapter(folder, held, adapter, base, config.num_hidden_layers)
    copy_tokenizer(checkpoint_dir, folder)
    (folder / "README.md").write_text(model_card(folder, base, card), encoding="utf-8")


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
        adapter = {**tensors, **{n: v for n, v in adapter.items() if n in SAVED}}
    if model is not None:
        check_same(folder, adapter, model)
    return adapter


def export_model(folder: Path, weights: dict[str, Tensor], checkpoint_dir: Path) -> None:
    """Write a fully trained model as a Hugging Face checkpoint folder.

    Args:
        folder: An existing folder.
        weights: All of the model, our names.
        checkpoint_dir: Folder of the base model, for tokenizer and configuration.
    """
    save_weights(folder, weights)
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
