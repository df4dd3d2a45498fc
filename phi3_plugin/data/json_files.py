"""Values of a JSON text: one a line, or the elements of one list."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from phi3_plugin.errors import DataError

SPACE = re.compile(r"[ \t\n\r]*")


def is_spread(text: str) -> bool:
    """Whether the first value is written over several lines, as by a pretty-printer.

    Args:
        text: The beginning of a file, without space before it.
    """
    try:
        _, end = SKIPPER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def lines(stream: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Return each line that is not blank: its number, and its value or why there is none."""
    # The stream breaks lines at \n, \r\n and \r. str.splitlines would break at U+2028 and the
    # like, which JSON may hold as they are
    return ((n, _value(line)) for n, line in enumerate(stream, 1) if not line.isspace())


def elements(text: str) -> Iterator[Any]:
    """Return the elements of a list: each its value, or why there is none.

    Raises:
        json.JSONDecodeError: The list is broken.
    """
    at = _after(text, text.index("[") + 1)
    if not text.startswith("]", at):
        value, at = _element(text, at)
        yield value
        while text.startswith(",", at):
            value, at = _element(text, _after(text, at + 1))
            yield value
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ','", text, at)
    if (at := _after(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, at)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)

SKIPPER = json.JSONDecoder(parse_int=len)
"""Finds where a value ends, also one that JSON allows and :data:`DECODER` does not."""


def _value(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except ValueError as error:
        return DataError(f"broken JSON: {error}")
    except RecursionError:
        return DataError("broken JSON: nested too deeply")


def _element(text: str, at: int) -> tuple[Any, int]:
    """Return the value at a place, or why there is none, and the place of what comes next."""
    try:
        _, end = SKIPPER.raw_decode(text, at)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, at) from error
    # By itself, so that a key that is there twice is an error of this row and not of the file
    return _value(text[at:end]), _after(text, end)


def _after(text: str, at: int) -> int:
    """Return the next place that is no space."""
    space = SPACE.match(text, at)
    assert space is not None  # It matches the empty text too
    return space.end()
