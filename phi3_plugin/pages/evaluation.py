"""An evaluation as a page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_plugin.evaluate import (
    ADAPTER,
    BETTER,
    UNCLEAR,
    WORSE,
    Evaluation,
    Outcome,
    Result,
    Shares,
    verdict,
)
from phi3_plugin.pages import dotted, render
from phi3_plugin.pages.numbers import count, number, percent

FOLDED = ("rouge1", "rouge2", "rougeLsum")
"""Measures that tell little beside ROUGE-L."""

RIGHT = {"numeric": "right number", "exact": "exact match"}
"""What an answer is or is not; the first that a sample has ranks its answers."""
CLOSENESS = {"rougeL": "ROUGE-L", "chrf": "chrF"}

LONGEST_TEXT = 4000
"""Characters that are shown of a text."""

CLASSES = {BETTER: "none", WORSE: "stop", UNCLEAR: "", "": ""}
"""Of the page's style, by verdict."""


def page_of_evaluation(evaluation: Evaluation, results: Sequence[Result], *, most: int) -> str:
    """Return the page.

    Args:
        evaluation: What was evaluated.
        results: Its numbers.
        most: Answers that are shown of each kind.
    """
    both = ADAPTER in evaluation.outcomes
    sentence, kind = verdict(results)
    return render(
        "evaluation.html.j2",
        evaluation=evaluation,
        results=[result for result in results if result.measure.key not in FOLDED],
        folded=[result for result in results if result.measure.key in FOLDED],
        both=both,
        names=list(evaluation.outcomes),
        verdict=sentence,
        kind=CLASSES[kind],
        classes=CLASSES,
        tiles=list(_tiles(evaluation, results)),
        # What was evaluated stands at the top
        facts=[(key, text) for key, text in dotted(evaluation.facts) if key != "evaluated"],
        endings=evaluation.endings_in_words(),
        sections=list(_sections(evaluation, most)),
        shares=_shares,
        count=count,
    )


def _tiles(evaluation: Evaluation, results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Yield what is seen first: the loss, the measure that answers are ranked by, how many."""
    by_key = {result.measure.key: result for result in results}
    for key in ("loss", _chosen(by_key)):
        if result := by_key.get(key):
            values = [result.text(interval.value) for interval in result.models.values()]
            names = ", base → adapter" if len(values) > 1 else ""
            yield f"{result.measure.title}{names}", " → ".join(values)
    yield "Samples", number(len(evaluation.samples))
    yield "Labelled tokens", number(sum(sample.labelled for sample in evaluation.samples))
    if answers := len(evaluation.answered):
        yield (
            "Answers of each model" if len(evaluation.outcomes) > 1 else "Answers",
            number(answers),
        )


def _chosen(by_key: Mapping[str, Result]) -> str:
    """Return the measure that ranks answers first, if any is right by it; else the second one."""
    first = "numeric" if "numeric" in by_key else "exact"
    result = by_key.get(first)
    is_any_right = result and any(interval.value for interval in result.models.values())
    return first if is_any_right else "chrf"


def _shares(shares: Shares) -> str:
    """Return on how many samples the adapter is better, worse and equal, without what is none."""
    parts = shares._asdict().items()
    return ", ".join(f"{percent(share)} {name}" for name, share in parts if share)


def _sections(evaluation: Evaluation, most: int) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield title, explanation and samples of each list."""
    gained, lost = evaluation.changed(most)
    last, by = list(evaluation.outcomes)[-1], evaluation.ranked_by
    parts = [
        ("Gained most", f"The adapter's answer is better than the base's, by {by}.", gained),
        ("Lost most", f"The adapter's answer is worse than the base's, by {by}.", lost),
        ("Worst answers", f"Of the {last}, by {by}.", evaluation.worst(most)),
    ]
    for title, note, samples in parts:
        if samples:
            yield title, note, [_card(evaluation, i) for i in samples]


def _card(evaluation: Evaluation, i: int) -> dict[str, Any]:
    """Return a sample and what each model made of it, as the template shows them."""
    sample = evaluation.samples[i]
    answers = [(name, *_answer(outcomes[i])) for name, outcomes in evaluation.outcomes.items()]
    texts = {"prompt": _cut(sample.prompt), "reference": _cut(sample.reference)}
    changes = _changes([outcomes[i] for outcomes in evaluation.outcomes.values()])
    return {"where": sample.where, "change": changes, **texts, "answers": answers}


def _changes(outcomes: Sequence[Outcome]) -> str:
    """Return by what the answers to a sample were ranked, from base to adapter."""
    values = [outcome.scores.values for outcome in outcomes if outcome.scores]
    key, title = next((k, t) for k, t in RIGHT.items() if k in values[-1])
    right = " → ".join(_yes(one[key]) for one in values)
    return f"{title} {right} · chrF {' → '.join(number(one['chrf'], 1) for one in values)}"


def _yes(value: float) -> str:
    return "yes" if value else "no"


def _answer(outcome: Outcome) -> tuple[str, str]:
    """Return what is told beside an answer, and the answer."""
    answer, scores = outcome.answer, outcome.scores
    assert answer and scores  # only samples that were answered are shown
    values, notes = scores.values, list[str]()
    notes += [f"{title} {_yes(values[key])}" for key, title in RIGHT.items() if key in values]
    notes += [f"{title} {number(values[key], 1)}" for key, title in CLOSENESS.items()]
    if outcome.tokens:
        notes.append(f"loss {number(outcome.loss / outcome.tokens, 4)}")
    if answer.reason != "stop":
        notes.append(f"cut ({answer.reason})")
    return " · ".join(notes), _cut(answer.text)


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    if more <= 0:
        return text
    return f"{text[:LONGEST_TEXT]}… {more:,} more characters in samples.jsonl"
