"""Optimizers and learning-rate schedules, and what a checkpoint keeps of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from phi3_plugin.errors import CheckpointError, ConfigError

# Learning-rate schedules that survive a resume under torchtune's recipes.
#
# Each rises from 0 over the warm-up; the step decides what follows. The stock recipes resume with
# ``last_epoch=-1`` unless ``max_steps_per_epoch`` cuts the epoch short, and so would repeat the
# warm-up. The restored optimizer knows better.


def cosine_with_warmup(
    optimizer: Optimizer,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Return torchtune's cosine schedule, set to the step that the optimizer has reached.

    Args:
        optimizer: New, or restored from a checkpoint.
        num_training_steps: Steps of the whole run.
        num_warmup_steps: Steps over which the rate rises from 0.
        warmup_ratio: The same as a share of all steps, rounded up, if the number is not given.
            The last step is never part of it: a run of one step would have a rate of 0.
        last_epoch: Steps already made, less one, if the recipe knows.

    Raises:
        ConfigError: The share is not between 0 and 1.
    """
    scheduler: LambdaLR = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=_warmup(num_training_steps, num_warmup_steps, warmup_ratio),
        num_training_steps=num_training_steps,
        last_epoch=_reached(optimizer, last_epoch),
    )
    return scheduler


def linear_with_warmup(
    optimizer: Optimizer,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Return a schedule that falls to 0 in a line; see :func:`cosine_with_warmup`.

    Source: transformers 5.23 ``get_linear_schedule_with_warmup``.
    """
    warmup = _warmup(num_training_steps, num_warmup_steps, warmup_ratio)

    def left(step: int) -> float:
        return max(0, num_training_steps - step) / max(1, num_training_steps - warmup)

    return _schedule(optimizer, warmup, left, last_epoch)


def constant_with_warmup(
    optimizer: Optimizer,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Return a schedule that stays where its warm-up ends; see :func:`cosine_with_warmup`."""
    warmup = _warmup(num_training_steps, num_warmup_steps, warmup_ratio)
    return _schedule(optimizer, warmup, lambda _: 1.0, last_epoch)


def _schedule(
    optimizer: Optimizer, warmup: int, after: Callable[[int], float], last_epoch: int
) -> LambdaLR:
    factor = partial(_factor, warmup, after)
    return LambdaLR(optimizer, factor, _reached(optimizer, last_epoch))


def _factor(warmup: int, after: Callable[[int], float], step: int) -> float:
    return step / warmup if step < warmup else after(step)


def _warmup(total: int, steps: int | None, ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ConfigError(f"lr_scheduler.warmup_ratio: {ratio!r} must be from 0 to 1.")
    return max(0, min(math.ceil(total * ratio), total - 1)) if steps is None else steps


def _reached(optimizer: Optimizer, last_epoch: int) -> int:
    states: list[dict[str, Any]] = list(optimizer.state.values())
    made = max((int(state.get("step", 0)) for state in states), default=0)
    return max(last_epoch, made - 1)


# What a checkpoint keeps of an optimizer, and which optimizers fit which processes.
#
# 8-bit optimizers keep tensors that are made of others: codes, scales and a table. Those are shared
# out, gathered and copied part by part here, since they know few of torch's functions.

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
