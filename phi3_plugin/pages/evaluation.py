"""An evaluation as a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phi3_plugin import evaluate as words
from phi3_plugin.evaluate import (
    ADAPTER,
    BETTER,
    UNCLEAR,
    WORSE,
    Evaluation,
    Outcome,
    Result,
    changed,
    worst,
)
from phi3_plugin.pages import render

LONGEST = 4000
"""Characters that are shown of a text."""

SHOWN = {"numeric": "right number", "exact": "exact", "rougeL": "ROUGE-L", "chrf": "chrF"}
"""Scores of an answer that are shown beside it."""

CLASSES = {BETTER: "none", WORSE: "stop", UNCLEAR: ""}


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
    said, kind = words.verdict(found)
    return render(
        "evaluation.html.j2",
        evaluation=evaluation,
        found=found,
        both=ADAPTER in evaluation.outcomes,
        names=list(evaluation.outcomes),
        verdict=said,
        kind=CLASSES.get(kind, ""),
        classes=CLASSES,
        tiles=list(_tiles(evaluation)),
        facts=list(_facts(evaluation)),
        endings=words.endings(evaluation),
        sections=list(_sections(evaluation, count)),
        value=words.value,
        interval=words.interval,
        percent=words.percent,
    )


def _tiles(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield "Samples", f"{len(evaluation.samples):,}"
    yield "Labelled tokens", f"{sum(sample.tokens for sample in evaluation.samples):,}"
    if asked := len(evaluation.asked):
        each = " of each model" * (ADAPTER in evaluation.outcomes)
        yield f"Answers{each}", f"{asked:,}"


def _sections(evaluation: Evaluation, count: int) -> Iterator[tuple[str, str, list[Card]]]:
    """Yield title, explanation and samples of each list."""
    gained, lost = changed(evaluation, count)
    last = list(evaluation.outcomes)[-1]
    parts = [
        ("Gained most", "Samples that the adapter answers better than the base.", gained),
        ("Lost most", "Samples that the adapter answers worse than the base.", lost),
        ("Worst answers", f"Of the {last}.", worst(evaluation, count)),
    ]
    for title, note, samples in parts:
        if samples:
            yield title, note, [_card(evaluation, i) for i in samples]


def _card(evaluation: Evaluation, i: int) -> Card:
    sample = evaluation.samples[i]
    answers = [(name, *_answer(seen[i])) for name, seen in evaluation.outcomes.items()]
    return Card(sample.where, _cut(sample.prompt), _cut(sample.reference), answers)


def _answer(outcome: Outcome) -> tuple[str, str]:
    said = outcome.said
    assert said is not None  # only samples that were answered are shown
    scores = [_score(key, value) for key, value in said.scores.values.items() if key in SHOWN]
    ended = [] if said.ended == "stop" else [f"cut ({said.ended})"]
    loss = [f"loss {outcome.loss / outcome.tokens:.3f}"] if outcome.tokens else []
    return " · ".join([*scores, *loss, *ended]), _cut(said.text)


def _score(key: str, value: float) -> str:
    if key in ("numeric", "exact"):
        return f"{SHOWN[key]}: {'yes' if value else 'no'}"
    return f"{SHOWN[key]} {value:.1f}"


def _cut(text: str) -> str:
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]}… {more:,} more characters in samples.jsonl"


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield what decided the numbers, a line each."""
    for name, value in evaluation.facts.items():
        if name != "evaluated":  # which stands at the top
            yield name, _written(value)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return "null" if value is None else str(value)
