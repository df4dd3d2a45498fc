"""Where training starts: adapters that are drawn, or that are split off the base weight.

pissa    B A = the largest directions of W     base W - s B A     starts as W
loftq    B A = those of W - NF4(W)             base NF4(W)        starts nearer to W than NF4(W)
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.checks import FROM_BASE
from phi3_plugin.models.lora import LoRALinear, draw
from phi3_plugin.models.nf4 import Rows, nearest_nf4

A, B = "lora_a.weight", "lora_b.weight"


# Shapes: R rank
def initial_adapter(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the adapter's starting values, whole and in fp32, by parameter name.

    They depend on seed and name alone, not on how many processes share the model or on what else
    was drawn before. A magnitude of zero asks ``initialize_dora_magnitude`` to set it.

    Args:
        model: May be on the meta device, or sharded.
        seed: Of the run.
    """
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            drawn = B if isinstance(module, nn.Embedding) else A
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{name}.{drawn}".encode()))
            value = torch.empty(module.get_parameter(drawn).shape)
            if drawn == B:
                value.normal_(generator=generator)
            else:
                draw(value, module.init, generator)
            names = [n for n in (A, B, "magnitude") if n in dict(module.named_parameters())]
            shapes = {n: module.get_parameter(n).shape for n in names}
            values |= {f"{name}.{n}": torch.zeros(shape) for n, shape in shapes.items()}
            values[f"{name}.{drawn}"] = value
    return values


def split_names(model: nn.Module) -> list[str]:
    """Return the modules whose adapter is split off the base weight, in an order of their own."""
    return [n for n, m in model.named_modules() if getattr(m, "init", None) in FROM_BASE]


@torch.no_grad()
def split(module: LoRALinear, weight: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A ``[R, in]`` and B ``[out, R]``, as the adapter's precision holds them, in fp32.

    Args:
        module: With ``lora_init`` pissa or loftq; may be on the meta device.
        weight: Its base weight ``[out, in]``, whole.
        device: Where to compute.

    Raises:
        AdapterError: The rank is larger than the weight is wide.

    Source: Meng et al. 2024, PiSSA, section 3; Li et al. 2023, LoftQ, algorithm 1 with T = 1.
    """
    whole = weight[0 : weight.shape[0]].to(device)
    target = whole.float()
    if module.init == "loftq":
        target = target - nearest_nf4(whole)
    a, b = nearest(target.double() / module.scaling, module.rank)
    dtype = module.lora_a.weight.dtype
    return tuple(value.to(dtype).float().cpu() for value in (a, b))  # type: ignore[return-value]


def nearest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[R, in]`` and B ``[out, R]`` whose product B A is nearest to a weight.

    B has the left singular vectors and A the right ones, each times the root of the value. They
    come from the smaller Gram matrix: in fp64 that loses nothing that fp32 can hold, takes a
    fraction of the time, and gives all processes the same.

    Args:
        weight: ``[out, in]`` in fp64.
        rank: R.

    Raises:
        AdapterError: The weight has no so many singular values.
    """
    if rank > min(weight.shape):
        raise AdapterError(
            f"lora_rank: {rank} is more than a weight of {' x '.join(map(str, weight.shape))} "
            "has singular values. Use a smaller one, or lora_init: kaiming."
        )
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].flip(1)
    # A vector and its negative serve alike: let the largest element be positive.
    largest = right.gather(0, right.abs().argmax(0, keepdim=True))
    right = right * torch.where(largest < 0, -1.0, 1.0)
    left = tall @ right
    root = left.norm(dim=0).clamp_min(torch.finfo(weight.dtype).tiny).sqrt()
    left, right = left / root, right * root
    b, a = (left, right) if tall is weight else (right, left)
    return a.T.contiguous(), b.contiguous()


@dataclass(frozen=True)
class Residual:
    """What PiSSA leaves of a base weight, ``W - s B A``, worked out when rows are read."""

    weight: Rows
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        """In which the rows are given."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(self.weight.shape)

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return consecutive rows."""
        return self.weight[rows].float() - self.scaling * (self.b[rows] @ self.a)


def for_original_base(adapter: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter of twice the rank that computes the same over the original weights.

    ``W - s B0 A0 + s B A`` is W and an adapter ``[B, B0] [A; -A0]`` of the same scale.

    Args:
        adapter: By parameter name, over what PiSSA left of the weights.
        first: A0 and B0, by the same names.
    """
    joined = dict(adapter)
    for name, value in first.items():
        own = adapter[name]
        start = value.to(own.dtype)
        both = [own, -start] if name.endswith(A) else [own, start]
        joined[name] = torch.cat(both, dim=0 if name.endswith(A) else 1)
    return joined


def halves(
    joined: dict[str, Tensor], modules: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo :func:`for_original_base` bit for bit.

    Args:
        joined: What it returned.
        modules: Those that PiSSA started.

    Returns:
        The adapter, and A0 and B0.
    """
    adapter, first = dict(joined), dict[str, Tensor]()
    for name in (f"{module}.{part}" for module in modules for part in (A, B)):
        if name in joined:  # what is missing is for the caller to find
            own, start = joined[name].chunk(2, dim=0 if name.endswith(A) else 1)
            adapter[name] = own.contiguous()
            first[name] = (-start if name.endswith(A) else start).float().contiguous()
    return adapter, first


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """Return by module what B A is multiplied with."""
    return {n: float(m.scaling) for n, m in model.named_modules() if hasattr(m, "lora_a")}
