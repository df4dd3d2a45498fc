"""One optimizer step: count first, divide once, look before the weights move.

In fp16 the loss is multiplied by a scale, so that gradients do not round to zero on their way, and
they are divided by it before they are clipped. Where one of them is not finite it was too much: the
step is skipped and the scale halved. After 2000 steps without that it is doubled.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from phi3_plugin.data.collate import IGNORED
from phi3_plugin.device import Received, pinned, sent
from phi3_plugin.models.distillation import Teaching
from phi3_plugin.train.losses import SFT, Batch, Distill, Loss, Preference, Teacher, predicted
from phi3_plugin.train.optimizer import skips_by_itself, step_if
from phi3_plugin.train.reference import compare
from phi3_plugin.train.world import World, exact

UNSCALED = GradScaler(enabled=False)
"""What all but fp16 does with: nothing."""


def loss_scaler(dtype: str, device: torch.device) -> GradScaler:
    """Return what scales the loss of a run in this precision.

    Its rules are torch's own: 65536 at first, half of it after an overflow, twice as much after
    2000 steps without one.
    """
    return GradScaler(device.type, enabled=dtype == "fp16")


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all processes and micro-batches.

    A GPU may still be at it: whoever asks for a number other than the tokens waits for that.
    """

    tokens: int
    """Labelled tokens."""
    received: Received
    """Loss, norm and loss scale, and the means of a loss of answers."""
    told: "Measures" = field(compare=False)
    is_scaled: bool = False
    """Whether the loss was scaled, as in fp16."""

    @property
    def loss(self) -> float:
        """Mean over all labelled tokens; of a loss of answers over pairs, or answers."""
        return self.received.read()[0]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return self.received.read()[1]

    @property
    def measures(self) -> dict[str, float]:
        """What a loss tells beside itself, see `Preference.measured` and `Distill.measured`."""
        return self.told.named(self.received.read()[3:])

    @property
    def moved(self) -> bool:
        """False if the weights were left alone: loss or norm not finite, or nothing labelled."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def loss_scale(self) -> float | None:
        """By which the loss was multiplied, in fp16."""
        return self.received.read()[2] if self.is_scaled else None

    @property
    def overflowed(self) -> bool:
        """Whether the loss was scaled by too much: the next step does with half of that."""
        return self.is_scaled and not self.moved and math.isfinite(self.loss)

    @property
    def problem(self) -> str | None:
        """Why the weights were left alone."""
        if self.moved:
            return None
        if self.overflowed:
            return f"the gradient overflowed at a loss scale of {self.loss_scale:,.10g}"
        return "loss or gradient is not finite" if self.tokens else "no token has a label"


def train_step(
    world: World,
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    batches: Sequence[Batch],
    max_norm: float | None,
    scaler: GradScaler = UNSCALED,
    teacher: Teacher | None = None,
) -> StepResult:
    """Accumulate over the micro-batches of this process, then move the weights once.

    Where loss or gradient is not finite, as without any label, the weights stay. On a GPU nothing
    is waited for, if the optimizer can find that out there: the step returns before it is made.

    Args:
        world: All processes; each brings as many micro-batches.
        model: On this process's device.
        optimizer: Over the trained parameters.
        loss: A sum over labelled tokens, or a loss of answers.
        batches: Micro-batches with ``labels``.
        max_norm: Clip the gradient to this norm; None only measures it.
        scaler: Of the loss, see :func:`loss_scaler`; goes on with its next scale.
        teacher: Whom a loss learns from.
    """
    batches = [ready(batch, world.device) for batch in batches]
    own = sum(len(batch["targets"]) for batch in batches), count_of(loss, batches)
    tokens, count = world.totals(*own)
    measures = Measures(loss, world.device)
    if isinstance(loss, Preference):
        compare(world, model, loss, batches)
    asked = loss.asked if isinstance(loss, SFT) else {}
    # Gradients are averaged over processes; each share is scaled up to undo that.
    # Without a label it is not finite, so that the weights stay.
    share = world.size / count if count else math.inf
    total = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches):
        world.before_backward(model, last=i == len(batches) - 1)
        logps = predicted(model, batch, **asked, **_taught(teacher, batch))
        summed = loss(logps, batch)
        scaler.scale(summed * share).backward()
        total += summed.detach()
        measures.add(logps, batch)
    mean = world.sum(total) / count
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    world.average_gradients(trained)
    scaler.unscale_(optimizer)
    limit = math.inf if max_norm is None else max_norm
    norm = world.whole(torch.nn.utils.clip_grad_norm_(trained, limit))
    wide = exact(world.device)
    scale = scaler.scale(torch.ones((), device=world.device))
    numbers = torch.stack([x.to(world.device, wide) for x in (mean, norm, scale)])
    received = Received(torch.cat([numbers, measures.means(world)]))
    result = StepResult(tokens, received, measures, scaler.is_enabled())
    if skips_by_itself(optimizer):
        step_if(optimizer, numbers.isfinite().all())
    elif result.moved:
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return result


def _taught(teacher: Teacher | None, batch: Batch) -> dict[str, Teaching]:
    return {} if teacher is None else {"teaching": teacher(batch)}


class Measures:
    """What a loss tells beside itself, of all batches of all processes."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        """Begin; of cross entropy there is nothing to tell."""
        self._loss = loss if isinstance(loss, Preference | Distill) else None
        self._sums = torch.zeros((), dtype=exact(device), device=device)

    def add(self, logps: Tensor, batch: Batch) -> None:
        """Look at a batch, whose labelled tokens have this log p, [N]."""
        if self._loss is not None:
            self._sums = self._sums + self._loss.measure(logps.detach(), batch)

    def means(self, world: World) -> Tensor:
        """Return the means ``[measured]``; one over nothing is not a number."""
        if self._loss is None:
            return self._sums.new_empty(0)
        sums, counts = world.sum(self._sums).T.unbind()
        return sums / counts

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """Return the means as they are told."""
        if self._loss is None:
            return {}
        return self._loss.told(dict(zip(self._loss.measured, means, strict=True)))


def count_of(loss: Loss, batches: Iterable[Batch]) -> int:
    """Return of how many a loss is the mean: labelled tokens, pairs or answers."""
    if isinstance(loss, Preference):
        return sum(map(loss.count, batches))
    return sum(len(batch["targets"]) for batch in batches)


@torch.no_grad()
def validate(
    world: World,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    measured: dict[str, float] | None = None,
    teacher: Teacher | None = None,
) -> tuple[float, int]:
    """Return the mean loss over all that is held out for all processes, and over how much it is.

    That is a number of labelled tokens; of a loss of answers, of pairs or answers.

    Args:
        world: All processes; each must bring as many batches.
        model: Put into evaluation mode meanwhile.
        loss: As for :func:`train_step`.
        batches: This process's share of the validation set.
        measured: Is given what a loss tells beside itself.
        teacher: Whom a loss learns from.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=exact(world.device), device=world.device)
    measures = Measures(loss, world.device)
    batches = (ready(batch, world.device) for batch in batches)
    if isinstance(loss, Preference):
        batches = list(batches)
        compare(world, model, loss, batches)
    for batch in batches:
        logps = predicted(model, batch, **_taught(teacher, batch))
        total[0] += loss(logps, batch).to(total.dtype)
        total[1] += count_of(loss, [batch])
        measures.add(logps, batch)
    model.train(training)
    if measured is not None:
        measured.update(measures.named(measures.means(world).tolist()))
    summed, count = world.sum(total).tolist()
    return summed / max(count, 1), int(count)


def ready(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with targets in place of labels, where the model is."""
    return _each(awaiting(batch, device), lambda value: sent(value, device))


def awaiting(batch: Batch, device: torch.device) -> Batch:
    """Return what :func:`ready` needs of the CPU alone, so that another thread can do it."""
    if "targets" in batch:
        return batch
    batch = with_targets(batch)
    if "mismatched" in batch:
        batch["mismatched"] = with_targets(batch["mismatched"])
    return _each(batch, lambda value: pinned(value, device))


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch whose tensors are changed."""
    changed: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            changed[name] = change(value)
        else:
            changed[name] = _each(value, change) if isinstance(value, dict) else value
    return changed


# Shapes: B batch, S sequence, N labelled tokens
def with_targets(batch: Batch) -> Batch:
    """Return a batch that says what is predicted and where, in place of its labels.

    On the CPU, before it goes to the model: a GPU would have to be asked how many there are.

    Args:
        batch: ``labels [B, S]`` at their own tokens' places, -100 where there is none, and what
            the model takes.

    Returns:
        ``targets [N]``, the labels; ``rows [N]``, which tokens predict them, counted over all of
        B and S; ``weights [N]``, how much the loss counts each, where the batch has them; of
        answers ``labelled``, how many of these each has; and the rest of the batch.
    """
    # Each label at the token that predicts it; the last token of a row predicts nothing
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    rest = {key: value for key, value in batch.items() if key != "labels"}
    if "weights" in batch:
        rest["weights"] = F.pad(batch["weights"][:, 1:], (0, 1)).flatten()[rows]
    if "wanted" in batch:
        ends = torch.tensor(batch["lengths"]).cumsum(0)
        answer = torch.searchsorted(ends, rows, right=True)
        rest["labelled"] = torch.bincount(answer, minlength=len(ends))
    return {**rest, "targets": labels[rows], "rows": rows}
