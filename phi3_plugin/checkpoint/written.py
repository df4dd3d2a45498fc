"""Whether a file is still what its note says, so that its original can be given back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.modules import aliases
from phi3_plugin.checkpoint.served import BASE_HASH, MODULES, PATTERNS, ROUNDED, original
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError, CheckpointError

NOT_KEPT = (MODULES, ROUNDED, PATTERNS, BASE_HASH)
"""What of a note is not the adapter's origin, but how the file was written and for what."""

Write = Callable[[Adapter], Adapter]
"""Gives what the file would hold for an adapter."""


def as_written(found: Adapter, note: object, config: Phi3Config, write: Write) -> Adapter:
    """Return the adapter that a file was made of, or what it holds if it was changed since.

    A note is believed only if writing the adapter that it describes would give the very tensors
    and scales that were found.

    Args:
        found: What the file holds, checked.
        note: What it says of its original, if anything.
        config: Sizes of the model.
        write: How its kind of file is written.
    """
    found = replace(found, base_hash=_base_hash(note))
    if (ours := _checked(note, config)) is None:
        return found
    try:
        tensors, scales = original(found.tensors, ours, config)
        kept = {k: v for k, v in ours.items() if k not in NOT_KEPT}
        adapter = replace(found, tensors=tensors, scales=scales, origin=kept)
        again = write(adapter)
    except (AdapterError, CheckpointError, ArithmeticError, RuntimeError):
        return found
    return adapter if _same(again, found) else found


def _checked(note: object, config: Phi3Config) -> dict[str, Any] | None:
    """Return a note with our names of modules, or None if it is none."""
    if not isinstance(note, dict) or not isinstance(note.get(MODULES), dict):
        return None
    known, rounded = aliases(config), note.get(ROUNDED, {})
    values = note[MODULES].values()
    if not all(
        isinstance(v, list) and len(v) in (2, 3) and all(map(_is_number, v)) for v in values
    ):
        return None
    texts = isinstance(rounded, dict) and all(isinstance(text, str) for text in rounded.values())
    if not texts or not (rounded.keys() | note[MODULES].keys()) <= known.keys():
        return None
    modules = {known[name]: value for name, value in note[MODULES].items()}
    return {**note, MODULES: modules, ROUNDED: {known[n]: text for n, text in rounded.items()}}


def _base_hash(note: object) -> str:
    """Return what a note says of the base; it holds for a file whose numbers were changed too."""
    said = note.get(BASE_HASH) if isinstance(note, dict) else None
    return said if isinstance(said, str) else ""


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value < 1e30  # type: ignore[arg-type, operator]


def _same(one: Adapter, other: Adapter) -> bool:
    return one.scales == other.scales and _equal(one.tensors, other.tensors)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in one.items()
    )
