"""Base weights in 4-bit NormalFloat with double quantization; the only user of torchao.

Source: Dettmers et al. 2023, QLoRA, section 3.
"""

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, linear_nf4, to_nf4

# torchtune teaches NF4 tensors to be cloned and filled in place, which load_state_dict needs.
from torchtune.modules import low_precision as _low_precision  # noqa: F401
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks

from phi3_plugin.errors import ConfigError

BLOCK = 64 * 256
"""Weights that share one scale of scales: torchao's block_size * scaler_block_size."""


def nf4_zeros(out_dim: int, in_dim: int) -> nn.Parameter:
    """Return a frozen NF4 weight ``[out_dim, in_dim]`` that holds zeros.

    Copying a weight into it, as ``load_state_dict`` does, quantizes that one tensor.

    Raises:
        ConfigError: The number of weights is not a multiple of the block.
    """
    if out_dim * in_dim % BLOCK:
        raise ConfigError(
            f"quantize_base: a layer of {out_dim} x {in_dim} weights cannot be stored in NF4, "
            f"which needs a multiple of {BLOCK}. Set quantize_base to False for this model."
        )
    return nn.Parameter(to_nf4(torch.zeros(out_dim, in_dim)), requires_grad=False)


def rows_of(weight: Tensor, like: Tensor, rank: int, size: int, device: torch.device) -> Tensor:
    """Cut out the rows that one process holds, as FSDP2 does: equal chunks, the last may be short.

    An NF4 weight is quantized whole and then cut: quantizing the rows alone gives other weights
    than one process has.

    Args:
        weight: ``[out, ...]``, whole; of a plain one only the rows needed are read.
        like: What holds the rows; gives dtype and storage.
        rank: The process.
        size: Number of processes.
        device: Where the rows go.
    """
    if not is_nf4(like):
        step = -(-weight.shape[0] // size)
        return weight[rank * step : (rank + 1) * step].to(device, like.dtype)
    # Copied into NF4 as load_state_dict does on one process: quantized from the file's dtype.
    whole = to_nf4(torch.zeros(weight.shape, dtype=like.dtype, device=device))
    whole.copy_(weight.to(device))
    rows = torch.chunk(whole, size, dim=0)[rank]
    shard: Tensor = whole.new_zeros(rows.size())
    return shard.copy_(rows)


def is_nf4(weight: Tensor) -> bool:
    """Whether a weight is stored in NF4."""
    return isinstance(weight, NF4Tensor)


def nf4_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map ``x [..., in]`` to ``[..., out]``; nothing dequantized is kept for the backward pass."""
    out: Tensor = linear_nf4(input=x, weight=weight)
    return out


def dequantize_in_state_dicts(model: nn.Module, dtype: torch.dtype) -> None:
    """Let ``model.state_dict()`` give plain tensors of this dtype on the CPU for NF4 weights.

    Merging and saving then work as for any other model, and ``load_state_dict`` takes them back.
    """
    _register_reparametrize_state_dict_hooks(model, dtype=dtype)
