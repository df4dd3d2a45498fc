"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi3_plugin.checkpoint.names import from_peft, to_peft
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
A, B = ".lora_a.weight", ".lora_b.weight"
ORIGIN = "phi3_plugin"
"""Key in the weights file's metadata: what the adapter was before it was made uniform."""


def save_adapter(
    folder: Path,
    adapter: dict[str, Tensor],
    rank: int,
    alpha: float,
    *,
    dropout: float,
    base: str,
    origin: Mapping[str, Any],
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        folder: An existing folder.
        adapter: Our names; ``lora_a [R, in]`` and ``lora_b [out, R]`` of each module, where R
            may differ.
        rank: With ``alpha``, the scale of every module: alpha / rank.
        alpha: See ``rank``.
        dropout: What the adapters were trained with.
        base: Repository id or folder of the base model.
        origin: Kept in the file's metadata; :func:`load_origin` gives it back.
    """
    adapter, alpha = uniform(adapter, rank, alpha)
    tensors = {to_peft(name): value.contiguous() for name, value in adapter.items()}
    text = json.dumps(adapter_config(tensors, alpha, dropout, base), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    metadata = {"format": "pt", ORIGIN: json.dumps(dict(origin))}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    # safetensors makes files that only their owner may read; a server runs as another user.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def uniform(adapter: dict[str, Tensor], rank: int, alpha: float) -> tuple[dict[str, Tensor], int]:
    """Give every module one rank and the adapter one integer alpha; it computes the same.

    vLLM ignores rank and alpha patterns, llama.cpp the latter, and ollama reads alpha as an
    integer. Modules of a smaller rank are padded with zeros, which is exact.

    Args:
        adapter: Our names, ranks as they are.
        rank: With ``alpha``, the scale of every module: alpha / rank.
        alpha: See ``rank``.

    Returns:
        The adapter, and alpha for its rank.
    """
    widest = max(value.shape[0] for name, value in adapter.items() if name.endswith(A))
    padded = {name: _pad(name, value, widest) for name, value in adapter.items()}
    scaled = alpha * widest / rank
    if scaled == int(scaled):
        return padded, int(scaled)
    fold = alpha / rank  # no integer says this scale: alpha = rank, and B carries it
    return {n: v * fold if n.endswith(B) else v for n, v in padded.items()}, widest


def _pad(name: str, value: Tensor, rank: int) -> Tensor:
    if name.endswith(A):
        return torch.nn.functional.pad(value, (0, 0, 0, rank - value.shape[0]))
    if name.endswith(B):
        return torch.nn.functional.pad(value, (0, rank - value.shape[1]))
    return value


def adapter_config(
    tensors: dict[str, Tensor], alpha: int, dropout: float, base: str
) -> dict[str, Any]:
    """Return the content of adapter_config.json for tensors under PEFT's names.

    Targets and rank are read off the tensors, since a recipe's list may name what is not there.
    """
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors}
    rank = next(v.shape[0] for name, v in tensors.items() if name.endswith("lora_A.weight"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(dropout),
        "target_modules": sorted(modules),
        "bias": "none",
        "use_dora": any("magnitude" in name for name in tensors),
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


def load_origin(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_adapter` noted about the adapter; empty for other people's files."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        origin: dict[str, Any] = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
    return origin


def targets_of(adapter: Iterable[str]) -> list[str]:
    """Return the modules that carry an adapter, told by our tensor names, without their place."""
    modules = (name.partition(".lora_")[0].removesuffix(".magnitude") for name in adapter)
    return sorted({module.rpartition(".")[2] for module in modules})


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
    kind = "DoRA" if any(name.endswith(".magnitude") for name in adapter) else "LoRA"
    ranks = {str(value.shape[0]) for name, value in adapter.items() if name.endswith(A)}
    return f"{kind} of rank {', '.join(sorted(ranks))} on {', '.join(targets_of(adapter))}"


def check_trained(adapter: dict[str, Tensor], *, may_be_identity: bool = False) -> None:
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
    moved = any(value.any() for name, value in adapter.items() if ".lora_b." in name)
    if not moved and not may_be_identity:
        raise AdapterError(
            "The adapter is still what it was at the start, so nothing was saved: no optimizer "
            "step with a learning rate above 0 was made. Give more rows than batch_size * "
            "gradient_accumulation_steps, more epochs, or fewer warm-up steps."
        )
