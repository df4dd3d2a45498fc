"""Rows that keep a conversation in columns of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_plugin.data.turns import ROLES, Turn, Written, kind, make_turn
from phi3_plugin.errors import DataError

UNSEEN = ("functions", "image", "images", "audio", "audios", "video", "videos")
"""Columns of what was shown or offered to the assistant, which no format here reads."""

BESIDE = ("system", "system_prompt", "tools", *UNSEEN)
"""Columns that are a part of a conversation that is whole but for them."""

OUTSIDE = ("system", "system_prompt", "context", "input", "history", "tools", *UNSEEN)
"""Columns that some data sets keep a part of the prompt in."""

NONE = ("[]", "{}", "null")
"""How some data sets write that there is nothing, beside null and the empty text."""

LISTED = 20
"""An error names no more keys than this."""


def column(row: Mapping[str, Any], name: str) -> Any:
    """Return a column of a row, or a field of a message.

    Raises:
        DataError: It has none of this name.
    """
    if name not in row:
        raise DataError(f"there is no {name!r}; the keys are: {key_names(row)}")
    return row[name]


def key_names(keys: Iterable[str]) -> str:
    """Write keys for an error message, whatever they hold."""
    named = [printable(str(key)) for key in keys]
    return ", ".join([*named[:LISTED], *(["…"] if len(named) > LISTED else [])])


def printable(text: str) -> str:
    """Return text that a terminal can show, half surrogate pairs written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_filled(row: Mapping[str, Any], names: Iterable[str], advice: str) -> None:
    """Raise a DataError if one of the columns is filled, which the format would drop."""
    for name in names:
        if row.get(name) and row[name] not in NONE:
            raise DataError(f"there is a {name!r} too, which this format would drop; {advice}")


NAME_COLUMNS = "name the columns to read with dataset.columns"
"""What to do about rows that keep a part of the prompt in a column of its own."""


@dataclass(frozen=True)
class Columns:
    """One column a message; a conversation has one message of each role named."""

    names: Mapping[str, str]
    """Role to column."""
    unless: frozenset[str] = frozenset()
    """Columns that would belong to the prompt too: rows that have them are of another shape."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns and none that would be left out."""
        return row.keys() >= set(self.names.values()) and self.unless.isdisjoint(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read system, user and assistant message, in this order."""
        if not self.unless.isdisjoint(row):
            refuse_filled(row, [name for name in row if name in self.unless], NAME_COLUMNS)
        return [
            make_turn(role, column(row, self.names[role])) for role in ROLES if role in self.names
        ]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return ", ".join(self.names.values())


def pair(user: str, assistant: str, unless: Sequence[str] = OUTSIDE) -> Columns:
    """Return the shape of rows that have a question and an answer."""
    return Columns({"user": user, "assistant": assistant}, frozenset(unless) - {user, assistant})


@dataclass(frozen=True)
class Alpaca:
    r"""``instruction``, ``output`` and, in rows that need them, ``input`` and ``system``.

    The user says ``{instruction}\n Input: {input}``, as in Microsoft's samples; where the input
    is absent, null or empty, the instruction alone.
    """

    pair: Columns

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the two columns that all rows have."""
        return self.pair.fits(row)

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the system, the user and the assistant message."""
        user, assistant = self.pair.read(row)
        extra = row.get("input")
        if extra:
            text = f"{user.content}\n Input: {_text('input', extra)}"
            user = make_turn("user", text)
        system = row.get("system")
        if not system:
            return [user, assistant]
        return [make_turn("system", _text("system", system)), user, assistant]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.pair} and perhaps input and system"


@dataclass(frozen=True)
class Text:
    """A column of conversations that are written as the chat template writes them."""

    name: str

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the column."""
        return self.name in row

    def read(self, row: Mapping[str, Any]) -> Written:
        """Read the text; the marks in it tell later who says what."""
        # A turn's content is checked, and so is this
        text = make_turn(self.name, column(row, self.name)).content
        lost = [name for name in BESIDE if name in row and not _holds(text, name, row[name])]
        refuse_filled(row, lost, "write it in the text, or remove the column")
        return Written(text, None)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.name}, written as the chat template writes it"


def _holds(text: str, name: str, value: Any) -> bool:
    return name not in UNSEEN and isinstance(value, str) and value.strip() in text


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, expected a string")
    return value
