"""Write the folder that serves: adapter, tokenizer, model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3_plugin.checkpoint.card import model_card
from phi3_plugin.checkpoint.hf import save_weights
from phi3_plugin.checkpoint.peft import save_adapter

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
        adapter: Our fused names, see `save_adapter`.
        checkpoint_dir: Folder of the base model.
        rank: With ``alpha``, the scale of every module: alpha / rank.
        alpha: See ``rank``.
        dropout: What the adapters were trained with.
        origin: Kept in the file's metadata, with rank and alpha.
        card: Rows of the model card's table.
    """
    base = base_name(checkpoint_dir)
    origin = {**origin, "rank": rank, "alpha": alpha}
    save_adapter(folder, adapter, rank, alpha, dropout=dropout, base=base, origin=origin)
    copy_tokenizer(checkpoint_dir, folder)
    (folder / "README.md").write_text(model_card(folder, base, card), encoding="utf-8")


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
