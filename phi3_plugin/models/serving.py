"""Linear layers of a model that only answers: laid out for few rows at a time.

On a CPU a token costs as much time as reading every weight once takes, and that takes longest from
plain rows. oneDNN's own layout of them gives the same products, bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from phi3_plugin.models.lora import DoRALinear, Linear, LoRALinear, row_norms
from phi3_plugin.models.lora_linear import Adapter
from phi3_plugin.models.merged import MergedLoRALinear
from phi3_plugin.models.nf4 import is_nf4
from phi3_plugin.models.nf4_product import nf4_linear


# Shapes: N tokens, I input, O output, R rank
class ServedLinear(nn.Module):
    """What a linear layer with or without adapters computes, without a way back.

    The adapters stay beside the weight: they are not merged.
    """

    def __init__(
        self, weight: Tensor, is_laid_out: bool, adapters: list[Adapter], stretch: Tensor | None
    ) -> None:
        """Take a weight and what is added to its products.

        Args:
            weight: ``[O, I]``, plain or NF4, or as :func:`laid_out` returns it.
            is_laid_out: Which of them.
            adapters: For rows of it that do not overlap.
            stretch: What each row is multiplied with in the end, ``[O]``.
        """
        super().__init__()
        self.weight, self.is_laid_out = weight, is_laid_out
        self.starts = [adapter.start for adapter in adapters]
        dtype = weight.dtype
        self.a = [adapter.a.detach().to(dtype) for adapter in adapters]
        self.b = [(adapter.b.detach() * adapter.scaling).to(dtype) for adapter in adapters]
        self.stretch = stretch

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., I]`` to ``[..., O]``."""
        flat = x.flatten(0, -2)
        out = self._base(flat)
        for start, a, b in zip(self.starts, self.a, self.b, strict=True):
            out[:, start : start + len(b)].addmm_(flat @ a.t(), b.t())
        if self.stretch is not None:
            out = (self.stretch * out).to(out.dtype)
        return out.view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        if not self.is_laid_out:
            return nf4_linear(x, self.weight) if is_nf4(self.weight) else F.linear(x, self.weight)
        plain: Any = x, self.weight, None, "none", [], ""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(*plain)
        return out


def laid_out(weight: Tensor) -> tuple[Tensor, bool]:
    """Return a weight as the CPU reads it fastest, and whether that is another layout."""
    weight = weight.detach()
    plain = weight.device.type == "cpu" and not is_nf4(weight) and not hasattr(weight, "placements")
    if not plain or not _has_layout(weight.dtype):
        return weight, False
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1), True


def _has_layout(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def serve(*models: nn.Module) -> None:
    """Make loaded models ready to answer, in place; they can be neither trained nor saved then.

    Args:
        *models: torchtune's decoders as this package builds them, with their weights. Those that
            share weights, such as a base and the same with an adapter, still share them then.
    """
    for path, name in dict.fromkeys(place for model in models for place in _places(model)):
        parents = [model.get_submodule(path) for model in models]
        found = [(parent, _linear(getattr(parent, name))) for parent in parents]
        layers = [(parent, layer) for parent, layer in found if layer is not None]
        laid = dict[int, tuple[Tensor, bool]]()  # by weight, while the layers hold it
        for _, layer in layers:
            if id(layer.weight) not in laid:
                laid[id(layer.weight)] = laid_out(layer.weight)
        for parent, layer in layers:
            setattr(parent, name, served(layer, laid[id(layer.weight)]))
    for model in models:
        model.eval().requires_grad_(False)


@torch.no_grad()
def served(layer: Any, laid: tuple[Tensor, bool] | None = None) -> ServedLinear:
    """Return what stands for a linear layer.

    Args:
        layer: With or without adapters, or a head that is tied to the embedding.
        laid: Its weight as :func:`laid_out` returns it.
    """
    weight, stretch, adapters = layer.weight, None, list[Adapter]()
    if isinstance(layer, MergedLoRALinear):
        adapters = layer.active()
    elif isinstance(layer, LoRALinear) and not layer.disabled:
        adapters = [layer.adapter()]
        if isinstance(layer, DoRALinear):
            factors = layer.lora_a.weight, layer.lora_b.weight
            stretch = layer.magnitude / row_norms(weight, *factors, layer.scaling)
    return ServedLinear(*(laid or laid_out(weight)), adapters, stretch)


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the paths of the modules that have a linear layer, and its name there."""
    for path, parent in model.named_modules():
        yield from ((path, name) for name, child in parent.named_children() if _linear(child))
    yield "", "output"  # which is no module where it is tied


def _linear(layer: Any) -> Any:
    """Return what is to be served of a layer; None where that is nothing, or is done."""
    if isinstance(layer, TiedLinear):
        return layer.tied_module
    return layer if isinstance(layer, Linear | LoRALinear) else None
