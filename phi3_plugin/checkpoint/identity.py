"""Which base weights an adapter was made for, told by a hash that takes no time.

A repository's name says little: a folder may hold a revision, a model that was merged or trained
on, or another one altogether, whose shapes are the same and with which an adapter computes
nonsense.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from phi3_plugin.checkpoint.hf import open_weights
from phi3_plugin.checkpoint.names import to_hf
from phi3_plugin.checkpoint.stored import StoredTensor
from phi3_plugin.errors import AdapterError, Phi3Error

PLACES = (0, 5 / 8, 3 / 4, 1)
"""Of the rows that are read: each of q, k, v, gate and up has one, however many heads there are."""

METHOD = "rows4:"
"""What a hash begins with, so that one of another kind is never taken for another base."""


def base_hash(checkpoint_dir: Path) -> str:
    """Return what tells the weights of one base model from those of another.

    It is that of four rows of every tensor, and of norms whole: of 7.6 GB some 5 MB are read.
    Weights in bf16 and the same ones stored in fp32 have one hash, however they are sharded.

    Args:
        checkpoint_dir: Folder in Hugging Face layout.

    Raises:
        CheckpointError: The weights are damaged or not those of config.json.
        MissingFileError: Files are missing.
    """
    folder = checkpoint_dir.resolve()
    files = [file for file in folder.glob("*.safetensors") if file.exists()]  # no broken links
    return _hash_of(folder, tuple(sorted(map(_stamp, files))))


def known_hash(checkpoint_dir: Path) -> str:
    """Return the same, or nothing where the weights cannot be read.

    Saving an adapter does not need them: nothing that was trained is to be lost over a hash.
    """
    try:
        return base_hash(checkpoint_dir)
    except (Phi3Error, OSError):
        return ""


def other_base(recorded: str, checkpoint_dir: Path) -> str | None:
    """Say in words that a hash is not that of a base; None if it is, or if nothing is known.

    Args:
        recorded: What an adapter's file says; empty if it is not ours.
        checkpoint_dir: Of the base at hand.
    """
    if not recorded.startswith(METHOD):
        return None
    own = known_hash(checkpoint_dir)
    return None if own in (recorded, "") else f"{short(recorded)}, but those here have {short(own)}"


def refuse_other_base(adapter: Path, recorded: str, base: str, checkpoint_dir: Path) -> None:
    """Refuse an adapter that was made for other weights.

    Args:
        adapter: For the message.
        recorded: See :func:`other_base`.
        base: What the adapter calls its base, if anything.
        checkpoint_dir: Of the base at hand.

    Raises:
        AdapterError: It was.
    """
    if hashes := other_base(recorded, checkpoint_dir):
        raise AdapterError(
            f"{adapter} was made for other weights than those of {checkpoint_dir}: for some with "
            f"the hash {hashes}. It names {base or 'no base'}: give that, or allow it with "
            "check_base=False if you know that the two belong together."
        )


def short(value: str) -> str:
    """Return what of a hash is shown."""
    return value.removeprefix(METHOD)[:12]


def _stamp(file: Path) -> tuple[str, int, int]:
    about = file.stat()
    return file.name, about.st_size, about.st_mtime_ns


# A run saves often, and reads nothing again for it while the files are the same.
@lru_cache(maxsize=8)
def _hash_of(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    return hash_of(open_weights(folder))


def hash_of(weights: Mapping[str, StoredTensor]) -> str:
    """Return the hash of weights that are open.

    Args:
        weights: By our names.
    """
    found = hashlib.sha256()
    for name, stored in sorted((to_hf(name), stored) for name, stored in weights.items()):
        found.update(f"{name} {list(stored.shape)}\n".encode())
        for rows in _rows(stored):
            values = stored[rows].to(torch.float32).numpy()
            found.update(values.astype("<f4", copy=False).tobytes())
    return METHOD + found.hexdigest()


def _rows(stored: StoredTensor) -> list[slice]:
    if len(stored.shape) == 1:
        return [slice(None)]
    last = stored.shape[0] - 1
    return [slice(int(place * last), int(place * last) + 1) for place in PLACES]
