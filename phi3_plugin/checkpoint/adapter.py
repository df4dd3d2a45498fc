"""An adapter as it computes, and the exact ways to what files can say of it and back."""

import base64
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from phi3_plugin.checkpoint.base import MAGNITUDE, A, B, from_torchtune, fused_name, part_rows
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError, CheckpointError

# Shapes: R rank, which may differ from module to module


class Origin(TypedDict, total=False):
    """How an adapter was trained, as a file of ours says it; a key is there if it has a value."""

    layout: str
    """Of the model: ``fused`` is ours, ``split`` torchtune's own Phi-3."""
    lora_init: str
    """``pissa`` or ``loftq``, where the adapter was split off the base."""
    rslora: bool
    """True where its scale is alpha / sqrt(R)."""


class Note(Origin, total=False):
    """What a file says of the adapter that it was made of: JSON in its metadata."""

    base_hash: str
    """Of the weights that the adapter was made for, if that is known."""
    modules: dict[str, list[float]]
    """Of each module ``[rank, scale]``, or ``[rank, scale, factor]`` where B was multiplied."""
    rounded: dict[str, str]
    """Of such a B, what division does not bring back."""
    patterns: bool
    """True in a file with rank and alpha patterns."""


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
    rows: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    """Rows of ``tok_embeddings`` and ``output`` that stand in the place of the base's, ``[D]`` by
    the token's id, PEFT's ``trainable_token_indices``. A tied head has those of the embedding."""
    new_tokens: Sequence[Mapping[str, Any]] = ()
    """Tokens that the base's tokenizer has not, as tokenizer.json lists them."""
    dropout: float = 0.0
    """What the adapter was trained with."""
    base: str = ""
    """Repository or folder of the base model, if the file says."""
    origin: Origin = field(default_factory=Origin)
    base_hash: str = ""
    """Of the weights it was made for, if the file says."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], scale: float, **more: Any) -> Self:
        """Sort the trained tensors of a model whose modules share one scale.

        Args:
            values: Our names, or those of torchtune's own Phi-3; what is no part of a low-rank
                adapter was trained whole.
            scale: alpha / R.
            more: Other fields.
        """
        values = {from_torchtune(name): value for name, value in values.items()}
        tensors = {n: v for n, v in values.items() if n.endswith((A, B, MAGNITUDE))}
        saved = {name: value for name, value in values.items() if name not in tensors}
        scales = {name.removesuffix(A): scale for name in tensors if name.endswith(A)}
        return cls(tensors, scales, saved, **more)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {m.removesuffix(A): t.shape[0] for m, t in self.tensors.items() if m.endswith(A)}

    @property
    def vocabulary(self) -> int:
        """How many rows embedding and head must have for it, at least."""
        wanted = [max(own) + 1 for own in self.rows.values()]
        return max([0, *wanted, *map(len, self.saved.values())])

    @property
    def is_dora(self) -> bool:
        """Whether a module has a magnitude."""
        return any(name.endswith(MAGNITUDE) for name in self.tensors)


# One rank and one integer alpha.
#
# Older versions of vLLM ignore rank and alpha patterns, llama.cpp the latter, and PEFT declares
# alpha an integer.
# So modules of a smaller rank are padded with zeros, which is exact, and B carries what an integer
# alpha cannot say. Where that rounds, the few bits that division does not bring back are kept as
# text in the note, with the rank and scale that each module had.

NOTE_CHARACTERS = 60_000_000
"""A header of safetensors holds 100 MB. Without what was to be noted, B comes back rounded."""


@dataclass(frozen=True)
class FileContent:
    """What an adapter file holds, and a note by which the original comes back bit for bit."""

    tensors: Mapping[str, Tensor]
    """Names of the file's modules in ours; ``lora_a [R, in]``, ``lora_b [out, R]``,
    ``magnitude [out]``."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """Of each module."""
    note: Note
    """:func:`original` reads it."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) instead of alpha / rank."""

    @property
    def scales(self) -> dict[str, float]:
        """What B A is multiplied with, by module."""
        root = math.sqrt if self.rslora else float
        return {module: alpha / root(self.ranks[module]) for module, alpha in self.alphas.items()}


def uniform_content(
    adapter: Adapter, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> FileContent:
    """Make parts whole, and give all modules one rank and one integer alpha.

    Args:
        adapter: What to write.
        config: Sizes of the model.
        row_norms: See :func:`fuse`.

    Raises:
        AdapterError: It is empty, or no file can hold it.
    """
    check_writable_adapter(adapter)
    ranks = fused_ranks(adapter)
    rank = max(ranks.values())
    alpha = integer_alpha(adapter.scales.values(), rank)
    scaled, note = level_scales(adapter, dict.fromkeys(ranks, alpha / rank))
    tensors = pad(fuse(scaled, config, row_norms), rank)
    return FileContent(tensors, dict.fromkeys(ranks, rank), dict.fromkeys(ranks, alpha), note)


def pattern_content(
    adapter: Adapter, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> FileContent:
    """Make parts whole, and leave each module its rank and its alpha.

    Arguments and errors are those of :func:`uniform_content`.
    """
    check_writable_adapter(adapter)
    ranks, scales = fused_ranks(adapter), fused_scales(adapter)
    scaled, note = level_scales(adapter, scales)
    note["patterns"] = True
    tensors = fuse(scaled, config, row_norms)
    if adapter.origin.get("rslora"):  # said again where alpha / sqrt(rank) gives the very scales
        rooted = {module: alpha_of(s, math.sqrt(ranks[module])) for module, s in scales.items()}
        content = FileContent(tensors, ranks, rooted, note, rslora=True)
        if content.scales == scales:
            return content
    alphas = {module: alpha_of(scale, ranks[module]) for module, scale in scales.items()}
    return FileContent(tensors, ranks, alphas, note)


def fused_ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each whole module: its parts' ranks together."""
    ranks: Counter[str] = Counter()
    for module, rank in adapter.ranks.items():
        ranks[fused_name(module)] += rank
    return dict(ranks)


def fused_scales(adapter: Adapter) -> dict[str, float]:
    """Return one scale for each whole module: that of the part whose name comes first."""
    return {fused_name(m): s for m, s in sorted(adapter.scales.items(), reverse=True)}


def check_writable_adapter(adapter: Adapter) -> None:
    """Refuse what no adapter file can say.

    Raises:
        AdapterError: No module, a scale that is none, or DoRA on some modules only.
    """
    if not adapter.ranks:
        raise AdapterError("The model has no adapter to save. Use a LoRA model builder.")
    if wrong := [m for m in adapter.ranks if not 0 < adapter.scales.get(m, 0) < math.inf]:
        raise AdapterError(
            f"{wrong[0]}: its scale is {adapter.scales.get(wrong[0])}, expected a number above 0."
        )
    plain = [m for m in adapter.ranks if m + MAGNITUDE not in adapter.tensors]
    if plain and adapter.is_dora:
        raise AdapterError(
            f"{plain[0]} has no magnitude, but others do. In an adapter file use_dora is for all "
            "modules: train all with DoRA or none."
        )


def integer_alpha(scales: Iterable[float], rank: int) -> int:
    """Return the integer alpha whose scale, alpha / rank, most modules have or come close to.

    Args:
        scales: Of every module, in any order: a file is believed to be what its note says only if
            writing it again chooses the same. Of equally good ones the largest: no B overflows.
        rank: Of all modules, once they are padded.
    """
    counts = Counter(scales)
    exact = [s for s in counts if s > 0 and round(s * rank) and round(s * rank) / rank == s]
    if exact:  # that from which most others differ by a shift of the exponent
        gain = {s: sum(n for other, n in counts.items() if is_shift(other, s)) for s in exact}
        return round(max(exact, key=lambda s: (gain[s], s)) * rank)
    # Just below what is asked for: B grows by a factor near 1, which division nearly always undoes.
    return max(int(max(counts, key=lambda s: (counts[s], s)) * rank), 1)


def is_shift(scale: float, other: float) -> bool:
    """Whether one scale becomes the other by a factor that shifts the exponent alone."""
    return math.frexp(abs(scale / other))[0] == 0.5


def alpha_of(scale: float, divisor: float) -> float:
    """Return the alpha for which alpha / divisor is the scale, as an integer if there is one."""
    whole = round(scale * divisor)
    return whole if whole / divisor == scale else scale * divisor


def pad(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return ``lora_a [R, in]`` and ``lora_b [out, R]`` of one rank, the new rows and columns 0."""
    padded = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(A):
            padded[name] = F.pad(value, (0, 0, 0, rank - value.shape[0]))
        elif name.endswith(B):
            padded[name] = F.pad(value, (0, rank - value.shape[1]))
    return padded


def level_scales(adapter: Adapter, scales: Mapping[str, float]) -> tuple[dict[str, Tensor], Note]:
    """Give every module, by its B, the scale of the whole module that it belongs to.

    Args:
        adapter: What to write.
        scales: Of whole modules.

    Returns:
        The tensors, and the note by which :func:`original` undoes this.

    Raises:
        AdapterError: Numbers become too large for their dtype, or so small that it says another B.
    """
    tensors, modules, rounded = dict(adapter.tensors), dict[str, list[float]](), dict[str, str]()
    for module, rank in adapter.ranks.items():
        scale = adapter.scales[module]
        factor = scale / scales[fused_name(module)]
        modules[module] = [rank, scale] if factor == 1 else [rank, scale, factor]
        if factor != 1:
            b = adapter.tensors[module + B]
            tensors[module + B] = rescale(module, b, factor)
            if difference := _difference(b, tensors[module + B], factor):
                rounded[module] = difference
    if sum(map(len, rounded.values())) > NOTE_CHARACTERS:
        rounded = {}
    note = cast(Note, {**adapter.origin})
    if adapter.base_hash:
        note["base_hash"] = adapter.base_hash
    note["modules"] = modules
    if rounded:
        note["rounded"] = rounded
    return tensors, note


def original(
    tensors: Mapping[str, Tensor], note: Note, config: Phi3Config
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors and scales of the adapter that a file was made of, bit for bit.

    Args:
        tensors: Of the file. Modules may be whole where the original had parts, and the other way
            round where a format has no whole ones.
        note: What was noted of the original.
        config: Sizes of the model.

    Raises:
        AdapterError: The note is not for these tensors.
        CheckpointError: Tensors are missing.
    """
    modules, rounded = note["modules"], note.get("rounded", {})
    ranks = {module: int(value[0]) for module, value in modules.items()}
    out, scales = dict[str, Tensor](), dict[str, float]()
    for module, (_, scale, *factor) in modules.items():
        scales[module] = float(scale)
        try:
            out.update(_module_tensors(tensors, module, ranks, config))
        except KeyError as error:
            raise CheckpointError(f"The adapter is incomplete: {error} is missing.") from error
        for divisor in factor:
            b = out[module + B]
            out[module + B] = unscale(b, divisor, rounded.get(module))
    return out, scales


def _module_tensors(
    tensors: Mapping[str, Tensor], module: str, ranks: Mapping[str, int], config: Phi3Config
) -> dict[str, Tensor]:
    """Take the tensors of one original module out of those of a file.

    The file may have the module itself, padded; the whole that it is a part of, whose A stacks
    those of the parts; or its parts, each with its A.
    """
    rank, whole = ranks[module], fused_name(module)
    if module + A in tensors:
        sources, rows, columns = [module], slice(None), slice(rank)
    elif module in (parts := part_rows(whole, config)):
        before = list(parts)[: list(parts).index(module)]
        start = sum(ranks.get(part, 0) for part in before)
        sources, rows, columns = [whole], parts[module], slice(start, start + rank)
    else:
        sources, rows, columns = list(parts), slice(None), slice(rank)
    out = {
        module + A: tensors[sources[0] + A][columns].clone(),
        module + B: torch.cat([tensors[source + B][rows, columns] for source in sources]),
    }
    if sources[0] + MAGNITUDE in tensors:
        magnitudes = [tensors[source + MAGNITUDE][rows] for source in sources]
        out[module + MAGNITUDE] = torch.cat(magnitudes)
    return out


def rescale(module: str, b: Tensor, factor: float) -> Tensor:
    """Multiply the B of a module, rounding once.

    Raises:
        AdapterError: Numbers become too large for their dtype, or so small that it says another B.
    """
    exactly = b.double() * factor
    scaled = exactly.to(b.dtype)
    lost = (scaled.double() - exactly).norm()  # infinite if a number is; rounding costs eps / 2
    if not lost <= torch.finfo(b.dtype).eps * exactly.norm():
        raise AdapterError(
            f"{module}: its B times {factor:.6g}, which makes all scales equal, is too "
            f"{'small' if torch.isfinite(scaled).all() else 'large'} for {b.dtype}. Save the "
            "adapter in a wider dtype, or with patterns."
        )
    return scaled


_INTEGERS = {2: torch.int16, 4: torch.int32}
"""As wide as a float."""


def unscale(scaled: Tensor, factor: float, difference: str | None) -> Tensor:
    """Undo :func:`rescale`, bit for bit.

    Args:
        scaled: What it made.
        factor: What B was multiplied with.
        difference: What was noted of this module, if anything.

    Raises:
        AdapterError: The note is not for this tensor.
    """
    back = (scaled.double() / factor).to(scaled.dtype)
    if difference is None:
        return back
    kind = _INTEGERS[back.element_size()]
    most = back.numel() * kind.itemsize
    try:
        # The limit keeps a made-up note from growing without end.
        packed = base64.b64decode(difference, validate=True)
        data = zlib.decompressobj().decompress(packed, most + 1)
    except (ValueError, zlib.error):
        data = b""
    if len(data) not in (back.numel(), most):
        raise AdapterError(
            "The metadata on the original B does not fit the adapter. The file was changed after "
            "it was written: read it without metadata, or write it again."
        )
    stored = kind if len(data) == most else torch.int8
    steps = torch.frombuffer(bytearray(data), dtype=stored).to(kind)
    return (back.view(kind) + steps.view(back.shape)).view(back.dtype)


def _difference(b: Tensor, scaled: Tensor, factor: float) -> str | None:
    """Return how many steps of their dtype lie between B and what division gives, if any."""
    kind = _INTEGERS[b.element_size()]
    steps = b.contiguous().view(kind) - unscale(scaled, factor, None).contiguous().view(kind)
    if not steps.any():
        return None
    narrow = steps if steps.abs().max() > 127 else steps.to(torch.int8)  # more: subnormal numbers
    return base64.b64encode(zlib.compress(narrow.numpy().tobytes(), 1)).decode()


# Parts and wholes


def fuse(
    tensors: Mapping[str, Tensor], config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Turn adapters on parts into the one adapter on each fused layer that computes the same.

    A fused layer stacks its parts' rows, so adapters on parts are one adapter on the whole::

        parts  q: B_q A_q    v: B_v A_v          (k has none)
        fused  A = [A_q]     B = [B_q   0 ]      rank 2 r, the same scale
                   [A_v]         [ 0    0 ]
                                 [ 0   B_v]

    Args:
        tensors: ``lora_a [R, in]``, ``lora_b [rows, R]``, and for DoRA ``magnitude [rows]``.
        config: Sizes of the model.
        row_norms: Gives the norms of the rows of a fused base weight, told its name. Rows of a
            part without an adapter keep them as their magnitude.
    """
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    parts = [module for module in modules if fused_name(module) != module]
    out = {n: v for n, v in tensors.items() if not n.startswith(tuple(f"{p}." for p in parts))}
    for whole in dict.fromkeys(map(fused_name, parts)):
        rows = part_rows(whole, config)
        present = [part for part in rows if part in parts]
        height = max(r.stop for r in rows.values())
        out[whole + A] = torch.cat([tensors[part + A] for part in present])
        out[whole + B] = b = tensors[present[0] + B].new_zeros(height, len(out[whole + A]))
        column = 0
        for part in present:
            own = tensors[part + B]
            b[rows[part], column : column + own.shape[1]] = own
            column += own.shape[1]
        norms = {part: tensors[part + MAGNITUDE] for part in present if part + MAGNITUDE in tensors}
        if norms:
            some = next(iter(norms.values()))
            lacks = len(present) < len(rows)
            magnitude = row_norms(whole).to(some) if lacks else some.new_empty(height)
            for part, norm in norms.items():
                magnitude[rows[part]] = norm
            out[whole + MAGNITUDE] = magnitude
    return out


def unfuse(tensors: Mapping[str, Tensor], config: Phi3Config) -> dict[str, Tensor]:
    """Return an adapter on parts alone: those of whole layers share its A, and split its B.

    Args:
        tensors: ``lora_a [R, in]``, ``lora_b [out, R]``, ``magnitude [out]``.
        config: Sizes of the model.
    """
    out = {}
    for name, value in tensors.items():
        module, ending = split_ending(name)
        for part, rows in part_rows(module, config).items():
            own = slice(None) if ending == A else rows
            out[part + ending] = value if part == module else value[own].clone()
    return out


def split_ending(name: str) -> tuple[str, str]:
    """Split the name of an adapter's tensor into module and ending."""
    ending = next(ending for ending in (A, B, MAGNITUDE) if name.endswith(ending))
    return name.removesuffix(ending), ending
