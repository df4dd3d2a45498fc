"""Take apart what a MergedLinear of loralib stacks: see `phi3_plugin.checkpoint.loralib_file`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import A, B
from phi3_plugin.checkpoint.loralib_file import FUSED
from phi3_plugin.checkpoint.modules import layer_of
from phi3_plugin.checkpoint.split import INNER, part_rows
from phi3_plugin.checkpoint.tensor_file import shown
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

EnableLora = Sequence[bool] | Mapping[str, Sequence[bool]]
"""Of qkv_proj, or by the last word of a module's name."""

# Shapes: R rank of a group, n rows of a group, E groups with an adapter


def ungrouped(
    tensors: Mapping[str, Tensor], enable_lora: EnableLora | None, config: Phi3Config
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return adapters on parts in the place of stacked ones.

    Args:
        tensors: Our names; of a MergedLinear ``lora_a [E R, in]`` and ``lora_b [E n, R]``.
        enable_lora: Which groups have an adapter; modules it does not name are Linear.
        config: Sizes of the model.

    Returns:
        The tensors, and by module the R that alpha is divided by.

    Raises:
        AdapterError: Tensors and ``enable_lora`` do not fit.
    """
    enabled = _by_module(enable_lora)
    out, ranks = dict(tensors), dict[str, int]()
    for module in [name.removesuffix(A) for name in tensors if name.endswith(A)]:
        inner = layer_of(module)[1]
        if inner not in enabled or module + B not in tensors:
            _refuse_stacked(module, tensors, inner in FUSED.values())
            ranks[module] = tensors[module + A].shape[0]
            continue
        a, b = out.pop(module + A), out.pop(module + B)
        rank = _check(module, a, b, enabled[inner], sum(_sizes(inner, config).values()))
        for part, value in _parts(inner, a, b, enabled[inner], config).items():
            name = f"{module}.{part.rpartition('.')[2]}"
            out[name + A], out[name + B] = value
            ranks[name] = rank
    return out, ranks


def _by_module(enable_lora: EnableLora | None) -> dict[str, list[bool]]:
    if enable_lora is None:
        return {}
    named = enable_lora if isinstance(enable_lora, Mapping) else {"qkv_proj": enable_lora}
    out = {}
    for name, groups in named.items():
        flags = isinstance(groups, list | tuple) and all(isinstance(on, bool) for on in groups)
        if name not in FUSED or not flags:
            raise AdapterError(
                f"enable_lora: {shown(name)}: {shown(groups)} is not used. Give true or false "
                f"for each group of {' or '.join(FUSED)}."
            )
        if groups:
            out[FUSED[name]] = list(groups)
    return out


def _refuse_stacked(module: str, tensors: Mapping[str, Tensor], fused: bool) -> None:
    a, b = tensors[module + A], tensors.get(module + B)
    if fused and b is not None and a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{module}: A is {list(a.shape)} and B {list(b.shape)}, as a MergedLinear of loralib "
            "has them. Give the enable_lora that it was built with."
        )


def _check(module: str, a: Tensor, b: Tensor, enabled: list[bool], rows: int) -> int:
    """Return R."""
    count, groups = sum(enabled), len(enabled)
    fits = a.ndim == b.ndim == 2 and count and not rows % groups
    rank = b.shape[1] if fits else 0
    if not rank or (a.shape[0], b.shape[0]) != (rank * count, rows // groups * count):
        raise AdapterError(
            f"{module}: A {list(a.shape)} and B {list(b.shape)} are not those of {count} of "
            f"{groups} groups of {rows} rows. Give the enable_lora that it was built with."
        )
    return rank


def _parts(
    inner: str, a: Tensor, b: Tensor, enabled: list[bool], config: Phi3Config
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every part that has groups with an adapter."""
    sizes = _sizes(inner, config)
    height = sum(sizes.values()) // len(enabled)
    stacked_a, stacked_b = iter(a.chunk(sum(enabled))), iter(b.chunk(sum(enabled)))
    flags, out = iter(enabled), {}
    for part, rows in sizes.items():
        if rows % height:
            raise AdapterError(
                f"enable_lora: {len(enabled)} groups of {inner} hold {height} rows each, but "
                f"{part} has {rows}. Such an adapter mixes parts: merge it with loralib itself."
            )
        on = [next(flags) for _ in range(rows // height)]
        pieces = [(next(stacked_a), next(stacked_b)) if flag else None for flag in on]
        if any(on):
            out[part] = _joined(pieces, height)
    return out


def _joined(pieces: list[tuple[Tensor, Tensor] | None], height: int) -> tuple[Tensor, Tensor]:
    """Return one A and one B of the groups of a part, of rank R if they share their A."""
    present = [piece for piece in pieces if piece is not None]
    first, like = present[0]
    if all(torch.equal(a, first) for a, _ in present):
        none = like.new_zeros(height, like.shape[1])
        return first, torch.cat([none if piece is None else piece[1] for piece in pieces])
    empty = like.new_zeros(height, 0)
    columns = [empty if piece is None else piece[1] for piece in pieces]
    return torch.cat([a for a, _ in present]), torch.block_diag(*columns)


def _sizes(inner: str, config: Phi3Config) -> dict[str, int]:
    """Return the rows of each part of a fused module, in order."""
    rows = part_rows(inner, config)
    parts = [part for part in INNER if part.startswith(f"{inner}.")]
    return {part: rows[INNER[part]].stop - rows[INNER[part]].start for part in parts}
