"""Decisions about a new model and its optimizer, before any weight is there."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import get_act_offloading_ctx_manager

from phi3_plugin.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters; without any, all of it is trained."""
    return bool(get_adapter_params(model))


def prepare(
    model: nn.Module,
    *,
    adapter_dtype: str | None,
    recompute_every: int,
    compiled: bool,
    recompute_first: int = 0,
    offload: bool = False,
) -> nn.Module:
    """Decide what is trained, in which precision, what is recomputed and what is compiled.

    Args:
        model: torchtune's decoder; may be on the meta device.
        adapter_dtype: Of the adapters, if not the model's.
        recompute_every: Recompute every n-th layer in the backward pass; 0 recomputes none.
        compiled: Compile each layer.
        recompute_first: Recompute so many layers from the first on.
        offload: Keep what the backward pass needs in the CPU's memory; a GPU must be there.
    """
    adapter = get_adapter_params(model)
    if adapter:
        set_trainable_params(model, adapter)
    for parameter in adapter.values() if adapter_dtype else ():
        parameter.data = parameter.data.to(DTYPES[str(adapter_dtype)])
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
        if compiled:  # within what recomputes, which the compiler does not look into from outside
            layer.forward = torch.compile(layer.forward)
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


def refuse_other_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Check that weights are those of the model, before the first is read.

    Args:
        model: May be on the meta device, or sharded.
        weights: Anything with a shape, by parameter name.

    Raises:
        CheckpointError: Names or shapes differ; all are listed.
    """
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        lines = [f"{n}: the model has {ours.get(n)}, given is {theirs.get(n)}" for n in differing]
        raise CheckpointError("The weights do not fit the model:\n  " + "\n  ".join(lines))


def parameter_groups(
    model: nn.Module, rate: float | None, lora_plus_ratio: float | None
) -> list[dict[str, Any]]:
    """Return what the optimizer gets; with LoRA+ the B matrices of linear layers learn faster.

    Those of the embedding do not: there A is the one that starts at zero.

    Args:
        model: Knows what is trained.
        rate: Learning rate.
        lora_plus_ratio: Multiple of it for the B matrices.

    Source: Hayou et al. 2024, LoRA+, section 4.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not lora_plus_ratio or rate is None:
        return [{"params": [p for _, p in trained]}]
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in trained:
        is_fast = name.endswith("lora_b.weight") and not name.startswith("tok_embeddings.")
        groups[is_fast].append(parameter)
    return [{"params": groups[False]}, {"params": groups[True], "lr": rate * lora_plus_ratio}]
