"""Base weights in 4-bit NormalFloat with double quantization; the only user of torchao.

They are quantized some rows at a time as they are read, and dequantized for each product.

Source: Dettmers et al. 2023, QLoRA, section 3.
"""

import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, construct_nf4_args, get_block_absmax, to_nf4

# torchtune teaches NF4 tensors to be cloned and filled in place, which load_state_dict needs
from torchtune.modules import low_precision as _low_precision  # noqa: F401
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks

from phi3_plugin.errors import ConfigError

GROUP, GROUPS = 64, 256
"""Weights that share a scale, and scales that share one of their own: torchao's defaults."""
NF4_BLOCK = GROUP * GROUPS

QUANTIZED_AT_ONCE = 1 << 22
"""Weights that are read and quantized at a time, about: small buffers are used again and again,
new large ones cost as much time as reading, and quantizing needs several times its input."""


class Rows(Protocol):
    """A tensor ``[out, ...]``, or what reads rows of one when it is sliced."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the values are stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return consecutive rows."""


def nf4_zeros(out_dim: int, in_dim: int) -> nn.Parameter:
    """Return a frozen NF4 weight ``[out_dim, in_dim]`` that holds zeros.

    Copying a weight into it, as ``load_state_dict`` does, quantizes that one tensor.

    Raises:
        ConfigError: The number of weights is not a multiple of the block.
    """
    if out_dim * in_dim % NF4_BLOCK:
        raise ConfigError(
            f"quantize_base: a layer of {out_dim} x {in_dim} weights cannot be stored in NF4, "
            f"which needs a multiple of {NF4_BLOCK}. Set quantize_base to False for this model."
        )
    # One block of zeros, as often as it takes: quantizing them all takes as long as a real weight.
    block, count = to_nf4(torch.zeros(1, NF4_BLOCK)), out_dim * in_dim // NF4_BLOCK
    zeros = {
        "size": torch.Size((out_dim, in_dim)),
        "stride": (in_dim, 1),
        "n_blocks": block.n_blocks * count,
        "quantized_scalers": block.quantized_scalers.repeat(count),
        "quantization_factor": _exact(block.quantization_factor).repeat(count),
        "quantized_data": block.quantized_data.repeat(count),
    }
    return nn.Parameter(NF4Tensor(*construct_nf4_args(block, zeros)), requires_grad=False)


def rows_of(weight: Rows, like: Tensor, rank: int, size: int, device: torch.device) -> Tensor:
    """Fill what holds the rows of one process, as FSDP2 cuts: equal chunks, the last may be short.

    NF4 rows are those of the weight quantized whole: they share the mean of all scales, so
    quantizing them alone gives other weights than one process has.

    Args:
        weight: ``[out, ...]``, whole; of a plain one only the rows needed are read.
        like: What holds the rows, filled in place; from the meta device it is made anew.
        rank: The process.
        size: Number of processes.
        device: Where the rows go.
    """
    step = -(-weight.shape[0] // size)
    rows = slice(rank * step, max(min((rank + 1) * step, weight.shape[0]), rank * step))
    if is_nf4(like):
        quantized = _quantized(weight, rows, like, device)
        if not like.is_meta:
            like.copy_(quantized)
        return quantized if like.is_meta else like
    if like.is_meta:
        shape = rows.stop - rows.start, *weight.shape[1:]
        like = torch.empty(shape, dtype=like.dtype, device=device)
    for piece in _pieces(weight, rows):
        like[piece.start - rows.start : piece.stop - rows.start] = weight[piece]
    return like


def _quantized(weight: Rows, rows: slice, like: Tensor, device: torch.device) -> Tensor:
    """Return the rows that ``like.copy_(weight)`` gives, bit for bit, without its temporaries."""
    # Quantized from the file's dtype, like there; the results then take the model's.
    levels = to_nf4(torch.zeros(1, NF4_BLOCK, dtype=weight.dtype, device=device)).nf4
    scalers, factor, mean = _scales(weight, device)
    data = torch.cat(list(map(_coder(levels), _flat(weight, rows, device))))
    width, count = weight.shape[1], 2 * len(data)
    first, last = rows.start * width, rows.start * width + count
    inner = {
        "size": torch.Size((count // width, width)),
        "device": device,
        "quantized_scalers": scalers[first // GROUP : last // GROUP].clone(),
        "quantization_factor": _exact(
            factor[first // NF4_BLOCK : last // NF4_BLOCK], like.dtype
        ).clone(),
        "scaler_mean": mean.to(like.dtype),
        "quantized_data": data,
        "nf4": levels.to(like.dtype),
    }
    quantized: Tensor = NF4Tensor(*construct_nf4_args(like, inner))
    return quantized


def _scales(weight: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales of the whole weight, quantized, their own scales, and their mean."""
    pieces = _flat(weight, slice(0, weight.shape[0]), device)
    largest = torch.cat([get_block_absmax(piece, GROUP) for piece in pieces])
    # In groups of one weight each: the largest of such a group is the number itself.
    scales: tuple[Tensor, Tensor, Tensor] = NF4Tensor.double_quantize_scalers(largest, 1, GROUPS)
    return scales


def _flat(weight: Rows, rows: slice, device: torch.device) -> Iterator[Tensor]:
    return (weight[piece].to(device).flatten() for piece in _pieces(weight, rows))


def _pieces(weight: Rows, rows: slice) -> Iterator[slice]:
    """Cut rows into some that are small, and whole groups of weights if all of them are."""
    step = max(QUANTIZED_AT_ONCE // math.prod(weight.shape[1:]) // GROUP, 1) * GROUP
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _exact(factors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return what scales are divided by in the dtype of the weight; of one in fp16 in fp32.

    It is 128 over how far the scales of 256 groups differ at most, often by less than 0.002, and
    fp16 ends at 65504.
    """
    dtype = dtype or factors.dtype
    return factors.to(torch.float32 if dtype == torch.float16 else dtype)


def _coder(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what finds torchao's 4-bit codes for whole groups of values, two in a byte.

    Args:
        levels: The 16 of NF4, in the dtype of the values.
    """
    if levels.dtype.itemsize > 2:
        search: Callable[..., Tensor] = NF4Tensor.convert_to_norm_float_weight
        return lambda values: search(values, len(values) // GROUP, GROUP, levels)
    # 16 bits have 65536 values, so torchao's search for the nearest level is made for each of
    # those and not for each weight: many times as fast, and by construction the same.
    every = torch.arange(1 << 16, device=levels.device).to(torch.int16).view(levels.dtype)
    code_of = NF4Tensor.quantize_tensor_nearest(every, levels).to(torch.uint8)

    def codes(values: Tensor) -> Tensor:
        scaled = values.view(-1, GROUP) / get_block_absmax(values, GROUP).unsqueeze(-1)
        bits = scaled.flatten().view(torch.int16).int() & 0xFFFF
        found: Tensor = code_of.index_select(0, bits)
        return found[::2] << 4 | found[1::2]

    return codes


def is_nf4(weight: Tensor) -> bool:
    """Whether a weight is stored in NF4."""
    return isinstance(weight, NF4Tensor)


@torch.no_grad()
def nearest_nf4(weight: Tensor) -> Tensor:
    """Return in fp32 what is left of a weight ``[out, in]`` when it is stored in NF4."""
    with weight.device:
        like = nf4_zeros(*weight.shape)
    return rows_of(weight, like.detach(), 0, 1, weight.device).to(torch.float32)


def dequantize_in_state_dicts(model: nn.Module, dtype: torch.dtype) -> None:
    """Let ``model.state_dict()`` give plain tensors of this dtype on the CPU for NF4 weights.

    Merging and saving then work as for any other model, and ``load_state_dict`` takes them back.
    """
    _register_reparametrize_state_dict_hooks(model, dtype=dtype)


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
    if not is_nf4(weight) or torch.compiler.is_compiling():
        return weight.to(dtype)
    return _dequantized(weight).to(dtype)


DEQUANTIZED_AT_ONCE = 1 << 20
"""Weights that are dequantized at a time on a CPU: what its cache holds."""


class _Memory(threading.local):
    """Of one thread: what another dequantizes meanwhile is not to be written over it."""

    def __init__(self) -> None:
        self.of: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_memory = _Memory()


def dequantized_into() -> list[Tensor]:
    """Return the memory that weights are dequantized into by now."""
    return list(_memory.of.values())


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
    step = DEQUANTIZED_AT_ONCE if codes.device.type == "cpu" else count
    # No piece in memory of its own: new pages cost more than dequantizing
    places = torch.empty(step // each, dtype=torch.int32, device=codes.device)
    for first in range(0, count, step):
        last = min(first + step, count)
        piece, some = out[first:last], codes[first // each : last // each]
        words = places[: len(some)].copy_(some)
        torch.index_select(values, 0, words, out=piece.view(values.dtype))
        piece.view(-1, GROUP).mul_(scalers[first // GROUP : last // GROUP, None])
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
