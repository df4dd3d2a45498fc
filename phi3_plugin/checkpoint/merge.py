"""An adapter put into the weights it was trained on."""

from collections.abc import Mapping

from torch import Tensor

from phi3_plugin.checkpoint.peft import A, B
from phi3_plugin.errors import AdapterError

MAGNITUDE = ".magnitude"


def merged(
    weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return the weights of a model that computes what base and adapter compute.

    Sums are made in fp32 and rounded once, to the base's dtype.

    Args:
        weights: Of the base, our names.
        adapter: Our names; ``lora_a [R, in]``, ``lora_b [out, R]``, for DoRA ``magnitude [out]``.
        scale: alpha / rank.

    Raises:
        AdapterError: It adapts a layer that the base does not have, or of another shape.

    Source: Hu et al. 2021, LoRA, section 4.1; Liu et al. 2024, DoRA, equation 5.
    """
    out = dict(weights)
    for module in [name.removesuffix(A) for name in adapter if name.endswith(A)]:
        name, delta = f"{module}.weight", adapter[module + B].float() @ adapter[module + A].float()
        if name not in weights or weights[name].shape != delta.shape:
            found = list(weights[name].shape) if name in weights else "not there"
            raise AdapterError(
                f"{module}: the adapter is for a layer of {list(delta.shape)}, which in this base "
                f"is {found}. Merge it into the checkpoint it was trained on."
            )
        whole = weights[name].float() + scale * delta
        if (magnitude := adapter.get(module + MAGNITUDE)) is not None:
            whole *= (magnitude.float() / whole.norm(dim=1))[:, None]
        out[name] = whole.to(weights[name].dtype)
    return out
