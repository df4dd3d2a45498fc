"""Values of a JSON file, one at a time: one a line, or the elements of one list."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from phi3_plugin.errors import DataError

BLOCK = 1 << 16
"""Characters read at once."""

NEAR = 16
"""A word or an escape that the end of a block cuts off is shorter."""

SPACE = re.compile(r"[ \t\n\r]*")


def is_list(stream: IO[str]) -> bool:
    """Whether the text is one JSON list, judged by the first character that is no space."""
    while block := stream.read(BLOCK):
        if found := block.lstrip():
            return found[0] == "["
    return False


def is_spread(stream: IO[str], file: Path) -> bool:
    """Whether the first value is written over several lines, as by a pretty-printer."""
    reader = _Reader(stream, file)
    reader.peek()
    first = reader.line()
    try:
        reader.value()
    except DataError:
        return False
    return reader.line() > first


def lines(stream: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Return each line that is not blank: its number, and its value or why there is none."""
    # The stream breaks lines at \n, \r\n and \r. str.splitlines would break at U+2028 and the
    # like, which JSON may hold as they are
    return ((n, _value(line)) for n, line in enumerate(stream, 1) if not line.isspace())


def elements(stream: IO[str], file: Path) -> Iterator[Any]:
    """Return the elements of a list: each its value, or why there is none.

    Raises:
        DataError: The list is broken.
    """
    reader = _Reader(stream, file)
    reader.take("[")
    if reader.peek() != "]":
        yield reader.value()
        while reader.peek() != "]":
            reader.take(",")
            yield reader.value()
    reader.take("]")
    if reader.peek():
        reader.fail("Extra data after the list")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)

SKIPPER = json.JSONDecoder(parse_int=len)
"""Finds where a value ends that JSON allows and :data:`DECODER` does not."""


def _value(line: str) -> Any:
    try:
        return DECODER.decode(line)
    except ValueError as error:
        return DataError(f"broken JSON: {error}")
    except RecursionError:
        return DataError("broken JSON: nested too deeply")


class _Reader:
    """A text of which only what is not read yet is held, and a block at most beyond that."""

    def __init__(self, stream: IO[str], file: Path) -> None:
        self._stream, self._file = stream, file
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """Return the next character that is no space; at the end the empty text."""
        while True:
            found = SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        """Go past a character."""
        if self.peek() != expected:
            self.fail(f"Expecting {expected!r}")
        self._at += 1

    def value(self) -> Any:
        """Return the next value, or why there is none."""
        self.peek()
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more():
                    self.fail(error.msg, error.pos)
                continue
            # What ends near the end of the text may go on, as 1 does in 1e+9
            if end < len(self._text) - NEAR or not self._more():
                self._at = end
                return value

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Say what is broken, and in which line."""
        raise DataError(
            f"dataset.source: {self._file} is broken JSON: {problem} (line {self.line(at)}). "
            "Expected one list of objects, or one object a line."
        )

    def line(self, at: int | None = None) -> int:
        """Return the line of a place in the text; by default of what is read next."""
        return self._line + self._text.count("\n", 0, self._at if at is None else at)

    def _decode(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            end = SKIPPER.raw_decode(self._text, self._at)[1]
            return DataError(f"broken JSON: {error}"), end
        except RecursionError:
            self.fail("nested too deeply")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        # A string is reported where it starts, all else where the text ends
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - NEAR

    def _more(self) -> bool:
        # Twice as much for a value that is longer than a block, so that it is not tried often
        block = self._stream.read(max(BLOCK, len(self._text) - self._at))
        if block:
            self._line += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)
