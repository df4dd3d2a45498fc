"""Learning-rate schedules that survive a resume under torchtune's recipes."""

import math
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

    The stock recipes resume with ``last_epoch=-1`` unless ``max_steps_per_epoch`` cuts the epoch
    short, and so would repeat the warm-up. The restored optimizer knows better.

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
    if not 0 <= warmup_ratio <= 1:
        raise ConfigError(f"lr_scheduler.warmup_ratio: {warmup_ratio!r} must be from 0 to 1.")
    if num_warmup_steps is None:
        share = math.ceil(num_training_steps * warmup_ratio)
        num_warmup_steps = max(0, min(share, num_training_steps - 1))
    done = max(last_epoch, _steps_made(optimizer) - 1)
    scheduler: LambdaLR = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        last_epoch=done,
    )
    return scheduler


def _steps_made(optimizer: Optimizer) -> int:
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return max((int(state.get("step", 0)) for state in states), default=0)
