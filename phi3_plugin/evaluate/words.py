"""The numbers of an evaluation as a reader gets them, in the page and in a terminal."""

import math
from collections.abc import Mapping, Sequence

from phi3_plugin.evaluate.bootstrap import Estimate
from phi3_plugin.evaluate.measures import BETTER, FEWEST, UNCLEAR, WORSE, Result
from phi3_plugin.evaluate.outcomes import ADAPTER, BASE, Evaluation

ENDED = {
    "stop": "ended by themselves",
    "length": "cut at generation.max_new_tokens",
    "time": "cut at generation.max_time",
    "context": "cut where the model has no more positions",
}
"""How answers end, in words."""

NAMED = 4
"""Measures that a sentence names; more are counted."""


def value(result: Result, number: float, *, signed: bool = False) -> str:
    """Return a number with the digits of its measure."""
    if not math.isfinite(number):
        return "–"
    digits = result.measure.digits if abs(number) < 1e4 else 0
    number = round(number, digits) + 0.0  # there is no -0.00
    return f"{number:{'+' if signed else ''},.{digits}f}"


def interval(result: Result, found: Estimate, *, signed: bool = False) -> str:
    """Return an interval; nothing where there is none."""
    if not math.isfinite(found.low):
        return ""
    low, high = (value(result, end, signed=signed) for end in (found.low, found.high))
    return f"{low} to {high}"


def percent(share: float) -> str:
    """Return a part as percent."""
    return f"{100 * share:.0f} %"


def counted(count: int, thing: str) -> str:
    """Return a number of things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def verdict(found: Sequence[Result]) -> tuple[str, str]:
    """Return in a sentence whether the adapter is better, and one of the three verdicts.

    Empty without an adapter.
    """
    titles: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for result in found:
        if result.verdict:
            titles[result.verdict].append(result.measure.title.removesuffix(", %"))
    better, worse, unclear = titles.values()
    if not any(titles.values()):
        return "", ""
    if better and worse:
        return f"Mixed: better in {_listed(better)}; worse in {_listed(worse)}.", UNCLEAR
    if not better and not worse:
        few = all(result.samples < FEWEST for result in found)
        why = f"the samples are fewer than {FEWEST}" if few else "every interval of it holds 0"
        return f"No clear difference: {why}.", UNCLEAR
    sign, which = (BETTER, better) if better else (WORSE, worse)
    rest = f"; no clear difference in {_listed(unclear)}" if unclear else ""
    every = _listed(which) if unclear else "every measure"
    return f"The adapter is {sign} than the base in {every}{rest}.", sign


def _listed(titles: Sequence[str]) -> str:
    return ", ".join(titles) if len(titles) <= NAMED else f"{len(titles)} measures"


def endings(evaluation: Evaluation) -> dict[str, str]:
    """Say how the answers of each model ended."""
    return {name: _ended(counts) for name, counts in evaluation.endings().items() if counts}


def _ended(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {ENDED.get(ended, ended)}" for ended, count in counts.items())


def table(evaluation: Evaluation, found: Sequence[Result]) -> list[list[str]]:
    """Return the rows of a terminal's table, the head first."""
    both = ADAPTER in evaluation.outcomes
    rows = [["", BASE, ADAPTER, "difference", "95 % interval", ""] if both else ["", BASE, "95 %"]]
    for result in found:
        row = [result.measure.title, value(result, result.models[BASE].value)]
        if result.difference is None:
            row.append(interval(result, result.models[BASE]))
        else:
            change = result.difference
            row.append(value(result, result.models[ADAPTER].value))
            row.append(value(result, change.value, signed=True))
            row += [interval(result, change, signed=True), result.verdict]
        rows.append(row)
    return rows


def report(evaluation: Evaluation, found: Sequence[Result], page: str) -> str:
    """Return what a terminal shows.

    Args:
        evaluation: What was evaluated.
        found: Its numbers.
        page: Where the page with all of it lies.
    """
    rows = table(evaluation, found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    asked, samples = len(evaluation.asked), len(evaluation.samples)
    title = f"Evaluation: {counted(samples, 'sample')}"
    each = " from each model" * (ADAPTER in evaluation.outcomes)
    lines = [f"{title}, {counted(asked, 'answer')}{each}" if asked else title]
    lines += [str(evaluation.facts.get("evaluated", "")), ""]
    for row in rows:
        left, *rest = row
        aligned = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        if len(rest) > 2:
            aligned[-1] = rest[-1]  # the verdict
        lines.append("  ".join([f"{left:{widths[0]}}", *aligned]).rstrip())
    lines += ["", *filter(None, [verdict(found)[0]])]
    lines += [f"Answers of the {name}: {said}." for name, said in endings(evaluation).items()]
    lines += [f"Note: {note}" for note in evaluation.notes]
    return "\n".join([*lines, f"All of it: {page}"]) + "\n"
