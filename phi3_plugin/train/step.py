"""One optimizer step: count first, divide once, look before the weights move."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.train.losses import Batch, Loss
from phi3_plugin.train.world import World


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

    Where loss or gradient is not finite, as without any label, the weights stay.

    Args:
        world: All processes; each brings as many micro-batches.
        model: On this process's device.
        optimizer: Over the trained parameters.
        loss: A sum over labelled tokens.
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
        summed = loss(model(**batch), batch)
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
        loss: A sum over labelled tokens.
        batches: This process's share of the validation set.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in (ready(batch, world.device) for batch in batches):
        total[0] += loss(model(**batch), batch).double()
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


# Shapes: B batch, S sequence, N labelled tokens
def with_targets(batch: Batch) -> Batch:
    """Return a batch that says what is predicted and where, in place of its labels.

    On the CPU, before it goes to the model: a GPU would have to be asked how many there are.

    Args:
        batch: ``labels [B, S]`` at their own tokens' places, -100 where there is none, and what
            the model takes.

    Returns:
        ``targets [N]``, the labels; ``rows [N]``, which tokens predict them, counted over all of
        B and S; and the rest of the batch.
    """
    # Each label at the token that predicts it; the last token of a row predicts nothing
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return {**rest, "targets": labels[rows], "rows": rows}
