"""What is kept of an evaluation: the samples, and what each model made of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_plugin.evaluate.scores import Scores

BASE, ADAPTER = "base", "adapter"
"""Names of the models."""


@dataclass(frozen=True)
class Sample:
    """What is asked."""

    where: str
    """Where it was read."""
    tokens: int
    """Labelled tokens."""
    prompt: str
    """As the model reads it; empty where nothing is asked."""
    reference: str
    """What the data set has as the answer."""
    unasked: str = ""
    """Why no answer was asked for; empty where one was."""


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    ended: str
    """``stop``, ``length``, ``time`` or ``context``."""
    tokens: int
    scores: Scores


@dataclass(frozen=True)
class Outcome:
    """What one model made of one sample."""

    loss: float
    """Summed over the labelled tokens."""
    hits: float
    """Labelled tokens that were the likeliest."""
    tokens: int
    """Labelled tokens."""
    said: Said | None = None


@dataclass(frozen=True)
class Evaluation:
    """All of it."""

    samples: Sequence[Sample]
    outcomes: Mapping[str, Sequence[Outcome]]
    """By :data:`BASE` and, where there is one, :data:`ADAPTER`; one a sample."""
    facts: Mapping[str, Any]
    """What was evaluated and how, in the words of the configuration."""
    notes: Sequence[str] = ()
    """What a reader should know about the numbers."""

    @property
    def last(self) -> Sequence[Outcome]:
        """What the model did that the evaluation is about."""
        return self.outcomes.get(ADAPTER, self.outcomes[BASE])

    @property
    def asked(self) -> list[int]:
        """The samples that were answered."""
        return [i for i, outcome in enumerate(self.last) if outcome.said]

    def endings(self) -> dict[str, dict[str, int]]:
        """Count, for each model, how its answers ended."""
        return {
            name: dict(Counter(one.said.ended for one in outcomes if one.said).most_common())
            for name, outcomes in self.outcomes.items()
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what is written of each sample."""
        for i, sample in enumerate(self.samples):
            line: dict[str, Any] = {"where": sample.where, "tokens": sample.tokens}
            line |= {"prompt": sample.prompt, "reference": sample.reference}
            if sample.unasked:
                line["not_answered"] = sample.unasked
            yield line | {name: _line(seen[i]) for name, seen in self.outcomes.items()}


def _line(outcome: Outcome) -> dict[str, Any]:
    mean = outcome.loss / outcome.tokens if outcome.tokens else None
    line: dict[str, Any] = {"loss": mean, "correct_tokens": int(outcome.hits)}
    if said := outcome.said:
        line |= {"answer": said.text, "ended": said.ended, "answer_tokens": said.tokens}
        line["scores"] = {name: round(value, 4) for name, value in said.scores.values.items()}
    return line
