"""How likely a model finds what follows some tokens: many documents side by side, no padding."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from phi3_plugin.errors import DataError
from phi3_plugin.evaluate.tokens import token_scores

log = logging.getLogger(__name__)

TOGETHER = 4096
"""Tokens that are scored at once, unless a number of documents is asked for."""

Document = tuple[int, ...]
"""The tokens that a model reads; what follows the last one is asked for as well."""
Score = tuple[float, bool]
"""The log-likelihood of a continuation, and whether each of its tokens was the likeliest."""


def inputs_of(name: Any, context: list[int], continuation: list[int], limit: int) -> Document:
    """Return what a model reads to score a continuation: all but its last token.

    Args:
        name: Of both, for messages.
        context: Tokens before it; the first ones are left out where all are too many.
        continuation: Its tokens.
        limit: Tokens that are read, at most.

    Raises:
        DataError: One of them has no token, or the continuation too many.
    """
    if not context or not 0 < len(continuation) <= limit:
        raise DataError(
            f"{name!r:.200} has {len(context)} tokens before and {len(continuation)} to score, "
            f"expected some of each and at most {limit} to score."
        )
    whole = context + continuation
    if len(whole) > limit + 1:
        log.warning("%s tokens are cut at the start.", len(whole) - limit - 1)
    return tuple(whole[-(limit + 1) : -1])


def batches(
    model: Any, documents: Iterable[Document], count: int | None
) -> Iterator[list[Document]]:
    """Yield documents that can be scored together; with LongRoPE those that turn alike.

    Args:
        model: torchtune's decoder as this package builds it.
        documents: In the order in which they are to be scored.
        count: How many at a time; None takes as many as have `TOGETHER` tokens.
    """
    batch, size = list[Document](), 0
    for document in documents:
        is_full = size + len(document) > TOGETHER if count is None else len(batch) == count
        if batch and (is_full or not model.turns_alike(len(batch[0]), len(document))):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


def scored(
    model: Any, documents: Sequence[Document], questions: Sequence[tuple[int, list[int]]]
) -> Iterator[Score]:
    """Yield how likely each continuation is.

    Args:
        model: torchtune's decoder as this package builds it.
        documents: A batch.
        questions: Number of a document, and the tokens that may follow at its end: the first of
            them follows so many tokens before the end that the last one follows the last.
    """
    lengths = [len(document) for document in documents]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    columns = {
        "tokens": [[token for document in documents for token in document]],
        "input_pos": [[place for length in lengths for place in range(length)]],
        "targets": [token for _, tokens in questions for token in tokens],
        "rows": [ends[at] - len(own) + i for at, own in questions for i in range(len(own))],
    }
    device = model.norm.scale.device
    batch: dict[str, Any] = {k: torch.tensor(v, device=device) for k, v in columns.items()}
    losses, hits = token_scores(model, {**batch, "lengths": lengths})
    counts = [len(tokens) for _, tokens in questions]
    own_losses, own_hits = losses.double().cpu().split(counts), hits.cpu().split(counts)
    for loss, hit in zip(own_losses, own_hits, strict=True):
        yield -float(loss.sum()), bool(hit.all())
