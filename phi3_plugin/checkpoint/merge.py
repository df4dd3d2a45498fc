"""An adapter put into the weights it was trained on, as a checkpoint folder of its own."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchtune.training import set_default_dtype

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.base import (
    INNER,
    SHARD_BYTES,
    Entry,
    fused_name,
    open_weights,
    part_rows,
    to_hf,
    write_shards,
)
from phi3_plugin.checkpoint.files import StoredTensor, check_output, whole_folder
from phi3_plugin.checkpoint.peft import base_name, copy_tokenizer, table, targets_of
from phi3_plugin.config import GENERATION, Phi3Config, generation_config, read_config, read_json
from phi3_plugin.errors import AdapterError, ConfigError
from phi3_plugin.models.nf4 import nf4_zeros, rows_of

# Where in the base model's weights a module of an adapter acts.

EMBEDDING = "tok_embeddings"

# Shapes: R rank, n rows of the weight that the module is for, in its columns


@dataclass(frozen=True)
class Change:
    """What a module adds to some rows of a weight: ``scale B A``; DoRA then sets their norms.

    DoRA's norms are those of the rows by which a layer multiplies. An embedding has them as its
    columns: their norms are over the whole vocabulary, and only who sees all of it can set them.
    """

    module: str
    a: Tensor
    """``[R, in]``, fp32."""
    b: Tensor
    """``[n, R]``, fp32."""
    scale: float
    rows: slice | None = None
    """The rows, or None for all."""
    magnitude: Tensor | None = None
    """``[n]``, the norms that DoRA gives the rows; of an embedding ``[in]``, for its columns."""

    @property
    def by_column(self) -> bool:
        """Whether the magnitude is of the columns, and so is left to the caller."""
        return self.module == EMBEDDING and self.magnitude is not None

    @property
    def start(self) -> int:
        """The first row."""
        return self.rows.start if self.rows else 0

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + len(self.b)

    def apply(self, piece: Tensor, start: int) -> None:
        """Change rows of the weight in place.

        Args:
            piece: ``[rows, in]``, fp32.
            start: Which row of the weight its first is.

        Source: Hu et al. 2021, LoRA, section 4.1; Liu et al. 2024, DoRA, equation 5.
        """
        first, last = max(start, self.start), min(start + len(piece), self.stop)
        if first >= last:
            return
        rows, own = (
            piece[first - start : last - start],
            slice(first - self.start, last - self.start),
        )
        rows.addmm_(self.b[own], self.a, alpha=self.scale)
        if self.magnitude is not None and not self.by_column:
            rows *= self.factors(rows.norm(dim=1), own)[:, None]

    def factors(self, norms: Tensor, own: slice = slice(None)) -> Tensor:
        """Return what DoRA multiplies rows by, or the columns of an embedding.

        Args:
            norms: That they have by now.
            own: Which of its rows they are.

        Raises:
            AdapterError: One is zero, and stays so by whatever it is multiplied.
        """
        if self.magnitude is None:
            return torch.ones_like(norms)
        if not norms.all():
            raise AdapterError(
                f"{self.module}: DoRA divides by the norm of weights that are all zero in this "
                "base, so every answer would be NaN. Use the adapter's own base."
            )
        return self.magnitude[own] / norms


def changes_of(adapter: Adapter, config: Phi3Config) -> dict[str, list[Change]]:
    """Return the changes that an adapter makes, by our name of the weight.

    Raises:
        AdapterError: A module has no B or no scale.
    """
    changes: dict[str, list[Change]] = {}
    for module in adapter.ranks:
        whole, rows = place_of(module, config)
        changes.setdefault(f"{whole}.weight", []).append(_change(adapter, module, rows))
    return changes


def place_of(module: str, config: Phi3Config) -> tuple[str, slice | None]:
    """Return the module whose weight a module of an adapter changes, and which rows if not all.

    Args:
        module: Our name, of a part too: ``layers.3.attn.qkv_proj.v_proj``; or the split model's.
        config: Sizes of the model.
    """
    fused = fused_name(module)
    if fused == module:
        return module, None
    inner = _inner(module)
    return fused, part_rows(_inner(fused), config)[INNER.get(inner, inner)]


def _inner(module: str) -> str:
    """Return ``attn.qkv_proj`` of ``layers.3.attn.qkv_proj``."""
    return module.split(".", 2)[2]


def check_shapes(
    changes: Mapping[str, list[Change]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that every change has its place in the base.

    Args:
        changes: By our name of the weight.
        shapes: Of the base's weights.

    Raises:
        AdapterError: A layer is not there or of another shape; all are listed.
    """
    wrong = [
        f"  {change.module}: {problem}"
        for name, found in changes.items()
        for change in found
        if (problem := _misfit(change, shapes.get(name)))
    ]
    if wrong:
        listed = "\n".join(wrong)
        raise AdapterError(
            f"The adapter is not for this base:\n{listed}\n"
            "Merge it into the checkpoint it was trained on."
        )


def _change(adapter: Adapter, module: str, rows: slice | None) -> Change:
    if module + B not in adapter.tensors or module not in adapter.scales:
        raise AdapterError(f"{module}: the adapter has no {B[1:]} or no scale for it.")
    a, b = adapter.tensors[module + A].float(), adapter.tensors[module + B].float()
    if module == EMBEDDING:  # its rows are the inputs: (B A)^T = A^T B^T
        a, b = b.T, a.T
    magnitude = adapter.tensors.get(module + MAGNITUDE)
    norms = None if magnitude is None else magnitude.float()
    return Change(module, a, b, adapter.scales[module], rows, norms)


def _misfit(change: Change, shape: tuple[int, ...] | None) -> str:
    ours, norms = [len(change.b), change.a.shape[1]], change.magnitude
    if shape is None:
        return f"it is for a layer of {ours}, which in this base is not there"
    if change.a.shape[0] != change.b.shape[1]:
        return f"A has rank {change.a.shape[0]} and B {change.b.shape[1]}"
    if norms is not None and norms.shape != (ours[int(change.by_column)],):
        return f"it has {norms.numel()} magnitudes for a layer of {ours}"
    part = change.rows.stop - change.rows.start if change.rows else shape[0]
    if ours != [part, *shape[1:]]:
        return f"it is for a layer of {ours}, which in this base is {[part, *shape[1:]]}"
    numbers = (change.a, change.b, *(() if norms is None else (norms,)))
    finite = all(torch.isfinite(t).all() for t in numbers)
    return "" if finite else "it holds NaN or infinite numbers"


# What lies beside merged weights: tokenizer, settings, and the README.md that says what it is.

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags:
- phi3
- torchtune
---

# {base} with {kind} merged into it

{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(MODEL)  # MODEL: this folder or its repository
tokenizer = AutoTokenizer.from_pretrained(MODEL)
```

The prompt must follow the chat template of the tokenizer, as
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` does.
Generation must stop at the ids in generation_config.json. The license is that of the base model.
"""


def write_settings(folder: Path, checkpoint_dir: Path, dtype: str, *, untied: bool) -> None:
    """Copy the tokenizer, and write the settings of a model that was changed.

    Args:
        folder: Of the merged weights.
        checkpoint_dir: Of the base model.
        dtype: Of the weights, as config.json names it.
        untied: Whether a tied head got weights of its own.
    """
    copy_tokenizer(checkpoint_dir, folder)
    keys = read_json(checkpoint_dir / "config.json")
    keys.pop("auto_map", None)  # names code files that are not in this folder, nor needed
    keys["dtype" if "dtype" in keys else "torch_dtype"] = dtype
    if untied:
        keys["tie_word_embeddings"] = False
    _write(folder / "config.json", keys)
    _write(folder / GENERATION, generation_config(checkpoint_dir))


def write_card(
    folder: Path, checkpoint_dir: Path, adapter: Adapter, rows: Mapping[str, Any]
) -> None:
    """Write README.md: the base, the adapter, and how they were merged.

    Args:
        folder: Of the merged weights.
        checkpoint_dir: Of the base model.
        adapter: Our names.
        rows: More rows of the table.
    """
    base, kind = base_name(checkpoint_dir), "a DoRA" if adapter.is_dora else "a LoRA"
    ranks = " or ".join(map(str, sorted(set(adapter.ranks.values()))))
    said = {"adapter": f"{kind} of rank {ranks} on {', '.join(targets_of(adapter.tensors))}"}
    if not adapter.ranks:
        kind, said = "trained weights", {}
    if adapter.saved:
        said["trained whole"] = ", ".join(sorted(adapter.saved))
    text = CARD.format(base=base, kind=kind, table=table("merged", {**said, **rows}))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")


# An adapter put into the weights it was trained on, as a checkpoint folder of its own.
#
# Weights are read, changed and written some rows at a time. Sums are in fp32 and rounded once.

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MERGED_INTO = {"original": "the base model", "nf4": "what NF4 makes of the base model"}
EMBEDDING_WEIGHT, HEAD_WEIGHT = "tok_embeddings.weight", "output.weight"
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
        shard_bytes: A shard is closed before it grows beyond this.
        card: Rows of the model card's table beside base, adapter, dtype and ``onto``.

    Raises:
        AdapterError: It adapts what the base does not have, or holds NaN.
        ConfigError: An option is unknown.
        OutputError: ``out`` exists, cannot be written, or has not enough room.
    """
    _check_options(dtype, onto)
    quantizer = in_nf4 if onto == "nf4" else None
    config, base = read_config(checkpoint_dir), open_weights(checkpoint_dir)
    check_output(out, checkpoint_dir)
    changes, saved = changes_of(adapter, config), adapter.saved
    untied = config.tie_word_embeddings and bool(
        {EMBEDDING_WEIGHT, HEAD_WEIGHT} & {*changes, *saved}
    )
    if untied:
        base[HEAD_WEIGHT] = base[EMBEDDING_WEIGHT]
    _check_fit(base, changes, saved)
    wanted, difference = DTYPES.get(dtype or ""), Difference() if quantizer else None
    entries = {
        to_hf(name): _entry(stored, changes.get(name, []), saved.get(name), wanted, nf4, difference)
        for name, stored in base.items()
        for nf4 in [quantizer if _is_linear(name) else None]
    }
    with whole_folder(out) as folder:
        shards = write_shards(folder, entries, shard_bytes)
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


def _check_options(dtype: str | None, onto: str) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype: {dtype!r} is unknown. Use bf16, fp32, or none for the base's.")
    if onto not in ("original", "nf4"):
        raise ConfigError(f"onto: {onto!r} is unknown. Use original or nf4.")


def in_nf4(stored: StoredTensor) -> Tensor:
    """Return what a model over NF4 computes with in the place of a weight."""
    with set_default_dtype(stored.dtype):  # of which NF4 takes what it computes in
        like = nf4_zeros(*stored.shape)
    return rows_of(stored, like, 0, 1, torch.device("cpu")).to(stored.dtype)


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
