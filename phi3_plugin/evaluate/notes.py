"""What a reader should know about the numbers before believing them."""

from collections.abc import Iterator, Mapping, Sequence

from phi3_plugin.evaluate.outcomes import BASE, Outcome, Sample

FEW = 30
"""Samples below which the intervals of a bootstrap are too narrow."""


def notes(samples: Sequence[Sample], outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return what limits the numbers, a sentence each."""
    return [*_few(samples), *_unasked(samples), *_unlabelled(samples), *_unreadable(outcomes)]


def _few(samples: Sequence[Sample]) -> Iterator[str]:
    if len(samples) == 1:
        yield "Only 1 sample, which has no interval and tells nothing about others."
    elif len(samples) < FEW:
        yield (
            f"Only {len(samples)} samples: the intervals are rough, and narrower than they should "
            "be."
        )


def _unasked(samples: Sequence[Sample]) -> Iterator[str]:
    reasons = {sample.unasked: sample for sample in reversed(samples) if sample.unasked}
    for reason, first in reversed(reasons.items()):
        count = sum(sample.unasked == reason for sample in samples)
        which = first.where if count == 1 else f"{count:,} samples, the first {first.where},"
        yield f"{which} {'was' if count == 1 else 'were'} not answered: {reason}."


def _unlabelled(samples: Sequence[Sample]) -> Iterator[str]:
    if count := sum(not sample.tokens for sample in samples):
        have = "has" if count == 1 else "have"
        yield f"{count:,} of {len(samples):,} samples {have} no labelled token, and so no loss."


def _unreadable(outcomes: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    scores = [outcome.said.scores for outcome in outcomes[BASE] if outcome.said]
    if count := sum(not one.readable for one in scores):
        yield (
            f"ROUGE finds no word in {count:,} of {len(scores):,} references, for it knows Latin "
            "letters and digits alone. Look at chrF."
        )
