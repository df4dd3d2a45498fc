"""Adapters of loralib (microsoft/LoRA): ``<module>.lora_A`` and ``.lora_B``, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    A,
    Adapter,
    B,
    alpha_of,
    check_servable,
    level,
    own_scales,
    pad,
    served,
)
from phi3_plugin.checkpoint.base import INNER, PARTS, fused_name, hf_name, layer_of, part_rows
from phi3_plugin.checkpoint.files import shown, whole_files, write_state
from phi3_plugin.checkpoint.peft import ORIGIN
from phi3_plugin.checkpoint.torchtune import cut
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

# Adapters of loralib (microsoft/LoRA): ``<module>.lora_A`` and ``.lora_B``, and nothing else.
#
# A MergedLinear cuts the rows of its layer into equal groups, of which ``enable_lora`` says which
# have an adapter. With grouped queries there are more groups than parts, here two for q::
#
#     enable_lora [True, True, False, True]     lora_A = [A_0]    lora_B = [B_0]   each r columns
#                   q     q     k      v                 [A_1]             [B_1]
#                                                        [A_3]             [B_3]
#
# Source: loralib 0.1.2, layers.py.

FUSED = {"qkv_proj": "attn.qkv_proj", "gate_up_proj": "mlp.gate_up_proj"}
"""What a MergedLinear can be, by the last word of its name."""

# Shapes: R rank, E groups with an adapter


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
    held, alphas, enabled, note = loralib_tensors(adapter, config, merged_linear=merged_linear)
    tensors = {_theirs(name): value.contiguous() for name, value in held.items()}
    same = set(alphas.values())
    alpha: Any = same.pop() if len(same) == 1 else {hf_name(m): a for m, a in alphas.items()}
    about = {"alpha": alpha, "enable_lora": enabled, "merged_linear": merged_linear, ORIGIN: note}
    if file.suffix == ".safetensors":
        with whole_files(file) as (partial,):
            save_file(tensors, partial, metadata={"format": "pt", ORIGIN: json.dumps(about)})
            partial.chmod(0o644)
        return
    with whole_files(file.with_suffix(".json"), file) as (beside, partial):
        beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        write_state(partial, tensors)


def loralib_tensors(
    adapter: Adapter, config: Phi3Config, *, merged_linear: bool
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[bool]], dict[str, Any]]:
    """Return what a file of loralib's holds under our names, and what must be said beside it.

    Returns:
        Tensors, alphas, enable_lora of the fused layers, and a note of the original.

    Raises:
        AdapterError: loralib has no such adapter.
    """
    check_servable(adapter)
    if adapter.is_dora:
        raise AdapterError("loralib has no DoRA. Merge the adapter, or convert it to PEFT.")
    if adapter.saved:
        raise AdapterError(
            f"{', '.join(adapter.saved)}: loralib's files hold no weights that are trained whole. "
            "Merge the adapter, or convert it to PEFT."
        )
    if not merged_linear:
        whole = served(adapter, config, lambda _: torch.empty(0), patterns=True)
        return dict(whole.tensors), dict(whole.alphas), {}, dict(whole.note)
    scales = own_scales(adapter)
    leveled, note = level(adapter, scales)
    ranks = dict.fromkeys(scales, 0)
    for module, rank in adapter.ranks.items():
        ranks[fused_name(module)] = max(rank, ranks[fused_name(module)])
    tensors = {
        name: pad({name: value}, ranks[fused_name(_module(name))])[name]
        for name, value in leveled.items()
    }
    out, enabled = _grouped(cut(tensors, config), config)
    return out, {m: alpha_of(s, ranks[m]) for m, s in scales.items()}, enabled, note


def _grouped(
    tensors: dict[str, Tensor], config: Phi3Config
) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """Stack parts as a MergedLinear does; a part of several groups repeats its A."""
    out = {n: v for n, v in tensors.items() if fused_name(_module(n)) == _module(n)}
    present = [_module(name) for name in tensors if name.endswith(A) and name not in out]
    used = {layer_of(module)[1] for module in present}
    for whole in dict.fromkeys(map(fused_name, present)):
        _, inner = layer_of(whole)
        like = next(tensors[m + A] for m in present if fused_name(m) == whole)
        stacked = []
        for part, groups in groups_of(inner, config).items():
            if part in used:
                name, count = f"{whole}.{part.rpartition('.')[2]}", len(groups)
                rows = part_rows(inner, config)[INNER[part]]
                a = tensors.get(name + A, torch.zeros_like(like))
                b = tensors.get(name + B, like.new_zeros(rows.stop - rows.start, len(like)))
                stacked.append((a.repeat(count, 1), b))
        out[whole + A] = torch.cat([a for a, _ in stacked])
        out[whole + B] = torch.cat([b for _, b in stacked])
    fused = {inner for inner in FUSED.values() if any(p.startswith(f"{inner}.") for p in used)}
    return out, {
        inner.rpartition(".")[2]: [
            part in used for part, groups in groups_of(inner, config).items() for _ in groups
        ]
        for inner in sorted(fused)
    }


def groups_of(fused: str, config: Phi3Config) -> dict[str, range]:
    """Return the equal groups of rows that each part consists of."""
    rows = part_rows(fused, config)
    size = gcd(*(r.stop - r.start for r in rows.values()))
    return {
        part: range(rows[INNER[part]].start // size, rows[INNER[part]].stop // size)
        for part in INNER
        if INNER[part] in PARTS[fused] and part.startswith(f"{fused}.")
    }


def _module(name: str) -> str:
    return name.removesuffix(A).removesuffix(B)


def _theirs(name: str) -> str:
    return f"{hf_name(_module(name))}.lora_{'A' if name.endswith(A) else 'B'}"


# Take apart what a MergedLinear of loralib stacks: see `phi3_plugin.checkpoint.loralib`.

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
