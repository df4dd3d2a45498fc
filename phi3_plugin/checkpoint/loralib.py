"""Adapters of loralib (microsoft/LoRA): ``<module>.lora_A`` and ``.lora_B``, and nothing else.

A MergedLinear cuts the rows of its layer into equal groups, of which ``enable_lora`` says which
have an adapter. With grouped queries there are more groups than parts, here two for q::

    enable_lora [True, True, False, True]     lora_A = [A_0]    lora_B = [B_0]   each r columns
                  q     q     k      v                 [A_1]             [B_1]
                                                       [A_3]             [B_3]

Source: loralib 0.1.2, layers.py.
"""

import json
from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    Adapter,
    FileContent,
    alpha_of,
    check_writable_adapter,
    fused_scales,
    level_scales,
    pad,
    pattern_content,
    split_ending,
    unfuse,
)
from phi3_plugin.checkpoint.base import A, B, fused_name, hf_name, layer_of, part_rows
from phi3_plugin.checkpoint.files import quoted, save_tensors, whole_files, write_state
from phi3_plugin.checkpoint.peft import NOTE
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

EnableLora = Sequence[bool] | Mapping[str, Sequence[bool]]
"""Which groups have an adapter: of qkv_proj, or by the last word of a module's name."""

MERGED = {"qkv_proj": "attn.qkv_proj", "gate_up_proj": "mlp.gate_up_proj"}
"""What a MergedLinear can be, by the last word of its name."""

# Shapes: R rank of a group, n rows of a group, E groups with an adapter


def write_loralib(file: Path, adapter: Adapter, config: Phi3Config, *, merged_linear: bool) -> None:
    """Write what ``load_state_dict(strict=False)`` of a loralib-built Phi-3 takes.

    Alpha, which the layers must be built with, and enable_lora are in the metadata of a
    .safetensors file, and in a .json beside a .pt file.

    Args:
        file: Must not exist.
        adapter: What to write.
        config: Of the base model.
        merged_linear: Whether qkv_proj and gate_up_proj are MergedLinear, otherwise Linear.

    Raises:
        AdapterError: loralib has no such adapter.
        OutputError: The file exists or cannot be written.
    """
    content, enabled = loralib_content(adapter, config, merged_linear=merged_linear)
    tensors = {}
    for name, value in content.tensors.items():
        module, ending = split_ending(name)
        tensors[f"{hf_name(module)}.lora_{'A' if ending == A else 'B'}"] = value.contiguous()
    alpha: Any = {hf_name(module): value for module, value in content.alphas.items()}
    if len(set(alpha.values())) == 1:
        alpha = next(iter(alpha.values()))
    about = {
        "alpha": alpha,
        "enable_lora": enabled,
        "merged_linear": merged_linear,
        NOTE: content.note,
    }
    if file.suffix == ".safetensors":
        with whole_files(file) as (partial,):
            save_tensors(partial, tensors, {NOTE: json.dumps(about)})
        return
    with whole_files(file.with_suffix(".json"), file) as (beside, partial):
        beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        write_state(partial, tensors)


def loralib_content(
    adapter: Adapter, config: Phi3Config, *, merged_linear: bool
) -> tuple[FileContent, dict[str, list[bool]]]:
    """Return what a file of loralib's holds under our names, and enable_lora of fused layers.

    Raises:
        AdapterError: loralib has no such adapter.
    """
    check_writable_adapter(adapter)
    if adapter.is_dora:
        raise AdapterError("loralib has no DoRA. Merge the adapter, or convert it to PEFT.")
    if whole := {**adapter.saved, **adapter.rows}:
        raise AdapterError(
            f"{', '.join(whole)}: loralib's files hold no weights or rows that are trained whole. "
            "Merge the adapter, or convert it to PEFT."
        )
    if not merged_linear:
        return pattern_content(adapter, config, lambda _: torch.empty(0)), {}
    scales = fused_scales(adapter)
    leveled, note = level_scales(adapter, scales)
    ranks = dict.fromkeys(scales, 0)
    for module, rank in adapter.ranks.items():
        ranks[fused_name(module)] = max(rank, ranks[fused_name(module)])
    tensors = dict[str, Tensor]()
    for name, value in leveled.items():
        tensors |= pad({name: value}, ranks[fused_name(split_ending(name)[0])])
    stacked, enabled = _stacked(unfuse(tensors, config), config)
    alphas = {module: alpha_of(scale, ranks[module]) for module, scale in scales.items()}
    return FileContent(stacked, ranks, alphas, note), enabled


def _stacked(
    tensors: dict[str, Tensor], config: Phi3Config
) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """Stack parts as a MergedLinear does; a part of several groups repeats its A."""
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    parts = [module for module in modules if fused_name(module) != module]
    out = {m + end: tensors[m + end] for m in modules if m not in parts for end in (A, B)}
    used = {layer_of(part)[1] for part in parts}  # enable_lora is the same in every layer
    enabled = dict[str, list[bool]]()
    for whole in dict.fromkeys(map(fused_name, parts)):
        rows = part_rows(whole, config)
        heights = {part: r.stop - r.start for part, r in rows.items()}
        group = gcd(*heights.values())
        like = next(tensors[part + A] for part in rows if part in parts)
        a, b, flags = list[Tensor](), list[Tensor](), list[bool]()
        for part, height in heights.items():
            is_used = layer_of(part)[1] in used
            flags += [is_used] * (height // group)
            if is_used:
                empty = like.new_zeros(height, len(like))
                own = tensors.get(part + A, torch.zeros_like(like))
                a.append(own.repeat(height // group, 1))
                b.append(tensors.get(part + B, empty))
        out[whole + A] = torch.cat(a)
        out[whole + B] = torch.cat(b)
        enabled[whole.rpartition(".")[2]] = flags
    return out, enabled


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
        inner, a, b = layer_of(module)[1], tensors[module + A], tensors.get(module + B)
        if inner not in enabled or b is None:
            two = b is not None and a.ndim == b.ndim == 2
            if inner in MERGED.values() and b is not None and two and len(a) != b.shape[1]:
                raise AdapterError(
                    f"{module}: A is {list(a.shape)} and B {list(b.shape)}, as a MergedLinear of "
                    "loralib has them. Give the enable_lora that it was built with."
                )
            ranks[module] = a.shape[0]
            continue
        del out[module + A], out[module + B]
        for part, pair in _parts(module, a, b, enabled[inner], config).items():
            out[part + A], out[part + B] = pair
            ranks[part] = b.shape[1]
    return out, ranks


def _by_module(enable_lora: EnableLora | None) -> dict[str, list[bool]]:
    if enable_lora is None:
        return {}
    named = enable_lora if isinstance(enable_lora, Mapping) else {"qkv_proj": enable_lora}
    out = {}
    for name, groups in named.items():
        flags = isinstance(groups, list | tuple) and all(isinstance(on, bool) for on in groups)
        if name not in MERGED or not flags:
            raise AdapterError(
                f"enable_lora: {quoted(name)}: {quoted(groups)} is not used. Give true or false "
                f"for each group of {' or '.join(MERGED)}."
            )
        if groups:
            out[MERGED[name]] = list(groups)
    return out


def _parts(
    module: str, a: Tensor, b: Tensor, enabled: list[bool], config: Phi3Config
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every part that has groups with an adapter."""
    rows = part_rows(module, config)
    height, count, groups = max(r.stop for r in rows.values()), sum(enabled), len(enabled)
    fits = a.ndim == b.ndim == 2 and count and b.shape[1] and not height % groups
    if not fits or (len(a), len(b)) != (b.shape[1] * count, height // groups * count):
        raise AdapterError(
            f"{module}: A {list(a.shape)} and B {list(b.shape)} are not those of {count} of "
            f"{groups} groups of {height} rows. Give the enable_lora that it was built with."
        )
    size = height // groups
    stacked = iter(zip(a.chunk(count), b.chunk(count), strict=True))
    flags, out = iter(enabled), {}
    for part, r in rows.items():
        if (r.stop - r.start) % size:
            inner, last = layer_of(module)[1], layer_of(part)[1]
            raise AdapterError(
                f"enable_lora: {groups} groups of {inner} hold {size} rows each, but {last} has "
                f"{r.stop - r.start}. Such an adapter mixes parts: merge it with loralib itself."
            )
        on = [next(flags) for _ in range((r.stop - r.start) // size)]
        if any(on):
            out[part] = _joined([next(stacked) if flag else None for flag in on], size)
    return out


def _joined(pieces: list[tuple[Tensor, Tensor] | None], size: int) -> tuple[Tensor, Tensor]:
    """Return one A and one B of the groups of a part, of rank R if they share their A."""
    present = [piece for piece in pieces if piece is not None]
    first, like = present[0]
    if all(torch.equal(a, first) for a, _ in present):
        none = like.new_zeros(size, like.shape[1])
        return first, torch.cat([none if piece is None else piece[1] for piece in pieces])
    empty = like.new_zeros(size, 0)
    columns = [empty if piece is None else piece[1] for piece in pieces]
    return torch.cat([a for a, _ in present]), torch.block_diag(*columns)
