"""How far apart two adapters are, module by module."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import MAGNITUDE, A, Adapter, B
from phi3_plugin.checkpoint.served import Served, served
from phi3_plugin.config import Phi3Config

# Shapes: R the ranks of both adapters together


@dataclass(frozen=True)
class Difference:
    """What two adapters have on one module."""

    module: str
    """Our name of a whole layer, or of what is trained whole."""
    relative: float | None
    """Norm of the difference of what both add to the weight, as a part of the larger of the two
    norms: 0 is the same, 2 the opposite. None if only one of them has the module."""
    only_in: int | None = None
    """0 or 1 if only the first or the second has it."""
    magnitude: float | None = None
    """The same of the magnitudes of DoRA; 1 if only one of them is a DoRA."""


def differences(
    one: Adapter, other: Adapter, config: Phi3Config, row_norms: Callable[[str], Tensor]
) -> list[Difference]:
    """Compare two adapters of one base; parts of a layer are compared as the layer.

    Args:
        one: Our names.
        other: Our names.
        config: Sizes of the base model.
        row_norms: See :func:`phi3_plugin.checkpoint.split.fuse_adapter`.

    Raises:
        AdapterError: One of them is empty, or no file can hold it.
    """
    pair = [served(adapter, config, row_norms, patterns=True) for adapter in (one, other)]
    names = dict.fromkeys(name for adapter in pair for name in adapter.ranks)
    out = [_of_module(name, *pair) for name in names]
    for name in dict.fromkeys([*one.saved, *other.saved]):
        if name in one.saved and name in other.saved:
            out.append(Difference(name, _relative(one.saved[name], other.saved[name])))
        else:
            out.append(Difference(name, None, only_in=int(name not in one.saved)))
    return out


def product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of ``b [out, R] @ a [R, in]`` without making it where R is small.

    With b = Q S and a^T = P T, both by QR, it is the norm of S T^T, which is ``[R, R]``.
    """
    b, a = b.double(), a.double()
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return float((b @ a).norm())
    (s, t) = (torch.linalg.qr(matrix, mode="r").R for matrix in (b, a.T))
    return float((s @ t.T).norm())


def _of_module(name: str, one: Served, other: Served) -> Difference:
    if name not in one.ranks or name not in other.ranks:
        return Difference(name, None, only_in=int(name not in one.ranks))
    (b1, a1), (b2, a2) = (_factors(name, adapter) for adapter in (one, other))
    magnitude = _of_magnitudes(*(adapter.tensors.get(name + MAGNITUDE) for adapter in (one, other)))
    if torch.equal(a1, a2) and torch.equal(b1, b2):
        return Difference(name, 0.0, magnitude=magnitude)
    apart = product_norm(torch.cat([b1, -b2], dim=1), torch.cat([a1, a2]))
    larger = max(product_norm(b1, a1), product_norm(b2, a2))
    return Difference(name, apart / larger if larger else 0.0, magnitude=magnitude)


def _of_magnitudes(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None:
        return None if one is other else 1.0  # without one the weight keeps what norms it has
    return _relative(one, other)


def _factors(name: str, adapter: Served) -> tuple[Tensor, Tensor]:
    """Return B with the scale in it, and A, in fp64."""
    divisor = adapter.ranks[name] ** (0.5 if adapter.rslora else 1)
    scale = adapter.alphas[name] / divisor
    return adapter.tensors[name + B].double() * scale, adapter.tensors[name + A].double()


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    if one.shape != other.shape:
        return float("inf")
    larger = max(one.norm(), other.norm())
    return float((one - other).norm() / larger) if larger else 0.0
