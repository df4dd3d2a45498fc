"""An adapter as a file for other programs holds it: on whole modules, with ranks and alphas."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.split import INNER, fuse_adapter, fused_name, unfuse_adapter
from phi3_plugin.checkpoint.uniform import pad, rescale, restore, whole_alpha
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

# Shapes: R rank of a whole module

MODULES, ROUNDED = "modules", "rounded"
"""What a note says of the original: ``[rank, scale]`` of each module, or ``[rank, scale, factor]``
where B was multiplied; and of such a B, what division does not bring back."""

NOTE_CHARACTERS = 60_000_000
"""A header of safetensors holds 100 MB. Without what was to be noted, B comes back rounded."""

BASE_HASH = "base_hash"
"""What a note says of the weights that the adapter was made for, if that is known."""

PATTERNS = "patterns"
"""What the note of a file with rank and alpha patterns says."""


@dataclass(frozen=True)
class Served:
    """What is written, and a note by which the original comes back bit for bit."""

    tensors: Mapping[str, Tensor]
    """Fused names; ``lora_a [R, in]``, ``lora_b [out, R]``, ``magnitude [out]``."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """Of each module; the scale is alpha / rank."""
    rslora: bool
    """The scale is alpha / sqrt(rank) instead."""
    note: Mapping[str, Any]
    """Plain values for JSON; :func:`original` reads it."""


def served(
    adapter: Adapter,
    config: Phi3Config,
    row_norms: Callable[[str], Tensor],
    *,
    patterns: bool = False,
) -> Served:
    """Make parts whole; and unless patterns are allowed, all ranks and scales one.

    Args:
        adapter: Names of our model or of torchtune's split one.
        config: Sizes of the model.
        row_norms: See :func:`phi3_plugin.checkpoint.split.fuse_adapter`.
        patterns: Whether ranks and alphas may differ from module to module.

    Raises:
        AdapterError: It is empty, or no file can hold it.
    """
    check_servable(adapter)
    ranks: Counter[str] = Counter()
    for module, rank in adapter.ranks.items():
        ranks[fused_name(module)] += rank
    widest, scales = max(ranks.values()), own_scales(adapter)
    if not patterns:
        alpha = whole_alpha(adapter.scales.values(), widest)
        ranks, scales = Counter(dict.fromkeys(ranks, widest)), dict.fromkeys(ranks, alpha / widest)
    leveled, note = level(adapter, scales)
    tensors = fuse_adapter(leveled, config, row_norms)
    root = {m: alpha_of(s, math.sqrt(ranks[m])) for m, s in scales.items()}
    rslora = bool(adapter.origin.get("rslora")) and patterns
    rslora = rslora and all(a / math.sqrt(ranks[m]) == scales[m] for m, a in root.items())
    alphas = root if rslora else {m: alpha_of(s, ranks[m]) for m, s in scales.items()}
    if patterns:
        return Served(tensors, ranks, alphas, rslora, {**note, PATTERNS: True})
    return Served(pad(tensors, widest), ranks, alphas, rslora, note)


def own_scales(adapter: Adapter) -> dict[str, float]:
    """Return one scale for each whole module: that of the part whose name comes first."""
    return {fused_name(m): s for m, s in sorted(adapter.scales.items(), reverse=True)}


def level(
    adapter: Adapter, scales: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give every module, by its B, the scale of the whole module that it belongs to.

    Args:
        adapter: Names of our model or of torchtune's split one.
        scales: Of whole modules.

    Returns:
        The tensors, and the note by which :func:`original` undoes this.
    """
    factors = {m: s / scales[fused_name(m)] for m, s in adapter.scales.items()}
    tensors, rounded = rescale(adapter.tensors, factors)
    if sum(map(len, rounded.values())) > NOTE_CHARACTERS:
        rounded = {}
    made_for = {BASE_HASH: adapter.base_hash} if adapter.base_hash else {}
    note = {**adapter.origin, **made_for, MODULES: _modules(adapter, factors)}
    return tensors, {**note, ROUNDED: rounded} if rounded else note


def original(
    tensors: Mapping[str, Tensor], note: Mapping[str, Any], config: Phi3Config
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors and scales of the adapter that a file was made of, bit for bit.

    Args:
        tensors: Of the file. Modules may be whole where the original had parts, and the other way
            round where a format has no whole ones.
        note: What was noted of the original.
        config: Sizes of the model.

    Raises:
        AdapterError: Note and tensors do not fit.
        CheckpointError: Tensors are missing.
    """
    modules, rounded = note[MODULES], note.get(ROUNDED, {})
    ranks = {module: int(value[0]) for module, value in modules.items()}
    own = {m: r for m, r in ranks.items() if m + A in tensors}
    joined = {m: r for m, r in ranks.items() if m not in own and fused_name(m) == m}
    parts = {m: r for m, r in ranks.items() if m not in own and m not in joined}
    out = {
        **{m + key: v for m, r in own.items() for key, v in _narrowed(tensors, m, r).items()},
        **{m + key: v for m, r in joined.items() for key, v in _joined(tensors, m, r).items()},
        **unfuse_adapter(dict(tensors), parts, config),
    }
    for module, (_, _, *factor) in modules.items():
        if factor:
            out[module + B] = restore(out[module + B], factor[0], rounded.get(module))
    return out, {module: float(value[1]) for module, value in modules.items()}


def _narrowed(tensors: Mapping[str, Tensor], module: str, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a module by how their names end, without what they were padded with."""
    out = {A: tensors[module + A][:rank].clone(), B: tensors[module + B][:, :rank].clone()}
    if module + MAGNITUDE in tensors:
        out[MAGNITUDE] = tensors[module + MAGNITUDE]
    return out


def _joined(tensors: Mapping[str, Tensor], module: str, rank: int) -> dict[str, Tensor]:
    """Return the same of a whole module of which the file has all parts, each with its A."""
    parts = [part for part in INNER if part.startswith(module.split(".", 2)[-1] + ".")]
    names = [f"{module}.{part.rpartition('.')[2]}" for part in parts]
    if not names or any(name + A not in tensors for name in names):
        raise AdapterError(f"The metadata speak of {module}, which is not in the file.")
    pieces = [_narrowed(tensors, name, rank) for name in names]
    out = {A: pieces[0][A], B: torch.cat([piece[B] for piece in pieces])}
    if MAGNITUDE in pieces[0]:
        out[MAGNITUDE] = torch.cat([piece[MAGNITUDE] for piece in pieces])
    return out


def alpha_of(scale: float, divisor: float) -> float:
    """Return the alpha for which alpha / divisor is the scale, as an integer if there is one."""
    whole = round(scale * divisor)
    return whole if whole / divisor == scale else scale * divisor


def check_servable(adapter: Adapter) -> None:
    """Refuse what no adapter file can say.

    Raises:
        AdapterError: No module, a scale that is none, or DoRA on some modules only.
    """
    if not adapter.ranks:
        raise AdapterError("The model has no adapter to save. Use a LoRA model builder.")
    if wrong := [m for m in adapter.ranks if not 0 < adapter.scales.get(m, 0) < float("inf")]:
        raise AdapterError(
            f"{wrong[0]}: its scale is {adapter.scales.get(wrong[0])}, expected a number above 0."
        )
    plain = [m for m in adapter.ranks if m + MAGNITUDE not in adapter.tensors]
    if plain and adapter.is_dora:
        raise AdapterError(
            f"{plain[0]} has no magnitude, but others do. In an adapter file use_dora is for all "
            "modules: train all with DoRA or none."
        )


def _modules(adapter: Adapter, factors: Mapping[str, float]) -> dict[str, list[float]]:
    return {
        module: [rank, adapter.scales[module], *([factors[module]] * (factors[module] != 1.0))]
        for module, rank in adapter.ranks.items()
    }
