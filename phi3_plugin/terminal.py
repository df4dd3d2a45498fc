"""The one door to the terminal: what strangers wrote is shown, and does nothing there.

A file's name, a column, a template's message or a model's answer may hold characters that clear a
screen, hide text or set a title. Only the standard library, since errors pass here too.
"""

import errno
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from textwrap import fill
from typing import Any, NoReturn, TextIO

from phi3_plugin.launch import STOPPED

INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Unicode categories of what shows nothing, looks like a space, or changes how others show."""

NO_JOINER = "\u200c"
TAGS = frozenset(map(chr, range(0xE0020, 0xE0080)))
JOINING = {NO_JOINER, "\u200d", *TAGS}
"""Invisible, but where they join emoji or letters."""
FLAGS = tuple(
    "\N{WAVING BLACK FLAG}" + "".join(chr(0xE0000 + ord(letter)) for letter in f"{region}\x7f")
    for region in ("gbeng", "gbsct", "gbwls")
)
"""Of England, Scotland and Wales: emoji that are spelled in tags."""
EMOJI_ENDS = {"\ufe0f", *map(chr, range(0x1F3FB, 0x1F400))}
"""After an emoji, and of it: in color, and tones of the skin."""
VIRAMA = 9
"""Its combining class."""

LINES, CHARACTERS = 40, 4000
"""Of an error: about a screen. ``PHI3_PLUGIN_TRACEBACK=1`` shows all of it."""

AFTER_THE_FIRST = 10.0
"""Seconds by which other processes of a run wait with their error: the first one has to end."""


def harmless(text: str) -> str:
    r"""Spell out, as ``\x1b`` or ``\u202e``, what could drive a terminal or hide in a page.

    Plain spaces, line ends and tabs stay, and so do letters of every script and emoji, with what
    joins them.
    """
    return "".join(
        char if char in JOINING and _joins(text, i) else _visible(char)
        for i, char in enumerate(text)
    )


def _joins(text: str, i: int) -> bool:
    """Whether an invisible character makes one sign of its neighbours.

    Source: emoji in Unicode TS 51, ED-16 and ED-14a; letters in RFC 5892, A.1 and A.2.
    """
    char, before, after = text[i], text[max(0, i - 1) : i], text[i + 1 : i + 2]
    if char in TAGS:
        start = text.rfind(FLAGS[0][0], max(0, i - len(FLAGS[0])), i)
        return start >= 0 and text.startswith(FLAGS, start)
    if not before or not after:
        return False
    if unicodedata.combining(before) == VIRAMA:
        return True
    if char == NO_JOINER:
        return unicodedata.bidirectional(before) == unicodedata.bidirectional(after) == "AL"
    is_emoji = unicodedata.category(before) == "So" or before in EMOJI_ENDS
    return is_emoji and (unicodedata.category(after) == "So" or after == "\N{LEFT RIGHT ARROW}")


def _visible(char: str) -> str:
    if char in " \n\t" or unicodedata.category(char) not in INVISIBLE:
        return char
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def for_stdout(text: str) -> str:
    """Return a text that the terminal's encoding can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def in_lines(text: str, *, is_terminal: bool | None = None) -> str:
    """Return a text whose lines a terminal need not break within a word.

    For anything else it stays as it is: whoever searches a log finds sentences whole.

    Args:
        text: Any lines.
        is_terminal: Whether it is going to a terminal; None asks stdout.
    """
    if not (sys.stdout.isatty() if is_terminal is None else is_terminal):
        return text
    width = shutil.get_terminal_size().columns
    lines = [
        fill(line, width, break_long_words=False, break_on_hyphens=False)
        if len(line) > width
        else line
        for line in text.split("\n")
    ]
    return "\n".join(lines)


def show_error(error: BaseException) -> None:
    """Print an error of ours in one line, or as few as it has, to stderr.

    Of several processes that find the same mistake the first one says so: the launcher ends the
    others while they wait. What only another one has met is said by that one.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(AFTER_THE_FIRST)
    text = harmless(f"phi3_plugin: {type(error).__name__}: {error}")
    shown = "\n".join(text.split("\n")[:LINES])[:CHARACTERS]
    if len(shown) < len(text):
        shown += f" … and {len(text) - len(shown):,} characters more (PHI3_PLUGIN_TRACEBACK=1)"
    print(shown, file=sys.stderr, flush=True)


def end_stopped() -> NoReturn:
    """End a command that Ctrl-C has met where it had nothing to say of its own, in one line."""
    with suppress(OSError):  # the terminal may be gone
        print("\nphi3_plugin: stopped.", file=sys.stderr, flush=True)
    os._exit(STOPPED)


@contextmanager
def outlived() -> Iterator[None]:
    """Within it nothing fails for what stdout and stderr cannot take: a run outlives its terminal.

    A terminal that was closed, a reader of a pipe that has ended, a full disk under a log.
    """
    with redirect_stdout(_Outlived(sys.stdout)), redirect_stderr(_Outlived(sys.stderr)):
        yield


class _Outlived:
    """A stream whose texts are lost where they cannot be written."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None where the command was started without

    def write(self, text: str) -> int:
        if self._stream is not None:
            with self._losing(self._stream):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._losing(self._stream):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _losing(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):  # gone for good; a full disk may get room
                with suppress(OSError, ValueError):  # a stream of a notebook has no number
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
