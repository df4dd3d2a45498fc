"""An adapter as it computes, whatever file it came from or goes to."""

import base64
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from phi3_plugin.checkpoint.base import INNER, fuse_adapter, fused_name, unfuse_adapter
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

# An adapter as it computes, whatever file it came from or goes to.

A, B, MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".magnitude"
"""How the tensors of a module end."""

# Shapes: R rank, which may differ from module to module


@dataclass(frozen=True)
class Adapter:
    """Adds ``scale B A x`` to what each module computes; with a magnitude, as DoRA does.

    Modules have our names: ``layers.3.attn.qkv_proj``, a part of it as
    ``layers.3.attn.qkv_proj.q_proj``, ``tok_embeddings``, ``output``.
    """

    tensors: Mapping[str, Tensor]
    """``lora_a.weight [R, in]``, ``lora_b.weight [out, R]`` and for DoRA ``magnitude [out]`` of
    each module; of the embedding ``[R, V]`` and ``[D, R]``: ``(B A)^T`` is added to its rows."""
    scales: Mapping[str, float]
    """Of each module, what B A is multiplied with: alpha / R, or alpha / sqrt(R) for rsLoRA."""
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights that are trained whole, PEFT's ``modules_to_save``, such as ``output.weight``."""
    dropout: float = 0.0
    """What the adapter was trained with."""
    base: str = ""
    """Repository or folder of the base model, if the file says."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the file says of how the adapter was before it was written, if it is one of ours."""
    base_hash: str = ""
    """Of the weights it was made for, if the file says."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], scale: float, **more: Any) -> Self:
        """Sort the trained tensors of a model whose modules share one scale.

        Args:
            values: Our names; what is no part of a low-rank adapter was trained whole.
            scale: alpha / R.
            more: Other fields.
        """
        tensors = {n: v for n, v in values.items() if n.endswith((A, B, MAGNITUDE))}
        saved = {name: value for name, value in values.items() if name not in tensors}
        scales = {name.removesuffix(A): scale for name in tensors if name.endswith(A)}
        return cls(tensors, scales, saved, **more)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {m.removesuffix(A): t.shape[0] for m, t in self.tensors.items() if m.endswith(A)}

    @property
    def is_dora(self) -> bool:
        """Whether a module has a magnitude."""
        return any(name.endswith(MAGNITUDE) for name in self.tensors)


# One rank and one scale for every module of an adapter, and the way back to what it was.
#
# vLLM ignores rank and alpha patterns, llama.cpp the latter, and PEFT declares alpha an integer. So
# modules of a smaller rank are padded with zeros, which is exact, and B carries what an integer alpha
# cannot say. Where that rounds, the few bits that division does not bring back are kept as text.

# Shapes: R rank of one module
BITS = {2: torch.int16, 4: torch.int32}
"""Integers as wide as a float."""


def whole_alpha(scales: Iterable[float], rank: int) -> int:
    """Return the integer alpha whose scale, alpha / rank, most modules have or come close to.

    Args:
        scales: Of every module, in any order: a file is believed to be what its note says only if
            writing it again chooses the same. Of equally good ones the largest: no B overflows.
        rank: Of all modules, once they are padded.
    """
    counts = Counter(scales)
    said = [s for s in counts if s > 0 and round(s * rank) and round(s * rank) / rank == s]
    if said:  # that from which most others differ by a shift of the exponent
        gain = {s: sum(n for other, n in counts.items() if exact(other, s)) for s in said}
        return round(max(said, key=lambda s: (gain[s], s)) * rank)
    # Just below what is asked for: B grows by a factor near 1, which division nearly always undoes.
    return max(int(max(counts, key=lambda s: (counts[s], s)) * rank), 1)


def exact(scale: float, other: float) -> bool:
    """Whether one scale becomes the other by a factor that shifts the exponent alone."""
    ratio = abs(scale / other)
    return ratio > 0 and torch.frexp(torch.tensor(ratio, dtype=torch.float64))[0].item() == 0.5


def pad(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return ``lora_a [R, in]`` and ``lora_b [out, R]`` of one rank, the new rows and columns 0."""
    return {name: _pad(name, value, rank) for name, value in tensors.items()}


def _pad(name: str, value: Tensor, rank: int) -> Tensor:
    if name.endswith(A):
        return F.pad(value, (0, 0, 0, rank - value.shape[0]))
    return F.pad(value, (0, rank - value.shape[1])) if name.endswith(B) else value


def rescale(
    tensors: Mapping[str, Tensor], factors: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Multiply the B of some modules, rounding once.

    Args:
        tensors: Of the adapter.
        factors: Of each module.

    Returns:
        The tensors, and by module what :func:`restore` needs where division is not enough.

    Raises:
        AdapterError: Numbers become too large for their dtype, or so small that it says another B.
    """
    out, notes = dict(tensors), dict[str, str]()
    for module, factor in factors.items():
        if factor == 1.0:
            continue
        b = tensors[module + B]
        exactly = b.double() * factor
        out[module + B] = scaled = exactly.to(b.dtype)
        lost = (scaled.double() - exactly).norm()  # infinite if a number is; rounding costs eps / 2
        if not lost <= torch.finfo(b.dtype).eps * exactly.norm():
            raise AdapterError(
                f"{module}: its B times {factor:.6g}, which makes all scales equal, is too "
                f"{'small' if torch.isfinite(scaled).all() else 'large'} for {b.dtype}. Save the "
                "adapter in a wider dtype, or with patterns."
            )
        if note := _difference(b, scaled, factor):
            notes[module] = note
    return out, notes


def restore(scaled: Tensor, factor: float, note: str | None) -> Tensor:
    """Undo :func:`rescale` for one B, bit for bit.

    Args:
        scaled: What it made.
        factor: What B was multiplied with.
        note: What it noted of this module, if anything.

    Raises:
        AdapterError: The note is not for this tensor.
    """
    if factor == 1.0:
        return scaled
    back = (scaled.double() / factor).to(scaled.dtype)
    if note is None:
        return back
    bits = BITS[back.element_size()]
    steps = _unpacked(note, back.numel(), bits)
    return (back.view(bits) + steps.view(back.shape)).view(back.dtype)


def _difference(b: Tensor, scaled: Tensor, factor: float) -> str | None:
    """Return how many steps of their dtype lie between B and what division gives, if any."""
    bits = BITS[b.element_size()]
    steps = b.contiguous().view(bits) - restore(scaled, factor, None).contiguous().view(bits)
    if not steps.any():
        return None
    narrow = steps if steps.abs().max() > 127 else steps.to(torch.int8)  # more: subnormal numbers
    return base64.b64encode(zlib.compress(narrow.numpy().tobytes(), 1)).decode()


def _unpacked(note: str, count: int, bits: torch.dtype) -> Tensor:
    try:
        # The limit keeps a made-up note from growing without end.
        limit = count * bits.itemsize
        data = zlib.decompressobj().decompress(base64.b64decode(note, validate=True), limit + 1)
        kind = {count: torch.int8, limit: bits}[len(data)]
    except (ValueError, KeyError, zlib.error) as error:
        raise AdapterError(
            "The metadata on the original B does not fit the adapter. The file was changed after "
            "it was written: read it without metadata, or write it again."
        ) from error
    return torch.frombuffer(bytearray(data), dtype=kind).to(bits)


# An adapter as a file for other programs holds it: on whole modules, with ranks and alphas.

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
        row_norms: See :func:`phi3_plugin.checkpoint.base.fuse_adapter`.
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
