"""Write the folder that serves: adapter, tokenizer, model card; and read the adapter back."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3_plugin.checkpoint.card import model_card
from phi3_plugin.checkpoint.hf import row_norms, save_weights
from phi3_plugin.checkpoint.peft import (
    check_same,
    load_adapter,
    load_origin,
    save_adapter,
    targets_of,
)
from phi3_plugin.checkpoint.split import fuse_adapter, parts_of, unfuse_adapter
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
    adapter: dict[str, Tensor],
    *,
    checkpoint_dir: Path,
    rank: int,
    alpha: float,
    dropout: float,
    origin: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Write a PEFT adapter with its tokenizer and model card into a folder.

    Args:
        folder: An existing folder.
        adapter: Names of our model or of torchtune's split one; parts are made whole.
        checkpoint_dir: Folder of the base model.
        rank: With ``alpha``, the scale of every module: alpha / rank.
        alpha: See ``rank``.
        dropout: What the adapters were trained with.
        origin: Kept in the file's metadata, with rank and alpha.
        card: Rows of the model card's table.
    """
    base = base_name(checkpoint_dir)
    origin = {**origin, "rank": rank, "alpha": alpha}
    if parts := parts_of(adapter):
        origin["parts"] = parts
        card = {**card, "trained": f"{', '.join(targets_of(adapter))}, each of rank {rank}"}
        norms = partial(row_norms, checkpoint_dir)
        adapter = fuse_adapter(adapter, read_config(checkpoint_dir), norms)
    save_adapter(folder, adapter, rank, alpha, dropout=dropout, base=base, origin=origin)
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

    Raises:
        CheckpointError: A tensor is not part of a Phi-3 adapter, or of the model's.
        MissingFileError: There is no adapter in the folder.
    """
    adapter, origin = load_adapter(folder), load_origin(folder)
    if parts := origin.get("parts"):
        adapter = unfuse_adapter(adapter, parts, origin["rank"], read_config(checkpoint_dir))
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
