"""How much memory a training step takes, part by part, before any weight is there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phi3_plugin.errors import ConfigError
from phi3_plugin.train.footprint import Footprint, footprint, parts_of
from phi3_plugin.train.memory import in_gib

LOW_BITS = {"8bit": 2 * (1 + 4 / 256), "fp8": 2 * (1 + 4 / 256), "4bit": 2 * (0.5 + 4 / 128)}
"""Bytes a value of both of Adam's states, scales included, by a word of the optimizer's name.

Source: torchao 0.18 ``optim/adam.py``; bitsandbytes 0.50 ``optim/optimizer.py``.
"""

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Work:
    """What one process does at a time."""

    lengths: tuple[int, ...]
    """Tokens of each document of a micro-batch."""
    labelled: int
    """How many of them are predicted."""
    shards: int = 1
    """Processes that share the model."""
    reshard: bool = True
    """Whether a layer's gathered weights are let go between forward and backward pass."""
    cpu_weights: bool = False
    """Whether the shares are in the CPU's memory."""
    cpu_activations: bool = False
    """Whether what recomputed layers keep is in the CPU's memory."""
    joined: bool = False
    """Whether attention takes all documents at once, as on a GPU."""


@dataclass(frozen=True)
class Estimate:
    """What one process takes at the moment that needs the most."""

    parts: dict[str, int]
    """Bytes, by what they are for."""
    recomputed: int
    """Layers that recompute, the first ones."""
    flops: int
    """Multiplications and additions of a micro-batch."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def estimate(
    model: nn.Module, work: Work, make_optimizer: MakeOptimizer, recomputed: int = 0
) -> Estimate:
    """Return what training takes.

    Args:
        model: On the meta device, prepared, in training mode.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
        recomputed: Layers that recompute, the first ones, beside those that the model recomputes.
    """
    how: Any = {"recomputed": recomputed, "joined": work.joined}
    found = footprint(model, work.lengths, work.labelled, **how)
    parts = {**weights(model, work, make_optimizer), **_activations(model, work, found)}
    return Estimate(parts, recomputed, found.flops)


def fewest(at: Callable[[int], Estimate], layers: int, budget: int) -> Estimate:
    """Return the estimate of the fewest layers that must recompute for a budget.

    The first ones do. The backward pass comes to them last, when what the others kept is gone,
    so that what a layer computes again fits where theirs was.

    Args:
        at: Estimates for a number of layers that recompute.
        layers: Of the model.
        budget: Bytes.

    Raises:
        ConfigError: All of them are not enough; what takes how much.
    """
    if (best := at(0)).total <= budget:
        return best
    if (best := at(layers)).total > budget:
        raise ConfigError(_too_much(best, layers, budget))
    low, high = 0, layers  # too few, enough
    while high - low > 1:
        middle = at((low + high) // 2)
        if middle.total <= budget:
            best, high = middle, middle.recomputed
        else:
            low = middle.recomputed
    return best


def _too_much(least: Estimate, layers: int, budget: int) -> str:
    parts = ", ".join(f"{name} {in_gib(size)}" for name, size in least.parts.items() if size)
    return (
        f"memory_budget: {in_gib(budget)} GiB is too little: with all {layers} layers recomputed "
        f"a step takes {in_gib(least.total)} GiB ({parts}). Lower batch_size or "
        "tokenizer.max_seq_len, quantize the base with "
        "model._component_=phi3_plugin.models.qlora_phi3, share it among more processes, or "
        "raise the budget."
    )


def weights(model: nn.Module, work: Work, make_optimizer: MakeOptimizer) -> dict[str, int]:
    """Return what is there in every step, in bytes: weights, gradients, optimizer.

    Args:
        model: On the meta device, prepared.
        work: Of one process.
        make_optimizer: Makes the optimizer of given parameters.
    """
    own, trained = partial(_share, work=work), [p for p in model.parameters() if p.requires_grad]
    per_value = {dtype: _state(make_optimizer, dtype) for dtype in {p.dtype for p in trained}}
    return {
        "base weights": own(size_of(p for p in model.parameters() if not p.requires_grad)),
        "trained weights": own(size_of(trained)),
        "gradients": own(size_of(trained)),
        "optimizer": own(ceil(sum(p.numel() * per_value[p.dtype] for p in trained))),
        "gathered layers": _gathered(model, work),
    }


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, with all that a quantized one consists of."""
    return sum(part.nbytes for tensor in tensors for part in parts_of(tensor))


def _share(size: int, work: Work) -> int:
    return 0 if work.cpu_weights else -(-size // work.shards)


def _gathered(model: Any, work: Work) -> int:
    """Two layers, since the next one travels meanwhile, and what belongs to no layer."""
    if work.shards == 1:
        return 0
    layers = [size_of(layer.parameters()) for layer in model.layers]
    others = size_of(model.parameters()) - sum(layers)
    return others + (2 * max(layers) if work.reshard else sum(layers))


def _state(make_optimizer: MakeOptimizer, dtype: torch.dtype) -> float:
    """Return the bytes of the optimizer's state for each value that is trained."""
    value = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = make_optimizer([value])
    name = type(optimizer).__name__.lower()
    if low := [size for word, size in LOW_BITS.items() if word in name]:
        return low[0]  # their first step is compiled, or needs a GPU
    value.grad = torch.zeros_like(value)
    try:
        optimizer.step()
    except Exception:  # of somebody's optimizer, which may want more than a step
        return 2.0 * dtype.itemsize
    kept = [part for part in optimizer.state[value].values() if isinstance(part, Tensor)]
    return size_of(part for part in kept if part.numel() > 1) / value.numel()


def _activations(model: nn.Module, work: Work, found: Footprint) -> dict[str, int]:
    return {
        "activations": 0 if work.cpu_activations else found.activations,
        "loss": found.loss,
        "buffers": found.buffers + size_of(model.buffers()),
    }
