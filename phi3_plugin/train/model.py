"""The model of a run, before its weights: what is trained, in which precision, what recomputes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import get_act_offloading_ctx_manager

from phi3_plugin.models.new_tokens import add_new_tokens
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.settings import Settings
from phi3_plugin.train.data import instantiate


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters; without any, all of it is trained."""
    return bool(get_adapter_params(model))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def model_of(s: Settings, new_tokens: Sequence[int]) -> nn.Module:
    """Return the model that a run's settings name, with rows for new tokens.

    Args:
        s: Of the run.
        new_tokens: Their ids, one after the other.

    Raises:
        ConfigError: The model takes no such rows.
    """
    model: nn.Module = instantiate(s.model)
    if new_tokens:
        add_new_tokens(model, new_tokens)
    return model


def prepare(
    model: nn.Module,
    *,
    adapter_dtype: str | None = None,
    recompute_every: int = 0,
    recompute_first: int = 0,
    offload: bool = False,
    compiled: bool = False,
    neftune_alpha: float | None = None,
) -> nn.Module:
    """Decide what is trained, in which precision, what is recomputed and what is compiled.

    Args:
        model: torchtune's decoder; may be on the meta device.
        adapter_dtype: Of the adapters, if not the model's.
        recompute_every: Recompute every n-th layer in the backward pass; 0 recomputes none.
        recompute_first: Recompute so many layers from the first on.
        offload: Keep what the backward pass needs in the CPU's memory; a GPU must be there.
        compiled: Compile each layer.
        neftune_alpha: Of the noise on embeddings in training; see `phi3_plugin.models.neftune`.
    """
    model.neftune_alpha = neftune_alpha  # type: ignore[assignment]
    adapter = get_adapter_params(model)
    if adapter:
        set_trainable_params(model, adapter)
    if adapter_dtype is not None:
        for parameter in adapter.values():
            parameter.data = parameter.data.to(PRECISIONS[adapter_dtype])
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
        if compiled:  # within what recomputes, which the compiler does not look into from outside
            # For any number of tokens at once: rows of documents have another each time
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if i < recompute_first or (recompute_every and i % recompute_every == 0):
            recompute(layer)
    if offload:
        model.forward = _offloading(model)
    return model


def recompute(layer: nn.Module) -> None:
    """Let a layer keep its input alone, and compute the rest again in the backward pass."""
    # Around forward alone: a wrapper module would rename every parameter.
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _offloading(model: nn.Module) -> Callable[..., Any]:
    # The loss is worked out inside; torchtune leaves what the head keeps for it where it is.
    elsewhere, forward = get_act_offloading_ctx_manager(model, True), model.forward

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with elsewhere:
            return forward(*args, **kwargs)

    return offloading
