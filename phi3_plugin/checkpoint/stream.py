"""Write safetensors files piece by piece, for weights that are never in memory whole.

Source: the safetensors format: a little-endian uint64, that many bytes of JSON, the data.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phi3_plugin.checkpoint.hf import INDEX
from phi3_plugin.checkpoint.stored import DTYPES
from phi3_plugin.errors import OutputError

SHARD_BYTES = 5_000_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
"""The data begins at a multiple of it, as safetensors' own files do."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is made while it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Its rows in order, some at a time, in its dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as shards with an index and return the shards.

    Args:
        folder: An existing folder.
        entries: Hugging Face's names.
        shard_bytes: A shard is closed before it grows beyond this.

    Raises:
        OutputError: The disk has not enough room.
    """
    total = sum(entry.nbytes for entry in entries.values())
    _check_room(folder, total)
    shards, weight_map = _shards(entries, shard_bytes), dict[str, str]()
    files = [
        folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(file, shard)
        weight_map.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return files


def write_tensors(file: Path, entries: Mapping[str, Entry]) -> None:
    """Write one file, a piece at a time.

    Raises:
        ValueError: The pieces of a tensor are not what its entry says.
    """
    # Wide numbers first: then every tensor begins at a multiple of its numbers' width.
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in ordered:
        header[name] = _header(entry, offset)
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered:
            written = sum(out.write(_bytes(piece, entry)) for piece in entry.pieces())
            if written != entry.nbytes:
                raise ValueError(f"{name}: {written} bytes were made, not {entry.nbytes}.")


def _header(entry: Entry, offset: int) -> dict[str, object]:
    ends = [offset, offset + entry.nbytes]
    return {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}


def _bytes(piece: Tensor, entry: Entry) -> memoryview:
    if piece.dtype != entry.dtype:
        raise ValueError(f"A piece is in {piece.dtype}, its tensor in {entry.dtype}.")
    return piece.contiguous().flatten().view(torch.uint8).numpy().data  # the same memory


def _shards(entries: Mapping[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if size + entry.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, but the weights take "
            f"{needed / 1e9:.1f} GB. Make room, or choose a folder on another disk."
        )
