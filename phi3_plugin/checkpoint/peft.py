"""Adapters in the layout of Hugging Face PEFT, written so that every runtime reads them alike."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.adapter import A, Adapter, B
from phi3_plugin.checkpoint.names import SAVED, from_peft, to_peft
from phi3_plugin.checkpoint.peft_config import adapter_config
from phi3_plugin.checkpoint.served import Served
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "phi3_plugin"
"""Key in the weights file's metadata: what the adapter was before it was made uniform."""


def save_adapter(folder: Path, served: Served, adapter: Adapter, base: str, layers: int) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        folder: An existing folder.
        served: What goes into the files.
        adapter: What it was made of, for what is written as it is.
        base: Repository id or folder of the base model.
        layers: How many the model has.
    """
    values = {**served.tensors, **adapter.saved}
    tensors = {to_peft(name): value.contiguous() for name, value in values.items()}
    config = adapter_config(served, adapter, base, layers)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    metadata = {"format": "pt", ORIGIN: json.dumps(served.note)}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    # safetensors makes files that only their owner may read; a server runs as another user.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the adapter tensors of a folder under our names.

    Raises:
        CheckpointError: A tensor is not part of a Phi-3 adapter, or the file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        return {from_peft(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_origin(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_adapter` noted about the adapter; empty for other people's files.

    Raises:
        CheckpointError: The file is damaged.
        MissingFileError: There is no adapter in the folder.
    """
    with _opened(folder) as file:
        try:
            origin = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
        except (ValueError, RecursionError):
            origin = None
    return origin if isinstance(origin, dict) else {}


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


def targets_of(adapter: Iterable[str]) -> list[str]:
    """Return the modules that carry an adapter, told by our tensor names, without their place."""
    trained = (name for name in adapter if name not in SAVED)
    modules = (name.partition(".lora_")[0].removesuffix(".magnitude") for name in trained)
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
    # Either may be what starts at zero: B, or the A of an embedding.
    modules = [name.removesuffix(A) for name in adapter if name.endswith(A)]
    moved = any(adapter[m + A].any() and adapter[m + B].any() for m in modules)
    if not moved and not may_be_identity:
        raise AdapterError(
            "The adapter is still what it was at the start, so nothing was saved: no optimizer "
            "step with a learning rate above 0 was made. Give more rows than batch_size * "
            "gradient_accumulation_steps, more epochs, or fewer warm-up steps."
        )
