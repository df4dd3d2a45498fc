"""Tensors that stay in a safetensors file until they are needed, and then are read, not mapped.

Source: the safetensors format: a little-endian uint64, that many bytes of JSON, the data.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi3_plugin.errors import CheckpointError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What weights can be stored in; others need scales that a Phi-3 checkpoint does not have."""


@dataclass(frozen=True)
class StoredTensor:
    """Rows of it are read when it is sliced: ``stored[2:5]``, or ``stored[:]`` for all.

    Pages of a mapped file would count as this process's memory for as long as anything holds the
    map. What is read here belongs to the caller, who lets go of it.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Where in the file it begins."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Read consecutive rows.

        Raises:
            CheckpointError: The file has become shorter.
            ValueError: The slice leaves rows out.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"Only consecutive rows can be read, not every {step}.")
        out = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        read_into(self.file, self.offset + start * row, out)
        return out


def read_into(file: Path, offset: int, out: Tensor) -> None:
    """Fill a new tensor with the bytes at an offset.

    Raises:
        CheckpointError: The file ends before it is full.
    """
    left = out.flatten().view(torch.uint8).numpy().data  # the same memory
    with file.open("rb", buffering=0) as data:
        data.seek(offset)
        while left:  # one call reads 2 GB at most
            count = data.readinto(left)
            if not count:
                raise CheckpointError(f"{file} became shorter while it was read. Try again.")
            left = left[count:]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file by name; only the header is read.

    Raises:
        CheckpointError: The file is damaged, or holds what is not a floating-point number.
    """
    try:
        with safe_open(file, framework="pt"):  # checks that the data is as long as it should be
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short: {error}. "
            "Download it again."
        ) from error
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
    header.pop("__metadata__", None)
    if wrong := [f"{n} is {h['dtype']}" for n, h in header.items() if h["dtype"] not in DTYPES]:
        raise CheckpointError(
            f"{file} holds {len(wrong)} tensors that are not in {', '.join(DTYPES)}: "
            f"{', '.join(wrong[:3])}. Use files that are not quantized."
        )
    return {
        name: StoredTensor(
            file, DTYPES[h["dtype"]], tuple(h["shape"]), 8 + length + h["data_offsets"][0]
        )
        for name, h in header.items()
    }


def equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    """Whether two tensors have the same shape, dtype and values; reads some rows at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    steps = (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    return all(torch.equal(one[step], other[step]) for step in steps)
