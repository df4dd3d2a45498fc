"""What a model computes while a recipe holds it."""

import torch
from phi3_plugin.recipes.lora_finetune import Finetune
from torch import Tensor

BATCH = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(recipe: Finetune) -> Tensor:
    """Return fp32 logits ``[B, S, V]`` for `BATCH`."""
    recipe.model.eval()
    with torch.no_grad():
        out = recipe.model(BATCH).float()
    recipe.model.train()
    return out
