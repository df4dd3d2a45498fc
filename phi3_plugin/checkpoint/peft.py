"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi3_plugin.checkpoint.names import from_peft, to_peft
from phi3_plugin.errors import AdapterError, MissingFileError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(
    folder: Path, adapter: dict[str, Tensor], alpha: float, dropout: float, base: str
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        folder: An existing folder.
        adapter: Our names; ``lora_a [R, in]`` and ``lora_b [out, R]`` of each module.
        alpha: The adapters' products are scaled by alpha / R.
        dropout: What the adapters were trained with.
        base: Repository id or folder of the base model.

    Raises:
        AdapterError: The ranks differ or alpha is not a whole number.
    """
    tensors = {to_peft(name): value.contiguous() for name, value in adapter.items()}
    config = adapter_config(tensors, alpha, dropout, base)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files that only their owner may read; a server runs as another user.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def adapter_config(
    tensors: dict[str, Tensor], alpha: float, dropout: float, base: str
) -> dict[str, Any]:
    """Return the content of adapter_config.json for tensors under PEFT's names.

    Targets and rank are read off the tensors, since a recipe's list may name what is not there.
    There is one rank and an integer alpha: vLLM ignores rank and alpha patterns, llama.cpp the
    latter, and ollama reads alpha as an integer.

    Raises:
        AdapterError: The ranks differ or alpha is not a whole number.
    """
    ranks = {value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1 or alpha != int(alpha):
        raise AdapterError(
            f"An adapter needs one rank and a whole alpha; found ranks {sorted(ranks)}, "
            f"alpha {alpha}."
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": int(alpha),
        "lora_dropout": float(dropout),
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the adapter tensors of a folder under our names.

    Raises:
        CheckpointError: A tensor is not part of a Phi-3 adapter.
        MissingFileError: There is no adapter in the folder.
    """
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(f"{folder} has no {WEIGHTS}: it is not an adapter folder.")
    return {from_peft(name): value for name, value in load_file(folder / WEIGHTS).items()}


def check_trained(adapter: dict[str, Tensor]) -> None:
    """Refuse an adapter that would serve nothing, or nonsense.

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
    if not any(value.any() for name, value in adapter.items() if ".lora_b." in name):
        raise AdapterError(
            "The adapter is still what it was at the start, so nothing was saved: no optimizer "
            "step with a learning rate above 0 was made. Give more rows than batch_size * "
            "gradient_accumulation_steps, more epochs, or fewer warm-up steps."
        )
