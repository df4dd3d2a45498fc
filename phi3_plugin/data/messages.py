"""Rows that list messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_plugin.data.fields import (
    check_lost,
    from_json,
    said,
    shown,
    tools_text,
    wanted,
    with_calls,
)
from phi3_plugin.data.shapes import BESIDE, NONE, UNSEEN, column
from phi3_plugin.data.turns import Turn, kind, make_turn
from phi3_plugin.errors import DataError

SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "tool_response": "tool_response",
}
"""The name of each role in ShareGPT's data, to ours."""

CALLS = "function_call"
"""Who says that tools are called, in some of these data sets."""

KEYS = {"role": "content", "from": "value"}
"""The field that holds who speaks, and the one that holds what is said."""

SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True)
class MessageList:
    """A column that lists messages: ``{role, content}`` or ``{from, value}``."""

    column: str
    role: str
    """``role`` or ``from``, where a message has both."""
    mapped: bool = False
    """Whether roles are those of :data:`SPEAKERS`, and not taken as they are."""
    tool_calls: str | None = None
    """How calls of tools are written, with {} for them."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.column in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the listed messages, and the system message and the tools beside them."""
        return with_rest(self.listed(column(row, self.column), self.column), row)

    def listed(self, messages: Any, name: str) -> list[Turn]:
        """Read a list of messages.

        Raises:
            DataError: It is no list, is empty, or a message is broken.
        """
        if not isinstance(messages, list):
            raise DataError(f"{name} is {kind(messages)}, expected a list")
        if not messages:
            raise DataError(f"{name} is empty")
        return [self._turn(message) for message in messages]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise DataError(f"a message is {kind(message)}, expected an object")
        key = self._key(message)
        theirs = column(message, key)
        if theirs == CALLS and (self.mapped or key == "from"):
            calls = column(message, KEYS[key])
            return self._calling({**message, "tool_calls": _calls(calls)}, "assistant", None)
        role = self._our(theirs) if self.mapped or key == "from" else theirs
        if not isinstance(role, str):
            raise DataError(f"unknown role {shown(role)}, expected a string")
        if message.get("tool_calls"):
            return self._calling(message, role, message.get(KEYS[key]))
        return _checked(message, role, column(message, KEYS[key]))

    def _key(self, message: Mapping[str, Any]) -> str:
        known = [key for key in (self.role, *KEYS) if message.get(key) is not None]
        return known[0] if known else self.role

    def _our(self, role: Any) -> str:
        if not isinstance(role, str) or role not in SPEAKERS:
            raise DataError(
                f"unknown role {shown(role)}, expected one of: {', '.join([*SPEAKERS, CALLS])}"
            )
        return SPEAKERS[role]

    def _calling(self, message: Mapping[str, Any], role: str, content: Any) -> Turn:
        if role != "assistant":
            raise DataError("a message has tool_calls and is not the assistant's")
        text = with_calls(said(role, content), message["tool_calls"], self.tool_calls)
        return _checked(message, role, text)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.column}: [{{{self.role}, {KEYS[self.role]}}}]"


def with_rest(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """Add what columns beside the messages say: the system message and the tools.

    Raises:
        DataError: They are there twice, or a column shows what no format here reads.
    """
    if row.keys().isdisjoint(BESIDE):
        return list(turns)
    for name in UNSEEN:
        if row.get(name):
            raise DataError(f"there is a column {name!r}, which nothing reads; remove it")
    return _with_tools(_with_system(turns, row), row.get("tools"))


def _checked(message: Mapping[str, Any], role: str, content: Any) -> Turn:
    if len(message) == len(KEYS):  # Most messages: no field but these
        return make_turn(role, said(role, content))
    check_lost(message)
    tools = tools_text(message.get("tools"))
    return make_turn(role, said(role, content), tools=tools, wanted=wanted(message))


def _calls(value: Any) -> Any:
    calls = from_json(CALLS, value) if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _with_system(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    given = [make_turn("system", row[name]) for name in SYSTEMS if row.get(name)]
    found = {turn.content: turn for turn in given}
    listed = {turn.content for turn in turns if turn.role == "system"}
    if found.keys() <= listed:
        return list(turns)
    if listed or len(found) > 1:
        raise DataError("there is a column for the system message and another system message")
    return [*found.values(), *turns]


def _with_tools(turns: list[Turn], tools: Any) -> list[Turn]:
    if not tools or tools in NONE:
        return turns
    systems = [i for i, turn in enumerate(turns) if turn.role == "system"]
    if not systems:
        turns, systems = [make_turn("system", ""), *turns], [0]
    first = turns[systems[0]]
    if first.tools:
        raise DataError("there is a column 'tools' and a system message that has tools")
    described = make_turn(first.role, first.content, tools=tools_text(tools), wanted=first.wanted)
    return [*turns[: systems[0]], described, *turns[systems[0] + 1 :]]
