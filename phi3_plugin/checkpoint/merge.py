"""An adapter put into the weights it was trained on, as a checkpoint folder of its own.

Weights are read, changed and written some rows at a time. Sums are in fp32 and rounded once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.folder import check_output, whole_folder
from phi3_plugin.checkpoint.hf import open_weights
from phi3_plugin.checkpoint.merged_folder import write_card, write_settings
from phi3_plugin.checkpoint.names import to_hf
from phi3_plugin.checkpoint.places import Change, changes_of, check_shapes
from phi3_plugin.checkpoint.stored import StoredTensor
from phi3_plugin.checkpoint.stream import SHARD_BYTES, Entry, write_shards
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MERGED_INTO = {"original": "the base model", "nf4": "what NF4 makes of the base model"}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
PIECE = 1 << 18
"""Weights that are changed at a time, about: what the processor's cache holds."""


class Rows(Protocol):
    """A tensor ``[out, in]``, or what reads rows of one when it is sliced."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return consecutive rows."""


Quantizer = Callable[[StoredTensor], Rows]
"""Gives what an NF4 base computes with in place of a stored weight."""


@dataclass
class Difference:
    """How far apart two merged models are, over the weights of the layers that NF4 holds."""

    largest: float = 0.0
    """The largest distance of two weights, as a part of the largest weight there is."""
    mean: float = 0.0
    """The mean distance, as a part of the mean absolute weight."""
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0], repr=False)

    def add(self, one: Tensor, other: Tensor) -> None:
        """Count some weights, the first of which are those to compare with."""
        apart, size = (other - one).abs(), one.abs()
        far, top, total, whole = self._sums
        far, top = max(far, apart.max().item()), max(top, size.max().item())
        total, whole = total + apart.sum().item(), whole + size.sum().item()
        self._sums = [far, top, total, whole]
        self.largest, self.mean = far / (top or 1.0), total / (whole or 1.0)


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    folder: Path
    shards: int
    tensors: int
    changed: tuple[str, ...]
    """The weights that the adapter changes, our names."""
    dtype: str
    """Of the weights, as config.json names it."""
    untied: bool
    """Whether a tied head got weights of its own: the adapter changes it or the embedding."""
    difference: Difference | None
    """From the same adapter merged onto the original base, if it was merged onto NF4's."""


@contextmanager
def _one_thread() -> Iterator[None]:
    # Pieces are too small to share: several threads would mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def merge_into(
    out: Path,
    checkpoint_dir: Path,
    adapter: Adapter,
    *,
    dtype: Literal["bf16", "fp32"] | None = None,
    onto: Literal["original", "nf4"] = "original",
    quantizer: Quantizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Write a model that computes what base and adapter compute, as a checkpoint folder.

    Args:
        out: The folder to create.
        checkpoint_dir: The base that the adapter was trained on.
        adapter: Our names.
        dtype: Of all weights; None is each one's own in the base.
        onto: ``nf4`` for an adapter that is to stay on the quantized base of its training.
        quantizer: With ``nf4``, that base's weight for a stored one.
        shard_bytes: A shard is closed before it grows beyond this.
        card: Rows of the model card's table beside base, adapter, dtype and ``onto``.

    Raises:
        AdapterError: It adapts what the base does not have, or holds NaN.
        ConfigError: An option is unknown.
        OutputError: ``out`` exists, cannot be written, or has not enough room.
    """
    quantizer = _checked(dtype, onto, quantizer)
    config, base = read_config(checkpoint_dir), open_weights(checkpoint_dir)
    check_output(out, checkpoint_dir)
    changes, saved = changes_of(adapter, config), adapter.saved
    untied = config.tie_word_embeddings and bool({EMBEDDING, HEAD} & {*changes, *saved})
    if untied:
        base[HEAD] = base[EMBEDDING]
    _check_fit(base, changes, saved)
    wanted, difference = DTYPES.get(dtype or ""), Difference() if quantizer else None
    entries = {
        to_hf(name): _entry(stored, changes.get(name, []), saved.get(name), wanted, nf4, difference)
        for name, stored in base.items()
        for nf4 in [quantizer if _is_linear(name) else None]
    }
    with whole_folder(out) as folder:
        shards = write_shards(folder, entries, shard_bytes)
        if difference and not difference.largest:
            raise ConfigError("onto: the quantizer gives the base's own weights, not those of NF4.")
        write_settings(folder, checkpoint_dir, name := _main_dtype(entries), untied=untied)
        rows = {**(card or {}), "weights": name, "merged into": MERGED_INTO[onto]}
        write_card(folder, checkpoint_dir, adapter, rows)
    changed = tuple(sorted({*changes, *saved}))
    return MergeReport(out, len(shards), len(entries), changed, name, untied, difference)


def merged(weight: Rows, height: int, width: int, changes: Sequence[Change]) -> Iterator[Tensor]:
    """Yield the rows of a changed weight in order, some at a time, fp32.

    Args:
        weight: ``[height, width]``.
        height: Number of rows.
        width: Of a row.
        changes: What is done to it.
    """
    pieces = partial(_changed, weight, height, width, changes)
    by_column = next((change for change in changes if change.by_column), None)
    if by_column:
        squares = sum((p.double().square().sum(dim=0) for p in pieces()), torch.zeros(width))
        factor = by_column.factors(squares.sqrt()).float()
        yield from (piece.mul_(factor) for piece in pieces())
    else:
        yield from pieces()


def _changed(weight: Rows, height: int, width: int, changes: Sequence[Change]) -> Iterator[Tensor]:
    step = max(PIECE // width, 1)
    for start in range(0, height, step):
        piece = weight[start : start + step].to(torch.float32, copy=True)
        for change in changes:
            change.apply(piece, start)
        yield piece


def _entry(
    stored: StoredTensor,
    changes: Sequence[Change],
    saved: Tensor | None,
    dtype: torch.dtype | None,
    quantizer: Quantizer | None,
    difference: Difference | None,
) -> Entry:
    dtype, shape = dtype or stored.dtype, stored.shape
    make = partial(merged, height=shape[0], width=shape[-1], changes=changes)
    source: StoredTensor | Tensor = stored if saved is None else saved

    def pieces() -> Iterator[Tensor]:
        if quantizer and difference and saved is None:
            for one, other in zip(make(stored), make(quantizer(stored)), strict=True):
                difference.add(one, other)
                yield other.to(dtype)
        elif changes:
            yield from (piece.to(dtype) for piece in make(source))
        else:
            step = max(PIECE // shape[-1], 1)
            yield from (source[i : i + step].to(dtype) for i in range(0, shape[0], step))

    return Entry(dtype, shape, pieces)


def _checked(dtype: str | None, onto: str, quantizer: Quantizer | None) -> Quantizer | None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype: {dtype!r} is unknown. Use bf16, fp32, or none for the base's.")
    if onto not in ("original", "nf4"):
        raise ConfigError(f"onto: {onto!r} is unknown. Use original or nf4.")
    if onto == "nf4" and quantizer is None:
        raise ConfigError("onto: nf4 needs a quantizer, which gives the base's NF4 weights.")
    return quantizer if onto == "nf4" else None


def _check_fit(
    base: Mapping[str, StoredTensor],
    changes: Mapping[str, list[Change]],
    saved: Mapping[str, Tensor],
) -> None:
    if not changes and not saved:
        raise AdapterError("The adapter is empty: there is nothing to merge.")
    shapes = {name: stored.shape for name, stored in base.items()}
    check_shapes(changes, shapes)
    for name, value in saved.items():
        if tuple(value.shape) != shapes.get(name):
            raise AdapterError(
                f"{name}: the adapter has it as {list(value.shape)}, the base as "
                f"{list(shapes.get(name, ())) or 'nothing'}. Merge it into the checkpoint it was "
                "trained on; a vocabulary of another size has to be in the base."
            )
        if not torch.isfinite(value).all():
            raise AdapterError(f"{name}: the adapter holds NaN or infinite numbers.")


def _is_linear(name: str) -> bool:
    """Whether a layer is one of those that a quantized base holds in NF4: all but the head."""
    return name.startswith("layers.") and "_proj." in name


def _main_dtype(entries: Mapping[str, Entry]) -> str:
    largest = max(entries.values(), key=lambda entry: entry.nbytes)
    return str(largest.dtype).removeprefix("torch.")
