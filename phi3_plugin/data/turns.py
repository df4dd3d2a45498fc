"""One checked message of a conversation, and how errors name what a row holds.

What stands here knows no format of rows.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np

from phi3_plugin.config import strict_json
from phi3_plugin.data.thoughts import THOUGHT_FIELDS
from phi3_plugin.errors import DataError

ROLES = ("system", "user", "assistant")
"""The roles that every format of data rows has; a chat template may know others."""


class Turn(NamedTuple):
    """One checked message of a conversation."""

    role: str
    content: str
    trained: bool
    """Whether the loss counts the content and the token that ends it: decided here for what the
    assistant says, and by ``dataset.train_on`` for all."""
    tools: str | None = None
    """Description of the tools that the assistant may call, as the template writes it."""
    wanted: bool | None = None
    """What the row itself asks for, by ``weight`` or ``train``; None where it does not say."""
    stands_in: bool = False
    """Whether the row has no such message: a system message that is there for the tools alone."""
    fields: str = ""
    """Other fields of the message that the chat template reads (``name``, …), a JSON object."""
    variables: str = ""
    """What else of the row it reads (``documents``, …), a JSON object; every turn has the same."""
    thought: str | None = None
    """What was thought before it was said, where the template writes that by itself."""
    weight: float = 1.0
    """How much the loss counts it, if at all."""


class Written(NamedTuple):
    """A conversation that the data holds as one text, in the words of the chat template."""

    text: str
    said: tuple[tuple[int, int], ...] | None
    """[start, end) of what the assistant says; None: the chat template's own marks tell."""


Chat = Sequence[Turn] | Written
"""One row of data, read."""

ROLE = re.compile(r"\w[\w-]*")
SURROGATE = re.compile("[\ud800-\udfff]")


def make_turn(
    role: object,
    content: object,
    trained: bool | None = None,
    tools: object = None,
    wanted: bool | None = None,
) -> Turn:
    """Check one message.

    Args:
        role: Who speaks; whether the template knows the role shows when it is rendered.
        content: What is said.
        trained: Whether the loss counts it; by default what the assistant says counts.
        tools: Text, or None.
        wanted: What the row itself says about that.

    Raises:
        DataError: The role is not a word, or the content or the tools are not text.
    """
    # Templates write the role where special tokens are: text in it could speak for another
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise DataError(f"unknown role {role!r}, expected a word such as {', '.join(ROLES)}")
    text = checked_text(f"the {role} content", content)
    described = None if tools is None else checked_text(f"tools of the {role} message", tools)
    counts = role == "assistant" if trained is None else trained
    return Turn(role, text, counts, described, wanted)


def checked_text(name: str, value: object) -> str:
    """Return a value that is valid text.

    Raises:
        DataError: It is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, expected a string")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(f"{name} is not valid Unicode: it has half a surrogate pair")
    return value


class Reads(NamedTuple):
    """What a chat template reads beside role, content and tools of the messages."""

    fields: frozenset[str] | None = frozenset()
    """Of a message; None is every one."""
    variables: frozenset[str] = frozenset()
    """Of the row, under the same names."""

    def __bool__(self) -> bool:
        """Whether it reads anything."""
        return self != READS_NOTHING

    @property
    def thought(self) -> str | None:
        """The field of a message in which it looks for what was thought."""
        return next((name for name in THOUGHT_FIELDS if name in (self.fields or ())), None)

    def of_message(self, message: Mapping[str, Any]) -> str:
        """Return the fields of a message that are read, as `Turn` holds them."""
        names = [
            name
            for name in message
            if name not in MESSAGE_FIELDS and (self.fields is None or name in self.fields)
        ]
        return as_json("a message", {name: message[name] for name in names}) if names else ""

    def without(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row but for what reaches the template as it is."""
        if not self.variables:
            return row
        return {name: row[name] for name in row if name not in self.variables}

    def of_row(self, turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
        """Give the turns what is read of the row."""
        names = [name for name in self.variables if row.get(name) not in (None, "")]
        if not names:
            return list(turns)
        values = {name: row[name] for name in names}
        if isinstance(tools := values.get("tools"), str):
            values["tools"] = from_json("tools", tools)
        variables = as_json("a row", values)
        return [turn._replace(variables=variables) for turn in turns]


READS_NOTHING = Reads()

TRAIN_FLAGS = ("weight", "train", "loss", "loss_mask", "trainable", "training", "masked")
"""Fields that say whether a message is trained on: of OpenAI, Axolotl, ms-swift, verl and others.

The last one, torchtune's, says that it is not.
"""

MESSAGE_FIELDS = frozenset(
    ("role", "content", "from", "value", "tools", "tool_calls", *THOUGHT_FIELDS, *TRAIN_FLAGS)
)
"""What is read of a message for itself."""


def as_json(name: str, value: Any, ensure_ascii: bool = True) -> str:
    """Write a value as JSON.

    Raises:
        DataError: JSON has no such value.
    """
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be written as JSON: {error}") from error


def from_json(name: str, text: str) -> Any:
    """Return the value that a text of JSON holds.

    Raises:
        DataError: It is broken.
    """
    try:
        return strict_json(text, unique=True)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is broken JSON: {error}") from error


def loss_weight(value: Any, name: str) -> float:
    """Return how much the loss counts a row or a message; null is 1.

    Args:
        value: A number, also one that is written as text, as tables have them.
        name: Of the column or field.

    Raises:
        DataError: It is none, is below 0 or is more than fp32 holds.
    """
    if value is None or value == "":
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= HEAVIEST:
        raise DataError(
            f"{name} is {short_repr(value)}, expected a number from 0 on, by which the loss counts "
            "the row; if it is something else, say what to read with dataset.columns"
        )
    return number


HEAVIEST = float(np.finfo(np.float32).max)

# What a row or a message holds, and how errors name it

NAMES_LISTED = 20
"""An error names no more keys than this."""


def kind(value: object) -> str:
    """Name the type of a JSON value for an error message."""
    return "null" if value is None else type(value).__name__


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
    names = [printable(str(key)) for key in keys]
    return ", ".join([*names[:NAMES_LISTED], *(["…"] if len(names) > NAMES_LISTED else [])])


def short_repr(value: Any) -> str:
    """Write a value for an error message, shortened."""
    return printable(shortened(value))


def printable(text: str) -> str:
    """Return a text that a terminal can show: half a surrogate pair is written out."""
    return text.encode("utf-8", "backslashreplace").decode()
