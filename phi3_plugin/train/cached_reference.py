"""Log-probabilities of the base, computed once before the first step and kept with the tokens.

A step of dpo or kto has one forward pass less then. They are found again by what decides them: the
tokens, the base weights and how these are computed.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from phi3_plugin.checkpoint.base import known_hash
from phi3_plugin.data.collate import concatenate
from phi3_plugin.data.order import Order
from phi3_plugin.data.preferences import PreferenceDataset
from phi3_plugin.settings import Settings, is_quantized
from phi3_plugin.train.losses import Batch
from phi3_plugin.train.reference import add_reference
from phi3_plugin.train.step import ready
from phi3_plugin.train.world import World


# Shapes: D documents of a store
def compare_with_cached(
    world: World, model: nn.Module, settings: Settings, dataset: Any, *, mismatched: bool
) -> None:
    """Let a data set tell log p of its answers without the adapter, computed now or before.

    Args:
        world: Its processes share the work.
        model: With adapters.
        settings: Of the run.
        dataset: A `PreferenceDataset`, or packs of it; its whole store is computed.
        mismatched: Whether answers to other questions are needed too.
    """
    samples: PreferenceDataset = getattr(dataset, "ds", dataset)
    file = _file_of(samples, settings, mismatched)
    known = _read(file, len(samples.store.samples)) if world.is_main else None
    known = world.gather(known)[0]
    if known is None:
        known = _computed(world, model, samples, settings.batch_size, mismatched)
        if world.is_main and file is not None:
            _write(file, known)
    samples.reference = known


def _computed(
    world: World, model: nn.Module, samples: PreferenceDataset, batch_size: int, mismatched: bool
) -> NDArray[np.float32]:
    """Return log p of every document, and of every one with another answer, [2, D]."""
    store = samples.store
    everything: Any = PreferenceDataset(store, np.arange(0, len(store.samples), samples.width))
    everything.has_mismatched = mismatched
    size = batch_size * world.size
    order = Order(
        everything,
        batch_size=batch_size,
        accumulation=1,
        processes=world.size,
        seed=0,
        shuffle=False,
    )
    found = list[tuple[int, list[list[float]]]]()
    steps = range(order.steps_per_epoch)
    for step in tqdm(steps, desc="Reference", disable=None if world.is_main else True, leave=False):
        first = step * size + world.rank * batch_size
        for batch in order.batches(step, world.rank, concatenate):
            values = reference_of(model, batch, world.device)
            if first < len(everything):  # else it is there so that all processes have as many
                found.append((first * samples.width, values))
    result = np.full((2, len(store.samples)), np.nan, np.float32)
    for first, values in (one for share in world.gather(found) for one in share):
        for row, numbers in enumerate(values):
            result[row, first : first + len(numbers)] = numbers
    return result


@torch.no_grad()
def reference_of(model: nn.Module, batch: Batch, device: torch.device) -> list[list[float]]:
    """Return log p of a batch's answers without the adapter, and of those to other questions."""
    batch = ready(batch, device)
    parts = [batch, batch["mismatched"]] if "mismatched" in batch else [batch]
    for part in parts:
        add_reference(model, part)
    return [part["reference"].tolist() for part in parts]


def _file_of(samples: PreferenceDataset, s: Settings, mismatched: bool) -> Path | None:
    """Return where they are kept, beside the tokens; None if that is of no use later."""
    base = known_hash(s.checkpoint_dir)
    if not base or samples.store.temporary is not None:
        return None
    model = [s.dtype, is_quantized(s.model), s.model.get("rope_factors", "auto")]
    key = json.dumps([base, *model, mismatched, torch.__version__, samples.store.digest])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return samples.store.folder / f"reference-{name}.npy"


def _read(file: Path | None, documents: int) -> NDArray[np.float32] | None:
    with suppress(OSError, ValueError):
        values: NDArray[np.float32] = np.load(file or "", allow_pickle=False)
        if values.shape == (2, documents) and values.dtype == np.float32:
            return values
    return None


def _write(file: Path, values: NDArray[np.float32]) -> None:
    aside = file.with_suffix(f".{os.getpid()}-unfinished")
    with suppress(OSError):  # of a folder that is another user's; it is computed again then
        with aside.open("wb") as opened:
            np.save(opened, values, allow_pickle=False)
        os.replace(aside, file)
