"""How well a model predicts the labelled tokens of a batch, one by one.

The model works out its loss itself, some rows of logits at a time. Whoever listens at its head
sees those rows, so that nothing is computed twice and no more logits exist than in training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Shapes: N labelled tokens, n some of them, V vocabulary
@torch.no_grad()
def token_scores(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of each labelled token, ``[N]`` in fp32, and whether it was the likeliest.

    Args:
        model: A decoder that takes ``targets`` and ``rows``, and whose head is ``output``.
        batch: As training hands it to the model, where the model is.
    """
    targets = batch["targets"]
    losses, hits = [targets.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0).bool()]

    def look(module: nn.Module, given: Any, logits: Tensor) -> None:
        first = sum(map(len, losses))
        some = targets[first : first + len(logits)]
        losses.append(F.cross_entropy(logits.float(), some, reduction="none"))
        hits.append(logits.argmax(-1) == some)

    listening = _head(model).register_forward_hook(look)
    try:
        model(**batch)
    finally:
        listening.remove()
    return torch.cat(losses), torch.cat(hits)


def _head(model: nn.Module) -> nn.Module:
    head: Any = model.output
    # torchtune's tied head is no module; what it multiplies with is one
    return head if isinstance(head, nn.Module) else head.linear


def by_document(values: Tensor, batch: dict[str, Any]) -> list[float]:
    """Return the sum of a value of labelled tokens over each document of a batch.

    Args:
        values: ``[N]``
        batch: A row of documents, with ``lengths`` and ``rows``.
    """
    ends = torch.tensor(batch["lengths"], device=values.device).cumsum(0)
    documents = torch.searchsorted(ends, batch["rows"], right=True)
    sums = torch.zeros(len(ends), dtype=torch.float64, device=values.device)
    return list(sums.index_add_(0, documents, values.double()).tolist())
