"""The samples beside what another tokenizer makes of the same conversations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

from phi3_plugin.data.chat import COMMON, chat_dataset
from phi3_plugin.data.dataset import IGNORED
from phi3_plugin.data.inspection.survey import FIRST, arrays
from phi3_plugin.data.preparation import Read
from phi3_plugin.data.reading import make_reading
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import Turn, Written
from phi3_plugin.errors import DataError

Marked = tuple[Sequence[int], Sequence[bool]]
"""The ids of a conversation, and which are trained on."""


class Compared(NamedTuple):
    """What a comparison found."""

    samples: int
    """How many were compared."""
    differ: int
    places: list[str]
    """The first that differ, and where they begin to."""


def conversations(
    tokenizer: Phi3Tokenizer, options: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield where each row stands, and its messages, marked by what is trained on.

    Rows that give no sample, and those that are a text already, are passed over.

    Args:
        tokenizer: Of the checkpoint.
        options: Of :func:`phi3_plugin.data.chat_dataset`.
    """
    given = {name: option.default for name, option in signature(chat_dataset).parameters.items()}
    given |= {name: value for name, value in options.items() if name in given}
    reading = make_reading(
        tokenizer,
        given["source"],
        {name: given[name] for name in COMMON},
        tool_calls=given["tool_calls"],
        group_by=given["group_by"],
        lesson=(given["train_on"], given["system_prompt"], given["add_eos"]),
        truncate=given["truncate"],
    )
    for number, source in enumerate(reading.sources):
        for row in reading.rows(number, source):
            if not isinstance(row, Read) or isinstance(row.chat, Written):
                continue
            try:
                turns = reading.preparation.lesson.prepare(row.chat)
            except DataError:  # there is nothing to train on
                continue
            yield row.where, [_message(turn) for turn in turns]


def marked(dataset: Any, i: int) -> Marked:
    """Return a sample as it is compared."""
    ids, labels = arrays(dataset, i)
    return ids.tolist(), (labels != IGNORED).tolist()


def as_trained(
    theirs: Marked, *, limit: int | None, options: Mapping[str, Any], eos_id: int
) -> Marked:
    """Do to a whole conversation what the options of a data set do: end it, mark it, cut it."""
    ids, trained = list(theirs[0]), list(theirs[1])
    if options.get("add_eos", False) and ids[-1:] != [eos_id]:
        ids, trained = [*ids, eos_id], [*trained, False]
    if options.get("train_on") == "all":
        trained = [True] * len(ids)
    return ids[:limit], [False, *trained[1:limit]]


def compare(pairs: Iterable[tuple[str, Marked, Marked]]) -> Compared:
    """Compare samples, each with its place, ours first."""
    found = [(where, difference(ours, theirs)) for where, ours, theirs in pairs]
    places = [f"{where}: {text}" for where, text in found if text]
    return Compared(len(found), len(places), places[:FIRST])


def difference(ours: Marked, theirs: Marked) -> str:
    """Say where two tokenizations begin to differ; nothing if they do not."""
    lists = (ours[0], theirs[0]), (ours[1], theirs[1])
    for (mine, other), what in zip(lists, ("id", "trained"), strict=True):
        for n, pair in enumerate(zip(mine, other, strict=False)):
            if pair[0] != pair[1]:
                return f"token {n} has {what} {pair[0]} here, {pair[1]} there"
    if len(ours[0]) != len(theirs[0]):
        return f"{len(ours[0])} tokens here, {len(theirs[0])} there"
    return ""


def _message(turn: Turn) -> dict[str, Any]:
    tools = {} if turn.tools is None else {"tools": turn.tools}
    return {"role": turn.role, "content": turn.content, **tools, "trained": turn.trained}
