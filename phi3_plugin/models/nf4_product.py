"""Products with NF4 weights, which are dequantized for each and kept by none."""

import threading
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3_plugin.models.nf4 import GROUP, is_nf4

PIECE = 1 << 20
"""Weights that are dequantized at a time on a CPU: what its cache holds."""


def nf4_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map ``x [..., in]`` to ``[..., out]``; nothing dequantized is kept for the backward pass."""
    out: Tensor = _NF4Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, plain(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,), (g,) = ctx.saved_tensors, grads
        return g @ plain(weight, g.dtype), None


def plain(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight ``[out, in]`` as a plain tensor of this dtype.

    An NF4 weight is dequantized, into memory that the next one takes again: use it at once.
    """
    if not is_nf4(weight):
        return weight.to(dtype)
    if torch.compiler.is_compiling():
        return weight.to(dtype)
    return _dequantized(weight).to(dtype)


class _Memory(threading.local):
    """Of one thread: what another dequantizes meanwhile is not to be written over it."""

    def __init__(self) -> None:
        self.of: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_memory = _Memory()


def _dequantized(weight: Any) -> Tensor:
    """Return what torchao's ``get_original_weight`` does, bit for bit, in memory used before."""
    codes, count = weight.quantized_data, weight.numel()
    key = weight.dtype, codes.device
    if key not in _memory.of or _memory.of[key].numel() < count:
        with torch.inference_mode(False):  # or training could not write to it later
            _memory.of[key] = torch.empty(count, dtype=weight.dtype, device=codes.device)
    out = _memory.of[key][:count]
    codes, values = _words(codes, weight.nf4)
    each = count // len(codes)
    scalers = weight.dequantize_scalers(
        weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    )
    step = PIECE if codes.device.type == "cpu" else count
    for first in range(0, count, step):
        last = min(first + step, count)
        piece = out[first:last]
        found = values.index_select(0, codes[first // each : last // each].int())
        torch.mul(
            found.view(weight.dtype).view(-1, GROUP),
            scalers[first // GROUP : last // GROUP, None],
            out=piece.view(-1, GROUP),
        )
    return out.view(weight.shape)


def _words(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes as words, and for each word the levels that it stands for, as one number.

    A word is a byte, of two codes, or on a CPU two bytes where the levels have as many: half as
    many places of memory to look up.
    """
    if codes.device.type == "cpu" and levels.dtype.itemsize == 2 and len(codes) % 2 == 0:
        return codes.view(torch.uint16), _fours(levels.dtype, tuple(levels.tolist()))
    byte = torch.arange(256, device=levels.device)
    both = torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)
    return codes, both.view(torch.int32 if levels.dtype.itemsize == 2 else torch.int64)[:, 0]


@lru_cache(maxsize=4)
def _fours(dtype: torch.dtype, levels: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):  # as above
        word, known = torch.arange(1 << 16), torch.tensor(levels, dtype=dtype)
        places = [word >> shift & 15 for shift in (4, 0, 12, 8)]  # the first byte is the lower one
        return torch.stack([known[place] for place in places], dim=1).view(torch.int64)[:, 0]
