"""Adapters for torchtune's own Phi-3, whose q, k, v, w1 and w3 are layers of their own."""

import json
from pathlib import Path

from phi3_plugin.checkpoint.adapter import (
    Adapter,
    FileContent,
    check_writable_adapter,
    integer_alpha,
    level_scales,
    pad,
    unfuse,
)
from phi3_plugin.checkpoint.base import TOK_EMBEDDINGS, A, fused_name, torchtune_name
from phi3_plugin.checkpoint.files import whole_files, write_state
from phi3_plugin.checkpoint.peft import CONFIG, NOTE, targets_of
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

# Shapes: R rank


def write_torchtune(file: Path, adapter: Adapter, config: Phi3Config) -> None:
    """Write an adapter that ``torchtune.models.phi3.lora_phi3_mini`` loads, and its settings.

    A whole layer is cut: every part gets a copy of A and its rows of B, which is exact. Since a
    model of torchtune has one rank and one alpha, smaller ranks are padded and other scales go
    into B; adapter_config.json beside the file says rank and alpha, and by what the original comes
    back.

    Args:
        file: Such as adapter_model.pt; it and adapter_config.json must not exist.
        adapter: What to write.
        config: Of the base model.

    Raises:
        AdapterError: It adapts or replaces what torchtune's model cannot.
        OutputError: The files exist or cannot be written.
    """
    content = split_content(adapter, config)
    tensors = {torchtune_name(name): v.contiguous() for name, v in content.tensors.items()}
    settings = {
        "r": next(iter(content.ranks.values())),
        "lora_alpha": next(iter(content.alphas.values())),
        "target_modules": targets_of(tensors),
        "peft_type": "LORA",
        "use_dora": adapter.is_dora,
        "lora_dropout": adapter.dropout,
        "base_model_name_or_path": adapter.base,
        NOTE: content.note,
    }
    with whole_files(file.with_name(CONFIG), file) as (config_file, weights_file):
        config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_state(weights_file, tensors)


def split_content(adapter: Adapter, config: Phi3Config) -> FileContent:
    """Cut whole layers into parts, and give all modules one rank and one integer alpha.

    Raises:
        AdapterError: torchtune's model has no place for a module.
    """
    check_writable_adapter(adapter)
    if TOK_EMBEDDINGS in adapter.ranks:
        raise AdapterError(f"{TOK_EMBEDDINGS}: torchtune's Phi-3 has no adapter on its embedding.")
    if whole := {**adapter.saved, **adapter.rows}:
        raise AdapterError(
            f"{', '.join(whole)}: an adapter of torchtune's holds no weights or rows that are "
            "trained whole. Merge the adapter instead."
        )
    rank = max(adapter.ranks.values())
    alpha = integer_alpha(adapter.scales.values(), rank)
    tensors, note = level_scales(
        adapter, dict.fromkeys(map(fused_name, adapter.ranks), alpha / rank)
    )
    parts = unfuse(pad(tensors, rank), config)
    modules = [name.removesuffix(A) for name in parts if name.endswith(A)]
    return FileContent(parts, dict.fromkeys(modules, rank), dict.fromkeys(modules, alpha), note)
