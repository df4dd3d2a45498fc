"""An evaluation as a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phi3_plugin.evaluate import (
    ADAPTER,
    BETTER,
    UNCLEAR,
    WORSE,
    Evaluation,
    Outcome,
    Result,
    verdict,
)
from phi3_plugin.inspect import percent
from phi3_plugin.pages import render

LONGEST_TEXT = 4000
"""Characters that are shown of a text."""

SHOWN = {"numeric": "right number", "exact": "exact", "rougeL": "ROUGE-L", "chrf": "chrF"}
"""Scores of an answer that are shown beside it."""

CLASSES = {BETTER: "none", WORSE: "stop", UNCLEAR: "", "": ""}


class Card(NamedTuple):
    """One sample as the page shows it."""

    where: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, str]]
    """Model, what is said of its answer, and the answer."""


def page_of_evaluation(evaluation: Evaluation, found: Sequence[Result], *, count: int) -> str:
    """Return the page.

    Args:
        evaluation: What was evaluated.
        found: Its numbers.
        count: Answers that are shown of each kind.
    """
    sentence, kind = verdict(found)
    return render(
        "evaluation.html.j2",
        evaluation=evaluation,
        found=found,
        both=ADAPTER in evaluation.outcomes,
        names=list(evaluation.outcomes),
        verdict=sentence,
        kind=CLASSES[kind],
        classes=CLASSES,
        tiles=list(_tiles(evaluation)),
        # What was evaluated stands at the top
        facts=[(k, _written(v)) for k, v in evaluation.facts.items() if k != "evaluated"],
        endings=evaluation.endings_in_words(),
        sections=list(_sections(evaluation, count)),
        percent=percent,
    )


def _tiles(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield "Samples", f"{len(evaluation.samples):,}"
    yield "Labelled tokens", f"{sum(sample.labelled for sample in evaluation.samples):,}"
    if answers := len(evaluation.answered):
        each = " of each model" if ADAPTER in evaluation.outcomes else ""
        yield f"Answers{each}", f"{answers:,}"


def _sections(evaluation: Evaluation, count: int) -> Iterator[tuple[str, str, list[Card]]]:
    """Yield title, explanation and samples of each list."""
    gained, lost = evaluation.changed(count)
    last = list(evaluation.outcomes)[-1]
    parts = [
        ("Gained most", "Samples that the adapter answers better than the base.", gained),
        ("Lost most", "Samples that the adapter answers worse than the base.", lost),
        ("Worst answers", f"Of the {last}.", evaluation.worst(count)),
    ]
    for title, note, samples in parts:
        if samples:
            yield title, note, [_card(evaluation, i) for i in samples]


def _card(evaluation: Evaluation, i: int) -> Card:
    where, question = evaluation.samples[i].where, evaluation.samples[i].question
    answers = [(name, *_answer(seen[i])) for name, seen in evaluation.outcomes.items()]
    return Card(where, _cut(question.prompt), _cut(question.reference), answers)


def _answer(outcome: Outcome) -> tuple[str, str]:
    answer, scores = outcome.answer, outcome.scores
    assert answer and scores  # only samples that were answered are shown
    notes = []
    for key, score in scores.values.items():
        if key in ("numeric", "exact"):
            notes.append(f"{SHOWN[key]}: {'yes' if score else 'no'}")
        elif key in SHOWN:
            notes.append(f"{SHOWN[key]} {score:.1f}")
    if outcome.tokens:
        notes.append(f"loss {outcome.loss / outcome.tokens:.3f}")
    if answer.reason != "stop":
        notes.append(f"cut ({answer.reason})")
    return " · ".join(notes), _cut(answer.text)


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return (
        text if more <= 0 else f"{text[:LONGEST_TEXT]}… {more:,} more characters in samples.jsonl"
    )


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return "null" if value is None else str(value)
