"""What losses of answers compare with: the model without its adapter, and all answers of a step.

The base is in memory as it is, so its log-probabilities take a forward pass over the same packed
row with the adapters off, and no second model. They never change, so they can also be computed
once, see `phi3_plugin.train.cached_reference`.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchtune.modules.peft import disable_adapter

from phi3_plugin.train.losses import Batch, Preference, predicted, summed
from phi3_plugin.train.world import World, exact


# Shapes: A answers
@torch.no_grad()
def compare(world: World, model: nn.Module, loss: Preference, batches: Sequence[Batch]) -> None:
    """Put beside the answers of a step what the loss compares them with.

    All of it is that of the whole step, so how it is split into batches and processes does not
    matter. Batches are given, as far as the loss needs them and they do not have them by now,
    ``reference [A]``, log p without the adapter; ``kl``, what answers to other questions gain by
    the adapter, their mean; and ``chosen_length``, labelled tokens of a chosen answer, their mean.

    Args:
        world: All processes; each brings as many batches.
        model: With adapters.
        loss: What it needs.
        batches: Ready ones.
    """
    if loss.compares:
        for batch in batches:
            add_reference(model, batch)
    sums = torch.zeros(2, dtype=exact(world.device), device=world.device)
    for batch in batches:
        if loss.mismatched:
            others = batch["mismatched"]
            add_reference(model, others)
            gains = summed(predicted(model, others), others) - others["reference"]
        if not len(batch["targets"]):  # it is there so that all processes have as many
            continue
        values = gains if loss.mismatched else batch["labelled"] * batch["wanted"]
        number = sums.new_full((), len(gains)) if loss.mismatched else batch["wanted"].sum()
        sums += torch.stack([values.to(sums.dtype).sum(), number.to(sums.dtype)])
    total, count = world.sum(sums)
    mean = (total / count).float()
    for batch in batches:
        batch.update({"kl": mean.clamp(min=0)} if loss.mismatched else {"chosen_length": mean})


def add_reference(model: nn.Module, batch: Batch) -> None:
    """Compute log p of a batch's answers without the adapter, if nobody has."""
    if "reference" not in batch:
        with disable_adapter(model):
            batch["reference"] = summed(predicted(model, batch), batch)
