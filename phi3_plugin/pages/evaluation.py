"""An evaluation as a page."""

from collections.abc import Iterator, Sequence
from typing import Any

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
from phi3_plugin.pages import dotted, percent, render

LONGEST_TEXT = 4000
"""Characters that are shown of a text."""

CLASSES = {BETTER: "none", WORSE: "stop", UNCLEAR: "", "": ""}
"""Of the page's style, by verdict."""


def page_of_evaluation(evaluation: Evaluation, results: Sequence[Result], *, count: int) -> str:
    """Return the page.

    Args:
        evaluation: What was evaluated.
        results: Its numbers.
        count: Answers that are shown of each kind.
    """
    both = ADAPTER in evaluation.outcomes
    tiles = {
        "Samples": len(evaluation.samples),
        "Labelled tokens": sum(sample.labelled for sample in evaluation.samples),
    }
    if answers := len(evaluation.answered):
        tiles["Answers of each model" if both else "Answers"] = answers
    sentence, kind = verdict(results)
    return render(
        "evaluation.html.j2",
        evaluation=evaluation,
        results=results,
        both=both,
        names=list(evaluation.outcomes),
        verdict=sentence,
        kind=CLASSES[kind],
        classes=CLASSES,
        tiles=[(label, f"{number:,}") for label, number in tiles.items()],
        # What was evaluated stands at the top
        facts=[(key, text) for key, text in dotted(evaluation.facts) if key != "evaluated"],
        endings=evaluation.endings_in_words(),
        sections=list(_sections(evaluation, count)),
        percent=percent,
    )


def _sections(
    evaluation: Evaluation, count: int
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
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


def _card(evaluation: Evaluation, i: int) -> dict[str, Any]:
    """Return a sample and what each model made of it, as the template shows them."""
    sample = evaluation.samples[i]
    answers = [(name, *_answer(outcomes[i])) for name, outcomes in evaluation.outcomes.items()]
    texts = {"prompt": _cut(sample.prompt), "reference": _cut(sample.reference)}
    return {"where": sample.where, **texts, "answers": answers}


def _answer(outcome: Outcome) -> tuple[str, str]:
    """Return what is told beside an answer, and the answer."""
    answer, scores = outcome.answer, outcome.scores
    assert answer and scores  # only samples that were answered are shown
    values, notes = scores.values, list[str]()
    for key, title in (("exact", "exact"), ("numeric", "right number")):
        if key in values:
            notes.append(f"{title}: {'yes' if values[key] else 'no'}")
    notes += [f"ROUGE-L {values['rougeL']:.1f}", f"chrF {values['chrf']:.1f}"]
    if outcome.tokens:
        notes.append(f"loss {outcome.loss / outcome.tokens:.3f}")
    if answer.reason != "stop":
        notes.append(f"cut ({answer.reason})")
    return " · ".join(notes), _cut(answer.text)


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    if more <= 0:
        return text
    return f"{text[:LONGEST_TEXT]}… {more:,} more characters in samples.jsonl"
