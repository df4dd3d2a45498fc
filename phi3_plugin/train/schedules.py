"""Learning-rate schedules that survive a resume under torchtune's recipes."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup


def cosine_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Return torchtune's cosine schedule, set to the step that the optimizer has reached.

    The stock recipes resume with ``last_epoch=-1`` unless ``max_steps_per_epoch`` cuts the epoch
    short, and so would repeat the warm-up. The restored optimizer knows better.

    Args:
        optimizer: New, or restored from a checkpoint.
        num_warmup_steps: Steps over which the rate rises from 0.
        num_training_steps: Steps of the whole run.
        last_epoch: Steps already made, less one, if the recipe knows.
    """
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
