"""Columns beside those that a format reads: parts of a conversation, of a prompt, or notes.

What is read, what is refused by name and what is passed over. Nothing that looks like a part of
the prompt is dropped in silence.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phi3_plugin.data.turns import Turn, as_json, checked_text, make_turn, printable
from phi3_plugin.errors import DataError

MEDIA = ("image", "images", "audio", "audios", "video", "videos")

BESIDE = {
    "system": "system",
    "system_prompt": "system",
    "tools": "tools",
    **dict.fromkeys(("context", "input", "history"), "prompt"),
    **dict.fromkeys(("functions", *MEDIA), "unread"),
}
"""Columns that may be a part of a conversation, and which. What the formats do with filled ones:

=================  ==================  ==================  =====================  =======
format             system              tools               prompt                 unread
=================  ==================  ==================  =====================  =======
lists of messages  read                read                a note, passed over    refused
preference         read                read                ``input`` may be read  refused
two columns        refused             refused             refused                refused
alpaca             ``system`` is read  refused             ``input`` is read      refused
text               must be in it       must be in it       a note, passed over    refused
=================  ==================  ==================  =====================  =======

What is refused stops the run, or counts as a bad row, instead of being dropped silently.
"""

NOTHING = ("[]", "{}", "null")
"""How some data sets write that there is nothing, beside null and the empty text."""

ADVISE_COLUMNS = (
    "name the columns to read with dataset.columns, or write the prompt with dataset.prompt, as in "
    "'{instruction}\\n\\n{context}'"
)

ADVISE_MESSAGES = (
    "write it in a message, or say that it is not to be read: dataset.columns={{messages: {}}}"
)


def filled(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return those of these columns that hold something."""
    return [name for name in names if row.get(name) and row[name] not in NOTHING]


def refuse_beside(names: Sequence[str], advice: str) -> None:
    """Refuse a row for the first of these columns, which its format would drop."""
    if names:
        raise DataError(f"there is a {names[0]!r} too, which this format would drop; {advice}")


MATERIAL = (
    *("document", "passage", "paragraph", "article", "evidence", "knowledge", "snippet", "chunk"),
    *("choice", "option", "candidate", "schema", "table", "ddl", "premise", "hypothesis", "fact"),
    *("background", "context", "attachment", "retrieved", "excerpt", "transcript"),
)
"""Words in the name of a column that holds what a question is about; also in the plural."""

CHOICE = re.compile(r"(op|opt|option|choice|distractor|ending)[_ ]?[a-f1-9]", re.IGNORECASE)
CHOICE_LETTER = re.compile("[A-F]", re.IGNORECASE)
"""Names of columns that each hold one of several answers to choose from."""

ASKING = (
    *("prompt", "instruction", "question", "query", "input", "hint", "story", "persona", "problem"),
    *("scenario", "sentence", "sentence1", "sentence2", "body", "title", "description", "task"),
)
"""Names of columns that ask; beside a list of messages they are notes about it."""

OF_NOTES = (
    *(
        "id",
        "ids",
        "index",
        "name",
        "names",
        "length",
        "len",
        "count",
        "num",
        "type",
        "url",
        "urls",
    ),
    *("source", "hash", "lang", "language", "score", "embedding", "date", "path", "version"),
)
"""Last words of the names of columns that only tell about something, such as ``document_id``."""


def _is_filled(value: Any) -> bool:
    return value is False or value == 0 or (bool(value) and value not in NOTHING)


def filled_but(row: Mapping[str, Any], read: Iterable[str]) -> list[str]:
    """Return the filled columns that are not read."""
    read = {*read}
    return [name for name in row if name not in read and _is_filled(row[name])]


def unread_columns(
    row: Mapping[str, Any], read: Iterable[str], asking: Iterable[str], advice: str
) -> list[str]:
    """Return the filled columns that are not read, and refuse those of the prompt."""
    names = filled_but(row, read)
    letters = [name for name in names if CHOICE_LETTER.fullmatch(name)]
    for name in names:
        is_choice = CHOICE.fullmatch(name) or (len(letters) > 1 and name in letters)
        is_prompt = name in asking or is_choice or _is_material(name)
        if is_prompt and isinstance(row[name], str | list | dict):
            raise DataError(
                f"there is a {printable(name)!r} too, which looks like a part of the prompt and "
                f"is not read; {advice}"
            )
    return names


def _is_material(name: str) -> bool:
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if words[-1] in OF_NOTES:
        return False
    return any(word in MATERIAL or word.removesuffix("s") in MATERIAL for word in words)


def with_columns_beside(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """Add what columns beside a list of messages say: the system message and the tools.

    Raises:
        DataError: They are there twice, or a column holds what no format here reads.
    """
    if row.keys().isdisjoint(BESIDE):
        return list(turns)
    unread = [name for name in row if BESIDE.get(name) == "unread"]
    refuse_beside(filled(row, unread), "remove it")
    return _with_tools(_with_system(turns, row), row.get("tools"))


def _with_system(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    names = [name for name, part in BESIDE.items() if part == "system" and row.get(name)]
    beside = {turn.content: turn for turn in (make_turn("system", row[name]) for name in names)}
    listed = {turn.content for turn in turns if turn.role == "system"}
    if beside.keys() <= listed:
        return list(turns)
    if listed or len(beside) > 1:
        raise DataError("there is a column for the system message and another system message")
    return [*beside.values(), *turns]


def _with_tools(turns: list[Turn], tools: Any) -> list[Turn]:
    if not tools or tools in NOTHING:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "system"), None)
    if first is None:
        turns = [make_turn("system", "")._replace(stands_in=True), *turns]
        first = 0
    system = turns[first]
    if system.tools:
        raise DataError("there is a column 'tools' and a system message that has tools")
    turns[first] = system._replace(
        tools=checked_text(f"tools of the {system.role} message", tools_text(tools))
    )
    return turns


def with_system_prompt(turns: Sequence[Turn], prompt: str) -> list[Turn]:
    """Put a system message in front of a conversation that has none of its own."""
    system = [turn for turn in turns if turn.role == "system"]
    if not system:
        variables = turns[-1].variables if turns else ""
        return [make_turn("system", prompt)._replace(variables=variables), *turns]
    return [
        turn._replace(content=prompt, stands_in=False) if turn.stands_in else turn for turn in turns
    ]


def tools_text(tools: Any) -> Any:
    """Return a description of tools as one text."""
    # As Phi-4-mini's model card writes them: the template puts text between <|tool|> and <|/tool|>
    return as_json("tools", tools) if isinstance(tools, list | dict) else tools
