"""The messages of a conversation, checked."""

import re
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


def make_turn(
    role: object, content: object, trained: bool | None = None, tools: object = None
) -> Turn:
    """Check one message.

    Args:
        role: Who speaks; whether the template knows the role shows when it is rendered.
        content: What is said.
        trained: Whether the loss counts it; by default what the assistant says counts.
        tools: Text, or None.

    Raises:
        DataError: The role is not a word, or the content or the tools are not text.
    """
    # Templates write the role where special tokens are: text in it could speak for another
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise DataError(f"unknown role {role!r}, expected a word such as {', '.join(ROLES)}")
    said = _text(f"the {role} content", content)
    described = None if tools is None else _text(f"tools of the {role} message", tools)
    return Turn(role, said, role == "assistant" if trained is None else trained, described)


def kind(value: object) -> str:
    """Name the type of a JSON value for an error message."""
    return "null" if value is None else type(value).__name__


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, expected a string")
    if SURROGATE.search(value):
        raise DataError(f"{name} is not valid Unicode: it has half a surrogate pair")
    return value
