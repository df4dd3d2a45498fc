"""The numbers of a data set as lines of text, the same for the page and the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phi3_plugin.data.findings import DROPPED, NOTICED, Findings
from phi3_plugin.data.inspection.advice import count, percent
from phi3_plugin.data.inspection.statistics import Bin, Part, Statistics
from phi3_plugin.data.inspection.survey import FIRST, Alike


class Fact(NamedTuple):
    """One number, in words."""

    label: str
    value: str
    places: list[str]
    """Where the first of what is counted stand, and why."""


def title_of(found: Statistics) -> str:
    """Return what the data set is called."""
    return _source(found.options.get("source") or found.options["_component_"])


def short(where: str, found: Statistics) -> str:
    """Return a place without the folder that all places of the data set begin with."""
    source = found.options.get("source")
    if not isinstance(source, str) or "/" not in source:
        return where
    folder = source if where.startswith(f"{source.rstrip('/')}/") else source.rpartition("/")[0]
    return where.replace(f"{folder.rstrip('/')}/", "")


def span(bin: Bin) -> str:
    """Return the lengths of a bar."""
    return f"{bin.low:,}" if bin.low == bin.high else f"{bin.low:,}–{bin.high:,}"


def limits_title(found: Statistics) -> str:
    """Return what stands over the table of limits."""
    return f"If samples are {'dropped above' if found.truncate == 'drop' else 'cut at'}"


def facts(found: Statistics) -> Iterator[Fact]:
    """Yield what is told of a data set, but for its tables."""
    yield Fact("Rows", f"{found.rows:,} read", [])
    yield from _noticed(found.findings, DROPPED, "left out: ")
    yield from _noticed(found.findings, NOTICED, "")
    yield Fact("Samples", f"{found.samples:,}", [])
    yield from _endless(found)
    yield from _alike(found.alike)
    yield Fact("Tokens an epoch", f"{found.tokens:,}", [])
    share = percent(found.labelled / found.tokens)
    yield Fact("Trained on", f"{found.labelled:,} ({share})", [])
    each, steps = found.batching.steps, count(found.steps, "step")
    epoch = f", {each:,} an epoch" if each != found.steps else ""
    yield Fact("Training", f"{steps} of {found.per_step}{epoch}", [])
    if found.held_out:
        yield from _held_out(found.held_out, found.options_val is not None)
    if found.compared:
        differ, samples = found.compared.differ, count(found.compared.samples, "sample")
        text = f"{samples}, of which {differ:,} differ" if differ else f"{samples}, all equal"
        yield Fact("Beside transformers", text, found.compared.places)


def _source(source: Any) -> str:
    if isinstance(source, Mapping):
        return _source(source.get("source"))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return ", ".join(map(_source, source))
    return str(source)


def _noticed(findings: Findings, kinds: Sequence[str], before: str) -> Iterator[Fact]:
    for kind in kinds:
        if number := findings.counts[kind]:
            listed = findings.places.get(kind, [])[:FIRST]
            places = [f"{where}: {detail}" if detail else where for where, detail in listed]
            if 0 < len(places) < number:
                places.append(f"and {number - len(places):,} more")
            yield Fact("", f"{before}{number:,} {_agreeing(kind, number)}", places)


def _agreeing(kind: str, number: int) -> str:
    verb, _, rest = kind.partition(" ")
    one = {"have": "has", "are": "is", "do": "does"}.get(verb, verb)
    return f"{one if number == 1 else verb} {rest}"


def _endless(found: Statistics) -> Iterator[Fact]:
    if found.endless:
        cut = found.endless - found.endless_uncut
        yield Fact(
            "", f"{found.endless:,} without a trained end of a turn, {cut:,} of them cut", []
        )


def _alike(alike: Alike) -> Iterator[Fact]:
    if alike.copies:
        places = [f"{again} repeats {first}" for first, again in alike.pairs]
        if len(places) < alike.copies:
            places.append(f"and {alike.copies - len(places):,} more")
        yield Fact("", f"{alike.copies:,} with the tokens of an earlier one", places)
    if alike.answers:
        yield Fact("", f"{alike.answers:,} share a prompt and answer it differently", [])


def _held_out(part: Part, own: bool) -> Iterator[Fact]:
    share = percent(part.labelled / part.tokens)
    yield Fact(
        "Validation",
        f"{count(part.samples, 'sample')}, {part.tokens:,} tokens, {share} of them predicted",
        [],
    )
    if own:
        yield from _noticed(part.findings, DROPPED, "left out: ")
    if part.seen:
        yield Fact("", f"{part.seen:,} are in the training data too", [])
