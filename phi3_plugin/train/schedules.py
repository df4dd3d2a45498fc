"""Learning-rate schedules that survive a resume under torchtune's recipes.

Each rises from 0 over the warm-up; the step decides what follows. The stock recipes resume with
``last_epoch=-1`` unless ``max_steps_per_epoch`` cuts the epoch short, and so would repeat the
warm-up. The restored optimizer knows better.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from phi3_plugin.errors import ConfigError


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
