"""The LoRA that comes closest to what a DoRA does, for runtimes that know no DoRA.

DoRA sets the norm of every row, so its change of a weight has no small rank: some of it is lost,
and how much is measured.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.merge import Rows, merged
from phi3_plugin.checkpoint.places import Change, changes_of
from phi3_plugin.config import Phi3Config
from phi3_plugin.errors import AdapterError

EXACT = 1024
"""Up to this many rows or columns the singular values are all computed; beyond, the largest."""

# Shapes: R the new rank, n rows that a module changes


def refit(
    adapter: Adapter, weights: Mapping[str, Rows], config: Phi3Config, rank: int
) -> tuple[Adapter, float]:
    """Replace every module that has a magnitude by the LoRA nearest to its change of the weights.

    Args:
        adapter: Our names.
        weights: Of the base, our names; read a module at a time.
        config: Sizes of the model.
        rank: R of the new modules; the others stay as they are.

    Returns:
        The adapter; and the size of what it leaves out, as a part of the size of all that the
        replaced modules change (Frobenius norms).

    Raises:
        AdapterError: There is no magnitude, the rank is not a whole number above 0 or more than
            the model is wide, or a module is not in the base.
    """
    _check(adapter, config, rank)
    tensors, scales, lost, all_of_it = dict(adapter.tensors), dict(adapter.scales), 0.0, 0.0
    for name, changes in changes_of(adapter, config).items():
        for change in changes:
            if tensors.pop(change.module + MAGNITUDE, None) is None:
                continue
            delta = _delta(weights, name, change)
            a, b = nearest(delta, rank)
            lost += (delta - b @ a).square().sum().item()
            all_of_it += delta.square().sum().item()
            ends = (b.T, a.T) if change.by_column else (a, b)
            tensors[change.module + A], tensors[change.module + B] = _like(ends, adapter, change)
            scales[change.module] = 1.0
    error = math.sqrt(lost / all_of_it) if all_of_it else 0.0
    return replace(adapter, tensors=tensors, scales=scales), error


def nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[R, in]`` and B ``[n, R]`` whose product B A is the nearest of that rank.

    Args:
        delta: ``[n, in]``.
        rank: R; more than ``delta`` has is filled with zeros.

    Source: Eckart and Young 1936; for large matrices Halko et al. 2011, algorithm 5.1.
    """
    kept = min(rank, *delta.shape)
    if min(delta.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what it tries is drawn at random
            u, s, v = torch.svd_lowrank(delta, q=min(2 * kept + 16, *delta.shape), niter=6)
        vh = v.T
    root = s[:kept].sqrt()
    a, b = root[:, None] * vh[:kept], u[:, :kept] * root
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, rank - kept)), pad(b, (0, rank - kept))


def _check(adapter: Adapter, config: Phi3Config, rank: int) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"refit_rank: {rank!r} must be a whole number above 0.")
    if rank > config.hidden_size:  # every layer has that many rows or columns
        raise AdapterError(f"refit_rank: {rank} is above {config.hidden_size}, which all is.")
    if not adapter.is_dora:
        raise AdapterError(
            "refit_rank: the adapter is no DoRA, so there is nothing to refit. Leave it out."
        )


def _delta(weights: Mapping[str, Rows], name: str, change: Change) -> Tensor:
    """Return what a module adds to its rows, ``[n, in]``."""
    if name not in weights:
        raise AdapterError(f"{change.module}: the base has no {name}. Use the adapter's own base.")
    before = weights[name][change.start : change.stop].float()
    if before.shape != (len(change.b), change.a.shape[1]):
        raise AdapterError(
            f"{change.module}: it is for {[len(change.b), change.a.shape[1]]} weights, which are "
            f"{list(before.shape)} in this base. Use the adapter's own base."
        )
    here = replace(change, rows=slice(0, len(before)))
    return torch.cat(list(merged(before, *before.shape, [here]))) - before


def _like(ends: tuple[Tensor, Tensor], adapter: Adapter, change: Change) -> tuple[Tensor, Tensor]:
    dtype = adapter.tensors[change.module + A].dtype
    return ends[0].to(dtype).contiguous(), ends[1].to(dtype).contiguous()
