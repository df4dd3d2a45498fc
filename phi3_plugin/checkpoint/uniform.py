"""One rank and one scale for every module of an adapter, and the way back to what it was.

vLLM ignores rank and alpha patterns, llama.cpp the latter, and PEFT declares alpha an integer. So
modules of a smaller rank are padded with zeros, which is exact, and B carries what an integer alpha
cannot say. Where that rounds, the few bits that division does not bring back are kept as text.
"""

import base64
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_plugin.checkpoint.adapter import A, B
from phi3_plugin.errors import AdapterError

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
