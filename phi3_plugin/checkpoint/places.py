"""Where in the base model's weights a module of an adapter acts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.split import INNER, fused_name, part_rows
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

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
