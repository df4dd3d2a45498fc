"""The formats of data rows we know, by name, and which of them rows have."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from phi3_plugin.data.fields import check_layout
from phi3_plugin.data.messages import MessageList
from phi3_plugin.data.preference import Preference
from phi3_plugin.data.shapes import OUTSIDE, Alpaca, Columns, Text, key_names, pair
from phi3_plugin.data.turns import ROLES, Chat
from phi3_plugin.errors import ConfigError, DataError


class Format(Protocol):
    """One shape of data row."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this shape, judged by its keys."""

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read the row as a conversation.

        Raises:
            DataError: The row is broken; the message does not name the row.
        """


LISTS = ("messages", "sharegpt")
"""Formats of a list of messages: other columns of such rows are taken for notes about it."""


def _formats(tool_calls: str | None = None) -> dict[str, Format]:
    messages = MessageList("messages", "role", tool_calls=tool_calls)
    alpaca = {"input", "system"}
    return {
        "messages": messages,
        "sharegpt": MessageList("conversations", "from", mapped=True, tool_calls=tool_calls),
        "preference": Preference(messages),
        "alpaca": Alpaca(
            pair("instruction", "output", [name for name in OUTSIDE if name not in alpaca])
        ),
        "question_answer": pair("question", "answer"),
        "prompt_response": pair("prompt", "response"),
        "prompt_completion": pair("prompt", "completion"),
        "instruction_response": pair("instruction", "response"),
        "query_response": pair("query", "response"),
        "input_output": pair(
            "input", "output", [*OUTSIDE, "instruction", "prompt", "question", "query"]
        ),
        "text": Text("text"),
    }


FORMATS = _formats()
"""What can be read, by the name that ``dataset.format`` takes."""


def check_format(name: str | None, columns: Mapping[str, str] | None, key: str = "dataset") -> None:
    """Check how rows are to be read; ``key`` is where the two options stand.

    Raises:
        ConfigError: The name or the columns are not usable.
    """
    if columns is not None:
        _check_columns(name, columns, key)
    elif name is not None and (not isinstance(name, str) or name not in FORMATS):
        raise ConfigError(f"{key}.format: {name!r} is unknown. Known formats:{_known()}")


def pick_format(
    name: str | None,
    columns: Mapping[str, str] | None,
    rows: Sequence[Mapping[str, Any]],
    *,
    tool_calls: str | None = None,
) -> Format:
    """Choose how rows are read.

    Rows that list messages are read as those, whatever other columns they have; the column
    ``text`` is read only where nothing else can be. A column that is null in all rows is as if
    it were not there.

    Args:
        name: A key of :data:`FORMATS`, or None to recognize the format.
        columns: Role to column, instead of a known format.
        rows: The first rows, at least one.
        tool_calls: How calls of tools are written, with {} for them; None refuses them.

    Raises:
        ConfigError: An option is not usable.
        DataError: No format fits the rows, or several do.
    """
    check_format(name, columns)
    check_layout(tool_calls)
    if columns is not None:
        return Columns(columns)
    known = FORMATS if tool_calls is None else _formats(tool_calls)
    return known[name or _recognized(rows)]


def _check_columns(name: str | None, columns: Mapping[str, str], key: str) -> None:
    if name is not None:
        raise ConfigError(f"{key}.format and {key}.columns are both set. Remove one of them.")
    texts = isinstance(columns, Mapping) and all(isinstance(c, str) for c in columns.values())
    if not texts or not {"user", "assistant"} <= columns.keys() <= set(ROLES):
        raise ConfigError(
            f"{key}.columns: {columns!r} must name one column for user, one for assistant and "
            "at most one for system, as in {user: question, assistant: answer}."
        )


def _recognized(rows: Sequence[Mapping[str, Any]]) -> str:
    filled = {key for row in rows for key, value in row.items() if value is not None}
    known = [{key: row[key] for key in row if key in filled} for row in rows]
    # Rows that are null where they should not be are better named than not recognized
    fitting = _fitting(known) or _fitting(rows)
    if len(fitting) == 1:
        return fitting[0]
    keys = key_names(dict.fromkeys(key for row in rows for key in row))
    if fitting:
        raise DataError(
            f"the rows (keys: {keys}) fit several formats: {', '.join(fitting)}. "
            "Choose one with dataset.format."
        )
    raise DataError(
        f"the format of the rows is not known; their keys are: {keys}. Known formats:{_known()}\n"
        "For other column names set dataset.columns, as in {user: question, assistant: answer}.\n"
        f"A column that may hold a part of the prompt ({', '.join(OUTSIDE)}) is not left out "
        "silently: dataset.columns says what is read."
    )


def _fitting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    fitting = [name for name, format in FORMATS.items() if all(map(format.fits, rows))]
    lists = [name for name in fitting if name in LISTS]
    others = [name for name in fitting if name != "text"]
    return lists or others or fitting


def _known() -> str:
    return "".join(f"\n  {name} ({format})" for name, format in FORMATS.items())
