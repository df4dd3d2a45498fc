"""Files that are whole or not there, and tensors read from files that a stranger wrote."""

import fcntl
import io
import json
import os
import pickletools
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi3_plugin.config import strict_json
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError, OutputError

# Write a folder so that it is either whole or not there.
#
# best -> .partial-old-best       replacing is two renames; a kill between them leaves no ``best``,
# .partial-best -> best           and `restore` puts the old one back

PARTIAL = ".partial-"
"""Marks folders that a killed run left half-written."""
_OLD = f"{PARTIAL}old-"


@contextmanager
def whole_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``final`` and rename it into place when the block ends well.

    Args:
        final: The folder to create.
        replace: Whether it may exist; it is then removed once the new one is in its place.

    Yields:
        The folder to write into.

    Raises:
        OutputError: ``final`` exists, or writing fails (disk full, no permission).
    """
    if final.exists() and not replace:
        raise OutputError(f"{final} exists and would be overwritten. Move it or choose another.")
    partial = final.with_name(f"{PARTIAL}{final.name}")
    if _is_being_written(partial):
        raise OutputError(f"{final} is being written by another process. Wait until it has ended.")
    handle = None
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        handle = _lock(partial)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        _swap(partial, final)
        _sync(final.parent)
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{final} could not be written: {error}. Earlier checkpoints are untouched."
        ) from error
    finally:
        if handle is not None:
            try:
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(handle)


def _lock(folder: Path) -> int:
    """Mark a folder as being written until the file that is returned is closed, or we die.

    Raises:
        BlockingIOError: Another process writes it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # some network file systems lock no folders
    return handle


def _is_being_written(folder: Path) -> bool:
    try:
        os.close(_lock(folder))
    except BlockingIOError:
        return True
    except OSError:
        pass  # it is not there
    return False


def restore(parent: Path) -> None:
    """Put back every folder whose replacement was killed before the new one had its name.

    Every process may call this at once: one of them renames, the others find it done.

    Args:
        parent: Where :func:`whole_folder` wrote; need not exist.
    """
    for old in parent.glob(f"{_OLD}*"):
        final = parent / old.name.removeprefix(_OLD)
        if not final.exists():
            with suppress(FileNotFoundError):
                old.rename(final)


def sweep(parent: Path) -> None:
    """Remove what killed runs left half-written; what others are writing stays.

    Args:
        parent: Where :func:`whole_folder` wrote.
    """
    restore(parent)
    for folder in parent.glob(f"{PARTIAL}*"):
        if folder.is_dir() and not _is_being_written(folder):
            shutil.rmtree(folder, ignore_errors=True)


def check_output(output_dir: Path, checkpoint_dir: Path) -> None:
    """Check that results can be written, and not into the base model; nothing is left behind.

    Args:
        output_dir: May not exist yet.
        checkpoint_dir: Of the base model.

    Raises:
        OutputError: They cannot.
    """
    inside = checkpoint_dir.resolve()
    if inside in (output_dir.resolve(), *output_dir.resolve().parents):
        raise OutputError(
            f"output_dir: {output_dir} is inside checkpoint_dir {checkpoint_dir}. Choose a folder "
            "elsewhere, so that the base model stays as it was downloaded."
        )
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    probe = existing / f"{PARTIAL}probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"output_dir: {output_dir} cannot be written: {error.strerror or error}. "
            "Choose a folder that you may write to."
        ) from error


def _swap(new: Path, final: Path) -> None:
    old = final.with_name(f"{_OLD}{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    # A rename may reach the disk before the data does; a crash would leave empty files.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_files(*finals: Path) -> Iterator[list[Path]]:
    """Give a name beside each file, and rename all into place when the block ends well.

    Args:
        finals: The files to create; the last one is what readers look for.

    Yields:
        Where to write them.

    Raises:
        OutputError: One exists, or writing fails (disk full, no permission).
    """
    # Other than Path.exists, also where a link leads nowhere; and a name may be too long to ask.
    if exists := [final for final in finals if os.path.lexists(final)]:
        raise OutputError(
            f"{exists[0]} exists and would be overwritten. Move it or choose another."
        )
    partials = [final.with_name(f"{PARTIAL}{final.name}") for final in finals]
    try:
        yield partials
        for partial in partials:
            _sync(partial)
        for partial, final in zip(partials, finals, strict=True):
            partial.rename(final)
    except (OSError, SafetensorError) as error:
        # numpy, which others write tensors with, tells how many numbers it wrote and not why
        full = isinstance(error, OSError) and error.errno is None and "requested" in str(error)
        why = "the disk is full" if full else error
        raise OutputError(f"{finals[-1]} could not be written: {why}.") from error
    finally:
        for partial in partials:
            with suppress(OSError):  # which is told above, such as a name that is too long
                partial.unlink(missing_ok=True)


def append_whole(file: Path, data: bytes) -> None:
    """Add bytes to the end of a file, all of them or, where the disk is full, none.

    Raises:
        OSError: They cannot be written.
    """
    with file.open("ab", buffering=0) as opened:
        size, rest = opened.seek(0, os.SEEK_END), memoryview(data)
        try:
            while rest:
                rest = rest[opened.write(rest) :]
        except OSError:
            with suppress(OSError):
                opened.truncate(size)
            raise


def save_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read, too.

    safetensors makes files that only their owner may read; a server runs as another user.
    """
    file.touch()
    mode = file.stat().st_mode
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(file)
    file.chmod(mode)


def _sort_metadata(file: Path) -> None:
    """Give a file's metadata one order; safetensors writes it in another each time."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # spaces may follow
            stream.seek(8)
            stream.write(text.ljust(length))


# Tensors that stay in a safetensors file until they are needed

STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What weights can be stored in; others need scales that a Phi-3 checkpoint does not have."""


@dataclass(frozen=True)
class StoredTensor:
    """Rows of it are read when it is sliced: ``stored[2:5]``, or ``stored[:]`` for all.

    What is read belongs to the caller, who lets go of it: the file is mapped for that moment only,
    since pages of a map count as this process's memory for as long as anything holds it.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        """Read rows.

        Raises:
            CheckpointError: The file has changed since it was opened.
        """
        try:
            with safe_open(self.file, framework="pt") as tensors:
                part: Tensor = tensors.get_slice(self.name)[rows]
                return part.clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} changed while it was read: {error}.") from error


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file by name; only the header is read.

    Raises:
        CheckpointError: The file is damaged, or holds what is not a floating-point number.
    """
    stored, wrong = dict[str, StoredTensor](), list[str]()
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                about = tensors.get_slice(name)
                if (kind := about.get_dtype()) in STORED_DTYPES:
                    shape = tuple(about.get_shape())
                    stored[name] = StoredTensor(file, name, STORED_DTYPES[kind], shape)
                else:
                    wrong.append(f"{name} is {kind}")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short: {error}. "
            "Download it again."
        ) from error
    if wrong:
        raise CheckpointError(
            f"{file} holds {len(wrong)} tensors that are not in {', '.join(STORED_DTYPES)}: "
            f"{', '.join(wrong[:3])}. Use files that are not quantized."
        )
    return stored


# Tensors from a file that a stranger wrote: nothing in it is run, and no size is believed

HEADER_BYTES = 100_000_000
"""The largest header that safetensors reads."""
PICKLE_BYTES = 4_000_000
"""Each may become an object of 60; that of an adapter has some 300 for each tensor."""
ENTRIES = 100_000
"""Of a zip archive; an adapter of Phi-3-medium on all parts has 561."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

TENSOR_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double")),
}
"""What the pickle of a dictionary of tensors names. torch's own list is longer, and some on it ask
for any amount of memory."""

PICKLE_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX")
"""Ways of a pickle to name or make things that torch.save does not take."""

AS_SAVED = "Old and foreign pickles are not read: load it where you trust it, save as safetensors."


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
    for name, value in tensors.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not plain or value.device.type != "cpu":
            what = f"{file}: {quoted(name)} is a {type(value).__name__}"
            raise AdapterError(f"{what}, expected a plain tensor.")
        if value.dtype not in FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            raise AdapterError(f"{file}: {quoted(name)} is {value.dtype}, expected {kinds}.")
    if not tensors:
        raise AdapterError(f"{file} holds no tensors.")
    # A tensor may repeat what little is stored; written out here it must not be more than that.
    if (total := sum(value.nbytes for value in tensors.values())) > file.stat().st_size:
        raise AdapterError(
            f"{file} ({file.stat().st_size} bytes) holds tensors that repeat their numbers up to "
            f"{total} bytes, or share them. Save each with .clone()."
        )
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}, metadata


def _from_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the header first: the library takes the last of two tensors with one name."""
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
        header = strict_json(text, unique=True)
    except ValueError as error:
        raise AdapterError(f"{file}: its header is broken: {error}. Copy it again.") from error
    # MLX writes null where there is none
    metadata = (header.pop("__metadata__", None) or {}) if isinstance(header, dict) else None
    if metadata is None or not all(isinstance(h, dict) for h in (metadata, *header.values())):
        raise AdapterError(f"{file}: its header is no table of tensors. Copy it again.")
    for name, about in header.items():
        if (kind := about.get("dtype")) not in ("F32", "BF16", "F16"):
            what = f"{file}: {quoted(name)} is {quoted(kind)}"
            raise AdapterError(f"{what}, expected one of F32, BF16, F16.")
    try:
        return load_file(file), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or cut short: {error}. Copy it again.") from error


def _from_zip(file: Path) -> dict[str, Tensor]:
    """Read what torch.save wrote, after looking at all sizes and through the pickle."""
    pickled, names = _pickle_of(file), set[str]()
    try:
        for code, argument, _ in pickletools.genops(io.BytesIO(pickled)):
            if code.name in PICKLE_CALLS:
                names.add(f"{code.name} {argument or ''}".strip())
            elif code.name == "GLOBAL":
                names.add(str(argument))
    except (ValueError, IndexError, OverflowError, UnicodeError) as error:
        raise AdapterError(f"{file}: its pickle is broken: {error}. {AS_SAVED}") from error
    if foreign := sorted(names - TENSOR_GLOBALS):
        raise AdapterError(
            f"{file} asks for {', '.join(quoted(name) for name in foreign[:5])}, which tensors do "
            "not need. Nothing in it was run. If you trust it, save its tensors as safetensors."
        )
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


def _pickle_of(file: Path) -> bytes:
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            packed = any(e.compress_type or e.file_size != e.compress_size for e in entries)
            if packed or unpacked > size or len(entries) > ENTRIES:
                raise AdapterError(
                    f"{file} ({size} bytes) unpacks to {unpacked} bytes in {len(entries)} "
                    "entries. torch.save does not compress: it was made to fill the memory, or by "
                    "another program."
                )
            pickles = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
                raise AdapterError(f"{file} has no data.pkl of a sensible size. {AS_SAVED}")
            return archive.read(pickles[0])
    except AdapterError:
        raise
    # RuntimeError is for entries marked as encrypted, OverflowError for offsets beyond any file
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        OverflowError,
    ) as error:
        raise AdapterError(
            f"{file} is not an archive of torch.save: {error}. {AS_SAVED}"
        ) from error


def quoted(name: object) -> str:
    """Return a name as it can be printed: one line, not too long."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


# Tensors and plain values in a file of torch.save: what a run goes on from.


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: The disk is full; torch alone hides that behind a RuntimeError.
    """
    try:
        with file.open("wb") as stream:
            torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def read_state(file: Path, advice: str = "") -> dict[str, Any]:
    """Read tensors and plain values; nothing in the file is run.

    Args:
        file: What ``torch.save`` wrote.
        advice: Ends the message of an error.

    Raises:
        CheckpointError: The file is damaged, or holds more than tensors and plain values.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises every kind, for the many ways to be broken
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} cannot be read: {problem}.{advice}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, no state.{advice}")
    return state
