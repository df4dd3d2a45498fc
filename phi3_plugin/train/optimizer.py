"""What a checkpoint keeps of an optimizer, and which optimizers fit which processes.

8-bit optimizers keep tensors that are made of others: codes, scales and a table. Those are shared
out, gathered and copied part by part here, since they know few of torch's functions.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from phi3_plugin.errors import CheckpointError, ConfigError

AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
"""What optimizers keep of each value of a parameter: torch's and torchao's, and bitsandbytes'."""

SMALLEST = 4096
"""Values that one process must have of a tensor for torchao to quantize what belongs to it."""


def kind(optimizer: Optimizer) -> str:
    """Return the class of an optimizer, spelled out."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def check_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Refuse a state that another kind of optimizer left, or another model: steps would crash.

    Args:
        optimizer: That is to go on.
        parameters: By name, whole or sharded.
        state: ``kind`` is the :func:`kind` of the one that left it, missing where an earlier
            release saved it; ``state`` is what is kept of each parameter, by the same name.

    Raises:
        CheckpointError: Kind or sizes differ.
    """
    advice = "Use the {} the run was started with, or start anew in another output_dir."
    if state.get("kind") not in (None, kind(optimizer)):
        raise CheckpointError(
            f"resume: the optimizer would change from {state['kind']} to {kind(optimizer)}. "
            + advice.format("one")
        )
    for name, kept in state["state"].items():
        shape = parameters[name].shape if name in parameters else None
        for value in (kept[key] for key in AVERAGES if key in kept):
            if value.shape != shape:
                raise CheckpointError(
                    f"resume: the optimizer's state of {name} is {tuple(value.shape)}, but the "
                    f"model has {shape and tuple(shape)}. " + advice.format("model settings")
                )


def check_shards(optimizer: Optimizer, names: Iterable[tuple[str, Tensor]], shards: int) -> None:
    """Refuse low-bit states that torchao cannot share out, before anything is trained.

    Args:
        optimizer: Of any kind; torchao's have a block size.
        names: Of the parameters, with the parameters; ``[rows, ...]``.
        shards: Processes that share the rows.

    Raises:
        ConfigError: They would have different numbers of them, or of another precision than fp32.
    """
    for name, parameter in names if shards > 1 and hasattr(optimizer, "block_size") else ():
        if problem := _obstacle(parameter, shards):
            raise ConfigError(
                f"optimizer._component_: {kind(optimizer)} cannot share its states out over "
                f"{shards} processes: {name} {problem}, set fsdp_replicas={shards}, or use "
                "torch.optim.AdamW."
            )


def _obstacle(parameter: Tensor, shards: int) -> str | None:
    rows = parameter.shape[0]
    most = -(-rows // shards) * (parameter.numel() // rows)
    if not parameter.requires_grad or most < SMALLEST:
        return None
    if rows % shards:
        return f"has {rows} rows. Choose a lora_rank that is a multiple"
    if parameter.dtype != torch.float32:
        # torch compiles no step: the shards' states call themselves fp32, the whole ones do not.
        return f"is {parameter.dtype}. Set adapter_dtype=fp32 or dtype=fp32"
    return None


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Set the learning rate of each group; torchao's optimizers keep it as a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate


def copied(value: Any, whole: Callable[[Tensor], Tensor], *, keep: bool) -> Any:
    """Copy a state to the CPU.

    Args:
        value: The state or a part of it.
        whole: Gathers a sharded tensor.
        keep: Whether this process keeps the copy; all must make it.
    """
    if isinstance(value, dict):
        return {key: copied(part, whole, keep=keep) for key, part in value.items()}
    if isinstance(value, list):
        return [copied(part, whole, keep=keep) for part in value]
    if not isinstance(value, Tensor):
        return value
    copy = _copy(whole(value))
    return copy if keep else None


def filled(own: Any, saved: Any, fill: Callable[[Any, Any], Any]) -> Any:
    """Put a saved state into one that this process made.

    Args:
        own: A new optimizer's state, or a part of it.
        saved: The same part, whole.
        fill: Puts one saved value into its place and returns the place.
    """
    if isinstance(saved, dict):
        return {key: filled(own.get(key), value, fill) for key, value in saved.items()}
    return fill(own, saved)


def _copy(value: Tensor) -> Tensor:
    if not hasattr(value, "__tensor_flatten__"):
        return value.to("cpu", copy=True)
    names, rest = value.__tensor_flatten__()
    # Gathered parts may still be on their way, and their copies wait for them.
    parts = {name: getattr(value, name).to("cpu", copy=True) for name in names}
    copy: Tensor = value.__tensor_unflatten__(parts, rest, value.shape, value.stride())  # type: ignore[attr-defined]
    return copy
