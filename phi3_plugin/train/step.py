"""One optimizer step: count first, divide once, look before the weights move."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phi3_plugin.train.losses import Batch, with_targets
from phi3_plugin.train.world import World

Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch with targets) -> loss, summed over the targets."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all processes and micro-batches."""

    loss: float
    """Mean over all labelled tokens."""
    tokens: int
    """Labelled tokens."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    moved: bool
    """False if the weights were left alone: loss or norm was not finite, or nothing labelled."""

    @property
    def problem(self) -> str | None:
        """Why the weights were left alone."""
        if self.moved:
            return None
        return "loss or gradient is not finite" if self.tokens else "no token has a label"


def train_step(
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    batches: Sequence[Batch],
    max_norm: float | None,
) -> StepResult:
    """Accumulate over the micro-batches of this process, then move the weights once.

    Args:
        world: All processes; each brings as many micro-batches.
        model: On this process's device.
        optimizer: Over the trained parameters.
        loss: Sums over labelled tokens.
        batches: Micro-batches with ``labels``.
        max_norm: Clip the gradient to this norm; None only measures it.
    """
    batches = [ready(batch, world.device) for batch in batches]
    own = sum(len(batch["targets"]) for batch in batches)
    count = world.sum(torch.tensor(own, device=world.device))
    # Gradients are averaged over processes; each share is scaled up to undo that.
    share = world.size / count  # without a label not finite, so that the weights stay
    total = torch.zeros((), device=count.device)
    for i, batch in enumerate(batches):
        world.before_backward(model, last=i == len(batches) - 1)
        summed = loss(model, batch)
        (summed * share).backward()
        total += summed.detach()
    mean = (world.sum(total) / count).item()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    world.average_gradients(trained)
    limit = math.inf if max_norm is None else max_norm
    norm = world.whole(torch.nn.utils.clip_grad_norm_(trained, limit)).item()
    moved = math.isfinite(mean) and math.isfinite(norm)
    if moved:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean, int(count), norm, moved)


@torch.no_grad()
def validate(
    world: World, model: nn.Module, loss: Loss, batches: Iterable[Batch]
) -> tuple[float, int]:
    """Return the mean loss over every labelled token of all processes, and their number.

    Args:
        world: All processes; each must bring as many batches.
        model: Put into evaluation mode meanwhile.
        loss: Sums over labelled tokens.
        batches: This process's share of the validation set.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in (ready(batch, world.device) for batch in batches):
        total[0] += loss(model, batch).double()
        total[1] += len(batch["targets"])
    model.train(training)
    summed, count = world.sum(total).tolist()
    return summed / max(count, 1), int(count)


def ready(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with targets in place of labels, where the model is."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in with_targets(batch).items()
    }
