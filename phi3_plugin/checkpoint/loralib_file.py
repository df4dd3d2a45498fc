"""Adapters of loralib (microsoft/LoRA): ``<module>.lora_A`` and ``.lora_B``, and nothing else.

A MergedLinear cuts the rows of its layer into equal groups, of which ``enable_lora`` says which
have an adapter. With grouped queries there are more groups than parts, here two for q::

    enable_lora [True, True, False, True]     lora_A = [A_0]    lora_B = [B_0]   each r columns
                  q     q     k      v                 [A_1]             [B_1]
                                                       [A_3]             [B_3]

Source: loralib 0.1.2, layers.py.
"""

import json
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from phi3_plugin.checkpoint.adapter import A, Adapter, B
from phi3_plugin.checkpoint.modules import hf_name, layer_of
from phi3_plugin.checkpoint.peft import ORIGIN
from phi3_plugin.checkpoint.resume import write_state
from phi3_plugin.checkpoint.served import alpha_of, check_servable, level, own_scales, served
from phi3_plugin.checkpoint.split import INNER, PARTS, fused_name, part_rows
from phi3_plugin.checkpoint.torchtune_file import cut
from phi3_plugin.checkpoint.uniform import pad
from phi3_plugin.checkpoint.whole_file import whole_files
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

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
