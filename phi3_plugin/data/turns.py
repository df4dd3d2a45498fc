"""The messages of a conversation, checked."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from phi3_plugin.errors import DataError

ROLES = ("system", "user", "assistant")
"""The roles that every format of data rows has; a chat template may know others."""

ROLE = re.compile(r"\w[\w-]*")
SURROGATE = re.compile("[\ud800-\udfff]")


class Turn(NamedTuple):
    """One checked message of a conversation."""

    role: str
    content: str
    trained: bool
    """Whether the loss counts the content and the token that ends it."""
    tools: str | None = None
    """Description of the tools that the assistant may call, as the template writes it."""
    wanted: bool | None = None
    """Whether the message itself asks to be trained on; None where it does not say."""


class Written(NamedTuple):
    """A conversation that is rendered already."""

    text: str
    said: tuple[tuple[int, int], ...] | None
    """[start, end) of what the assistant says; None: the chat template's own marks tell."""


Chat = Sequence[Turn] | Written
"""One row of data, read."""


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
        wanted: What the message itself says about being trained on.

    Raises:
        DataError: The role is not a word, or the content or the tools are not text.
    """
    # Templates write the role where special tokens are: text in it could speak for another
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise DataError(f"unknown role {role!r}, expected a word such as {', '.join(ROLES)}")
    said = _text(f"the {role} content", content)
    described = None if tools is None else _text(f"tools of the {role} message", tools)
    counts = role == "assistant" if trained is None else trained
    return Turn(role, said, counts, described, wanted)


def kind(value: object) -> str:
    """Name the type of a JSON value for an error message."""
    return "null" if value is None else type(value).__name__


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, expected a string")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(f"{name} is not valid Unicode: it has half a surrogate pair")
    return value
