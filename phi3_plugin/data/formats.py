"""The shapes of data rows we know, each read into a conversation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phi3_plugin.data.turns import ROLES, Turn, kind, make_turn
from phi3_plugin.errors import ConfigError, DataError


class Format(Protocol):
    """One shape of data row."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this shape, judged by its keys."""

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the row as a conversation.

        Raises:
            DataError: The row is broken; the message does not name the row.
        """


@dataclass(frozen=True)
class MessageList:
    """A column that lists messages; ``role`` and ``content`` name keys of each.

    A message may have ``tools`` as well: text, or a list that is written as JSON.
    """

    column: str
    role: str
    content: str
    roles: Mapping[str, str] | None = None
    """The file's name of each role to ours; None takes every role as it is."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.column in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the listed messages."""
        messages = _column(row, self.column)
        if not isinstance(messages, list):
            raise DataError(f"{self.column} is {kind(messages)}, expected a list")
        if not messages:
            raise DataError(f"{self.column} is empty")
        return [self._turn(message) for message in messages]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, Mapping):
            raise DataError(f"a message is {kind(message)}, expected an object")
        if message.get("tool_calls"):
            raise DataError("a message has tool_calls, which nothing reads; write them as content")
        role, content = _column(message, self.role), _column(message, self.content)
        return make_turn(self._our(role), content, tools=_tools(message.get("tools")))

    def _our(self, role: Any) -> Any:
        if self.roles is None:
            return role
        if not isinstance(role, str) or role not in self.roles:
            raise DataError(f"unknown role {role!r}, expected one of: {', '.join(self.roles)}")
        return self.roles[role]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.column}: [{{{self.role}, {self.content}}}]"


@dataclass(frozen=True)
class Columns:
    """One column a message; a conversation has one message of each role named."""

    names: Mapping[str, str]
    """Role to column."""
    unless: tuple[str, ...] = ()
    """Columns that would belong to the prompt too: rows that have them are of another shape."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns and none that would be left out."""
        return row.keys() >= set(self.names.values()) and row.keys().isdisjoint(self.unless)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read system, user and assistant message, in this order."""
        for name in self.unless:
            if row.get(name):
                raise DataError(
                    f"there is a {name!r} too, which this format would drop; name the columns to "
                    "read with dataset.columns"
                )
        named = [(role, self.names[role]) for role in ROLES if role in self.names]
        return [make_turn(role, _column(row, name)) for role, name in named]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join(self.names.values()) + _without(self.unless)


@dataclass(frozen=True)
class Alpaca:
    r"""``instruction``, ``output`` and, in rows that need it, ``input``.

    The user says ``{instruction}\n Input: {input}``, as in Microsoft's samples; where the input
    is absent, null or empty, the instruction alone.
    """

    pair: Columns

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the two columns that all rows have."""
        return self.pair.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the user and the assistant message."""
        user, assistant = self.pair.read(row)
        extra = row.get("input")
        if extra is None or extra == "":
            return [user, assistant]
        if not isinstance(extra, str):
            raise DataError(f"input is {kind(extra)}, expected a string")
        return [make_turn("user", f"{user.content}\n Input: {extra}"), assistant]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        names = ", ".join(self.pair.names.values())
        return f"{names} and perhaps input{_without(self.pair.unless)}"


OUTSIDE = ("system", "context", "input")
"""Columns that some data sets keep a part of the prompt in."""


FORMATS: dict[str, Format] = {
    "messages": MessageList("messages", "role", "content"),
    "sharegpt": MessageList(
        "conversations",
        "from",
        "value",
        {
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "chatgpt": "assistant",
            "system": "system",
        },
    ),
    "alpaca": Alpaca(Columns({"user": "instruction", "assistant": "output"}, OUTSIDE[:2])),
    "question_answer": Columns({"user": "question", "assistant": "answer"}, OUTSIDE),
    "prompt_response": Columns({"user": "prompt", "assistant": "response"}, OUTSIDE),
    "prompt_completion": Columns({"user": "prompt", "assistant": "completion"}, OUTSIDE),
    "instruction_response": Columns({"user": "instruction", "assistant": "response"}, OUTSIDE),
}
"""What can be recognized, by the name that ``dataset.format`` takes."""


def pick_format(
    name: str | None, columns: Mapping[str, str] | None, rows: Sequence[Mapping[str, Any]]
) -> Format:
    """Choose how rows are read.

    Args:
        name: A key of :data:`FORMATS`, or None to recognize the format.
        columns: Role to column, instead of a known format.
        rows: The first rows, at least one.

    Raises:
        ConfigError: The name or the columns are not usable.
        DataError: No format fits the rows, or several do.
    """
    if columns is not None:
        return _named_columns(name, columns)
    if name is None:
        return _recognized(rows)
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"dataset.format: {name!r} is unknown. Known formats:{_known()}")
    return FORMATS[name]


def _named_columns(name: str | None, columns: Mapping[str, str]) -> Columns:
    if name is not None:
        raise ConfigError("dataset.format and dataset.columns are both set. Remove one of them.")
    texts = isinstance(columns, Mapping) and all(isinstance(c, str) for c in columns.values())
    if not texts or not {"user", "assistant"} <= columns.keys() <= set(ROLES):
        raise ConfigError(
            f"dataset.columns: {columns!r} must name one column for user, one for assistant and "
            "at most one for system, as in {user: question, assistant: answer}."
        )
    return Columns(columns)


def _recognized(rows: Sequence[Mapping[str, Any]]) -> Format:
    fitting = [name for name, format in FORMATS.items() if all(map(format.fits, rows))]
    if len(fitting) == 1:
        return FORMATS[fitting[0]]
    keys = ", ".join(dict.fromkeys(key for row in rows for key in row))
    if fitting:
        raise DataError(
            f"the rows (keys: {keys}) fit several formats: {', '.join(fitting)}. "
            "Choose one with dataset.format."
        )
    raise DataError(
        f"the format of the rows is not known; their keys are: {keys}. Known formats:{_known()}\n"
        "For other column names set dataset.columns, as in {user: question, assistant: answer}."
    )


def _known() -> str:
    return "".join(f"\n  {name} ({format})" for name, format in FORMATS.items())


def _without(names: Sequence[str]) -> str:
    return f", without {' or '.join(names)}" if names else ""


def _tools(listed: Any) -> Any:
    # As Phi-4-mini's model card writes them: the template puts text between <|tool|> and <|/tool|>
    return json.dumps(listed) if isinstance(listed, list | dict) else listed


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise DataError(f"there is no {name!r}; the keys are: {', '.join(map(str, row))}")
    return row[name]
