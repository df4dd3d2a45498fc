"""Where a chat template puts what the messages say.

A rendered text does not tell where a message starts. So the template renders the conversation
once more with a mark in place of every text; what stands between the marks is the template's
own. The layout depends only on the shape of a conversation: who speaks, what is empty.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from phi3_plugin.data.turns import Turn
from phi3_plugin.errors import DataError

LEAD, TAIL = "\u2003", "\u2002"
"""White space around a mark: it is missing where the template trims."""

UNCLEAR = "turns cannot be told apart"

MARK = re.compile(rf"({LEAD}?)Qz(\d+)zK({TAIL}?)")


class Piece(NamedTuple):
    """A stretch of rendered text that is trained on as a whole or not at all."""

    text: str
    trained: bool
    said: bool = False
    """Whether it is what a message says; the rest is written by the template."""


class Slot(NamedTuple):
    """A place for a text of the conversation."""

    turn: int
    """Index of the message."""
    field: str
    """``content`` or ``tools``."""
    trained: bool
    lead: bool = True
    """Whether white space before the text is kept."""
    tail: bool = True
    """Whether white space after the text is kept."""

    def fill(self, turns: Sequence[Turn]) -> Piece:
        """Put the conversation's text in."""
        return Piece(self.said(turns), self.trained, said=True)

    def said(self, turns: Sequence[Turn]) -> str:
        """Return the conversation's text as it is written here."""
        turn = turns[self.turn]
        text = turn.content if self.field == "content" else turn.tools or ""
        return text if self.lead and self.tail else self.trim(text)

    def trim(self, text: str) -> str:
        """Take the white space off that is not kept."""
        text = text if self.lead else text.lstrip()
        return text if self.tail else text.rstrip()


@dataclass(frozen=True, eq=False)
class Layout:
    """How a template lays out all conversations of one shape; or one that was rendered before."""

    parts: tuple[Piece | Slot, ...]
    dropped: tuple[str, ...] = ()
    """What the template leaves out, in words."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Lay out a conversation."""
        return [part if isinstance(part, Piece) else part.fill(turns) for part in self.parts]

    def text(self, turns: Sequence[Turn]) -> str:
        """Return the pieces' texts, joined."""
        return "".join([p.text if isinstance(p, Piece) else p.said(turns) for p in self.parts])

    def ended(self, token: str, *, trained: bool) -> "Layout":
        """Return the layout with the token at its end, if it does not end in it."""
        if trained not in self._ended:
            last = self.parts[-1] if self.parts else None
            has_it = isinstance(last, Piece) and last.text.rstrip().endswith(token)
            end = () if has_it else (Piece(token, trained),)
            self._ended[trained] = Layout((*self.parts, *end), self.dropped) if end else self
        return self._ended[trained]

    @cached_property
    def notes(self) -> dict[object, Any]:
        """What others found out about the layout."""
        return {}

    @cached_property
    def _ended(self) -> dict[bool, "Layout"]:
        return {}


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    layout: Layout
    turns: Sequence[Turn] = ()

    @property
    def pieces(self) -> list[Piece]:
        """Their texts, joined, are what the template renders."""
        return self.layout.pieces(self.turns)

    @property
    def text(self) -> str:
        """What the template renders."""
        return self.layout.text(self.turns)

    @property
    def dropped(self) -> tuple[str, ...]:
        """What the template leaves out, in words."""
        return self.layout.dropped


def shape_of(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the conversation with ``x`` for every text, and blank ones at most a space long."""
    return tuple(
        [
            Turn(role, _outline(content), trained, tools if tools is None else _outline(tools))
            for role, content, trained, tools, _ in turns
        ]
    )


def _outline(text: str) -> str:
    return "x" if text and not text.isspace() else text[:1] and " "


class Marked:
    """A conversation whose texts are marks, and what the template makes of it."""

    def __init__(self, shape: Sequence[Turn], render: Callable[[Sequence[Turn]], str]) -> None:
        """Render the marks. A blank text stays blank where the template does not just write it."""
        self._shape, self._render = shape, render
        self._slots = [
            Slot(i, field, turn.trained)
            for i, turn in enumerate(shape)
            for field in ("content", "tools")
            if getattr(turn, field) is not None
        ]
        self._texts = [f"{LEAD}Qz{n}zK{TAIL}" for n in range(len(self._slots))]
        self._text = self._rendered(self._texts)
        for n, slot in enumerate(self._slots):
            if not self._said(slot).strip():
                self._try_blank(n, slot)

    def cut(self) -> Iterator[tuple[str, Slot | None]]:
        """Yield each stretch of the template's text with the slot after it, if there is one."""
        at = 0
        for found in MARK.finditer(self._text):
            yield self._text[at : found.start()], self._found(found)
            at = found.end()
        yield self._text[at:], None

    def dropped(self) -> Iterator[str]:
        """Yield what is left out, in words; of blank texts only those that are trained on.

        Raises:
            DataError: A text is repeated, or changed into another.
        """
        found = [int(mark[2]) for mark in MARK.finditer(self._text)]
        for n, slot in enumerate(self._slots):
            if found.count(n) == 1:
                continue
            tools = "the tools of " if slot.field == "tools" else ""
            name = f"{tools}the {self._shape[slot.turn].role} message"
            if MARK.search(self._texts[n]) and self._matters(n):
                raise DataError(f"{UNCLEAR}: the chat template changes or repeats {name}")
            if slot.trained or self._said(slot).strip():
                yield name

    def _said(self, slot: Slot) -> str:
        said: str = getattr(self._shape[slot.turn], slot.field)
        return said

    def _found(self, mark: re.Match[str]) -> Slot:
        slot = self._slots[int(mark[2])]
        return slot._replace(lead=bool(mark[1]), tail=bool(mark[3]))

    def _try_blank(self, n: int, slot: Slot) -> None:
        def fill(mark: re.Match[str]) -> str:
            return self._found(mark).trim(blank) if int(mark[2]) == n else mark[0]

        blank = self._said(slot)
        text = self._rendered(self._with(n, blank))
        if text != MARK.sub(fill, self._text):
            self._texts, self._text = self._with(n, blank), text

    def _matters(self, n: int) -> bool:
        return self._rendered(self._with(n, "another text")) != self._text

    def _with(self, n: int, text: str) -> list[str]:
        return [*self._texts[:n], text, *self._texts[n + 1 :]]

    def _rendered(self, texts: Sequence[str]) -> str:
        turns = list(self._shape)
        for slot, text in zip(self._slots, texts, strict=True):
            turn = turns[slot.turn]
            turns[slot.turn] = (
                turn._replace(tools=text) if slot.field == "tools" else turn._replace(content=text)
            )
        return self._render(turns)
