"""Which answers to look at: the worst, and those that the adapter changed most.

Being right comes first, which is the right number where the reference has one and the same text
elsewhere; then how much of the text agrees, by chrF, which knows every script.
"""

from phi3_plugin.evaluate.outcomes import ADAPTER, BASE, Evaluation, Outcome

Key = tuple[float, float]
"""(right, chrF)"""


def worst(evaluation: Evaluation, count: int) -> list[int]:
    """Return the samples that the last model answered wrongly, the worst first."""
    keys = {i: _key(evaluation.last[i]) for i in evaluation.asked}
    return sorted((i for i in keys if keys[i][0] < 100), key=lambda i: keys[i])[:count]


def changed(evaluation: Evaluation, count: int) -> tuple[list[int], list[int]]:
    """Return the samples on which the adapter gained most, and those on which it lost most."""
    if ADAPTER not in evaluation.outcomes:
        return [], []
    base, adapter = (evaluation.outcomes[name] for name in (BASE, ADAPTER))
    change = {i: _change(_key(base[i]), _key(adapter[i])) for i in evaluation.asked}
    rising = sorted(change, key=lambda i: change[i])
    gained = [i for i in reversed(rising) if change[i] > (0, 0)]
    return gained[:count], [i for i in rising if change[i] < (0, 0)][:count]


def _key(outcome: Outcome) -> Key:
    assert outcome.said is not None  # only samples that were answered are ranked
    values = outcome.said.scores.values
    return values.get("numeric", values["exact"]), values["chrf"]


def _change(before: Key, after: Key) -> Key:
    return after[0] - before[0], after[1] - before[1]
