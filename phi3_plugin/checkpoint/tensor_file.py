"""Read tensors from a file that a stranger wrote: nothing in it is run, and no size is believed."""

import io
import json
import pickletools
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3_plugin.errors import AdapterError, MissingFileError

HEADER_BYTES = 100_000_000
"""The largest header that safetensors reads."""
PICKLE_BYTES = 4_000_000
"""Each may become an object of 60; that of an adapter has some 300 for each tensor."""
ENTRIES = 100_000
"""Of a zip archive; an adapter of Phi-3-medium on all parts has 561."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TENSOR_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double")),
}
"""What the pickle of a dictionary of tensors names. Others could only be refused later, and torch
lets some pass that ask for any amount of memory."""


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors, .pt or .bin file, and the metadata of the first kind.

    Args:
        file: Read as what its name says.

    Raises:
        AdapterError: It is damaged, asks for more than reading tensors, or holds other things.
        MissingFileError: There is no such file.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} is not there.")
    if file.suffix == ".safetensors":
        tensors, metadata = _from_safetensors(file)
    else:
        tensors, metadata = _from_zip(file), {}
    _check(tensors, file)
    # A tensor may repeat what little is stored; written out here it must not be more than that.
    if (total := sum(value.nbytes for value in tensors.values())) > file.stat().st_size:
        raise AdapterError(
            f"{file} ({file.stat().st_size} bytes) holds tensors that repeat their numbers up to "
            f"{total} bytes, or share them. Save each with .clone()."
        )
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}, metadata


def _from_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = safetensors_header(file)
    metadata = header.pop("__metadata__", {})
    kinds = ("F32", "BF16", "F16")
    if wrong := [(n, h.get("dtype")) for n, h in header.items() if h.get("dtype") not in kinds]:
        name, kind = map(shown, wrong[0])
        raise AdapterError(f"{file}: {name} is {kind}, expected one of {', '.join(kinds)}.")
    try:
        return load_file(file), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or cut short: {error}. Copy it again.") from error


def safetensors_header(file: Path) -> dict[str, Any]:
    """Return the header of a file, names unique and of the right kinds.

    Raises:
        AdapterError: It is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if size < 10 or length > min(size - 8, HEADER_BYTES):
            raise AdapterError(
                f"{file} ({size} bytes) says that its header has {length}, so it is damaged or no "
                "safetensors file. Copy it again."
            )
        text = data.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: its header is broken: {error}. Copy it again.") from error
    if not isinstance(header, dict) or not all(isinstance(h, dict) for h in header.values()):
        raise AdapterError(f"{file}: its header is no table of tensors. Copy it again.")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} is there twice")
    return out


def _from_zip(file: Path) -> dict[str, Tensor]:
    _check_globals(_pickle_of(file), file)
    try:
        # Mapped, a storage cannot reach beyond the file, whatever the pickle says of its size.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises every kind, for the many ways to be broken
        raise AdapterError(
            f"{file} cannot be read as tensors ({type(error).__name__}); nothing in it was run. "
            "Save a dictionary of tensors with torch.save, or better as safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise AdapterError(f"{file} holds a {type(state).__name__}, expected names and tensors.")
    return state


BROKEN = (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, OverflowError)
"""RuntimeError is for entries marked as encrypted, OverflowError for offsets beyond any file."""


def _pickle_of(file: Path) -> bytes:
    """Return the pickle of an archive as torch.save writes it, after looking at all its sizes."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
            packed = [e for e in entries if e.compress_type or e.file_size != e.compress_size]
            if packed or sum(e.file_size for e in entries) > size or len(entries) > ENTRIES:
                raise AdapterError(
                    f"{file} ({size} bytes) unpacks to {sum(e.file_size for e in entries)} bytes "
                    f"in {len(entries)} entries. torch.save does not compress: it was made to fill "
                    "the memory, or by another program."
                )
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
                raise AdapterError(f"{file} has no data.pkl of a sensible size. {AS_SAVED}")
            return archive.read(pickles[0])
    except BROKEN as error:
        what = f"{file} is not an archive of torch.save: {error}."
        raise AdapterError(f"{what} {AS_SAVED}") from error


AS_SAVED = "Old and foreign pickles are not read: load it where you trust it, save as safetensors."


def _check_globals(pickled: bytes, file: Path) -> None:
    """Look through a pickle without running it."""
    asked = set()
    try:
        for code, argument, _ in pickletools.genops(io.BytesIO(pickled)):
            if code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"):
                asked.add(f"{code.name} {argument or ''}".strip())
            elif code.name == "GLOBAL":
                asked.add(str(argument))
    except (ValueError, IndexError, OverflowError, UnicodeError) as error:
        raise AdapterError(f"{file}: its pickle is broken: {error}. {AS_SAVED}") from error
    if foreign := sorted(asked - TENSOR_GLOBALS):
        raise AdapterError(
            f"{file} asks for {', '.join(shown(name) for name in foreign[:5])}, which tensors do "
            "not need. Nothing in it was run. If you trust it, save its tensors as safetensors."
        )


def _check(tensors: Mapping[str, Any], file: Path) -> None:
    for name, value in tensors.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not plain or value.device.type != "cpu":
            what = f"{file}: {shown(name)} is a {type(value).__name__}"
            raise AdapterError(f"{what}, expected a plain tensor.")
        if value.dtype not in DTYPES:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
            raise AdapterError(f"{file}: {shown(name)} is {value.dtype}, expected {kinds}.")
    if not tensors:
        raise AdapterError(f"{file} holds no tensors.")


def shown(name: object) -> str:
    """Return a name as it can be printed: one line, not too long."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."
