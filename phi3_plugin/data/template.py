r"""From a conversation to its text: the chat template, and where the messages stand in it.

The template in the checkpoint is the only truth. Those of the Phi-3 family differ::

    <s><|user|>\n{content}<|end|>\n<|assistant|>\n       launch, April 2024: no system message
    <|user|>\n{content}<|end|>\n<|assistant|>\n          Phi-3-medium: the same without <s>
    <|user|>\n{content}<|end|>\n … <|endoftext|>         mini since June 2024, Phi-3.5
    <|user|>{content}<|end|> … <|endoftext|>             Phi-4-mini
    <|im_start|>user<|im_sep|>{content}<|im_end|>        Phi-4

So nothing about them is written here. A rendered text does not tell where a message starts, and so
the template renders every shape of conversation (who speaks, which texts are blank) once with marks
in place of the texts. What stands between the marks is the template's own: the layout of all
conversations of this shape. That is proven by the template's syntax where it only writes the texts;
where it may look into them, each conversation is rendered for itself too, and must be its layout
with the texts filled in. Training on a message counts what it says and the added token that
follows, by which the model learns to stop; or all that the template puts in ``{% generation %}``
around it, no more and no less.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.meta import find_undeclared_variables

from phi3_plugin.data.rendering import (
    BOUNDS,
    NOW,
    RenderingError,
    environment,
    is_cheap,
    write_text,
)
from phi3_plugin.data.thoughts import (
    END_OF_THOUGHT,
    THINK,
    THOUGHT_FIELDS,
    begun_thought,
)
from phi3_plugin.data.turns import ROLES, Reads, Turn, Written, make_turn
from phi3_plugin.errors import DataError, TokenizerError

TOKEN = re.compile(r"<\|[^<>|]*\|>")
"""What a special token of the family looks like."""

USER = make_turn("user", " a <b> & {{ 1 }}\n")
ASSISTANT = make_turn("assistant", "\n'c' ", False)
PROBES = (([USER], True), ([USER, ASSISTANT], False), ([USER, ASSISTANT] * 2, False))
"""Conversations that every chat template can be expected to render, and what is asked for."""

UNCLEAR = "turns cannot be told apart"
CHECK_REVISION = "Check that it is the template of this checkpoint's own revision."


class Piece(NamedTuple):
    """A stretch of rendered text that is trained on as a whole or not at all."""

    text: str
    trained: bool
    said: bool = False
    """Whether it is what a message says; the rest is written by the template."""
    weight: float = 1.0
    """How much the loss counts it, if it is trained on."""


class Rendered(NamedTuple):
    """A conversation as the template writes it, in pieces (`Written` is one text of the data)."""

    pieces: list[Piece]
    """Their texts, joined, are what the template renders."""
    turns: Sequence[Turn] = ()
    dropped: tuple[str, ...] = ()
    """What the template leaves out, in words."""
    forgotten: bool = False
    """Whether an answer is not trained on since the template leaves out what was thought before it,
    as it does when the conversation goes on."""

    @property
    def text(self) -> str:
        """What the template renders."""
        return "".join([piece.text for piece in self.pieces])

    def ended(self, token: str) -> "Rendered":
        """Return it with the token at its end, if it does not end in it."""
        if self.text.rstrip().endswith(token):
            return self
        return self._replace(pieces=[*self.pieces, Piece(token, False)])

    def trained_throughout(self) -> "Rendered":
        """Return it with all of its text trained on."""
        return self._replace(pieces=[piece._replace(trained=True) for piece in self.pieces])


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the tokens as a tokenizer does: first the leftmost, longest."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template, and the tokens it may write."""

    source: str
    """The Jinja text."""
    file: str
    """Where it was read, for error messages."""
    special_tokens: Mapping[str, str]
    """``bos_token``, ``eos_token``, … as the template sees them."""
    added: frozenset[str]
    """The added tokens of the tokenizer."""

    def check(self) -> None:
        """Render a few conversations.

        Raises:
            TokenizerError: The template fails, or its turns cannot be told apart.
        """
        for probe, ask in PROBES:
            try:
                dropped = self.render(probe, add_generation_prompt=ask).dropped
                if dropped:
                    raise DataError(f"{UNCLEAR}: the chat template leaves out {dropped[0]}")
            except DataError as error:
                raise TokenizerError(f"{self.file}: {error}. {CHECK_REVISION}") from error

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Render a conversation.

        Args:
            turns: The messages, at least one.
            add_generation_prompt: Ask for an open assistant header, to generate from.

        Raises:
            DataError: There is no message, the template fails on this conversation, or changes
                what it says.
            TokenizerError: No token ends what is trained on.
        """
        if not turns:
            raise DataError("the conversation is empty, expected at least one message")
        # What a row brings along, such as documents, is its own and may be long
        lay_out = _layout.__wrapped__ if turns[-1].variables else _layout
        layout = lay_out(self, shape_of(turns), add_generation_prompt)
        rendered = layout.filled(turns)
        if layout.holds:
            return rendered
        text = self.write(turns, add_generation_prompt=add_generation_prompt)
        for around in ("\n", None):  # which templates strip that write the lines around a thought
            if rendered.text != text and any(turn.thought for turn in turns):
                bare = [turn._replace(thought=(turn.thought or "").strip(around)) for turn in turns]
                rendered = layout.filled(bare)
        if rendered.text != text:
            raise DataError(f"{UNCLEAR}: the chat template changes what the messages say")
        return rendered

    def write(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool, bounds: bool = False
    ) -> str:
        """Return the text of a conversation, as transformers renders it.

        Args:
            turns: The messages.
            add_generation_prompt: Whether the template is asked for an open assistant header.
            bounds: Write `OPEN` and `CLOSE` around what stands in ``{% generation %}``.

        Raises:
            DataError: The template fails, or does not come to an end.
        """
        messages = [
            {
                "role": turn.role,
                "content": turn.content,
                **({} if turn.tools is None else {"tools": turn.tools}),
                **({} if turn.thought is None else {str(self.reads.thought): turn.thought}),
                **json.loads(turn.fields or "{}"),
            }
            for turn in turns
        ]
        of_row = next((turn.variables for turn in turns if turn.variables), "{}")
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            **json.loads(of_row),
            "add_generation_prompt": add_generation_prompt,
            **(dict(zip(BOUNDS, (OPEN, CLOSE), strict=True)) if bounds else {}),
            **self.special_tokens,
        }
        try:
            return write_text(self.source, variables)
        except RenderingError as error:
            raise DataError(f"the chat template failed: {error}") from error

    @property
    def identity(self) -> list[Any]:
        """All that decides what is written, as JSON values.

        The date is in the form that the template writes it in, so that what was tokenized is good
        for as long as that stays the same.
        """
        calls = environment().parse(self.source).find_all(nodes.Call)
        dates = list[str]()
        for call in calls:
            match call:
                case nodes.Call(
                    node=nodes.Name(name="strftime_now"), args=[nodes.Const(value=str(form))]
                ):
                    dates.append(NOW.strftime(form))
                case nodes.Call(node=nodes.Name(name="strftime_now")):
                    dates.append(str(NOW))
        return [self.source, dict(self.special_tokens), *dates]

    # Texts that are written already

    def find_answers(self, written: Written) -> Written:
        """Find what the assistant says in a text that was written by this template.

        Raises:
            DataError: No assistant message is found, or one does not end.
        """
        answers = list(self._answer.finditer(written.text))
        if not answers:
            raise DataError(
                f"the text has no assistant message, which would start with {self._header!r}"
            )
        for answer in answers:
            next_turn = self._heads.match(written.text[answer.end() :].lstrip())
            if next_turn is not None:
                raise DataError(
                    f"an assistant message goes on into {next_turn[0]!r}, expected "
                    f"{self.turn_end!r} before it"
                )
        begun, spans = self.begins_with, [answer.span(1) for answer in answers]
        said = [
            (start + len(begun) * written.text.startswith(begun, start, end), end)
            for start, end in spans
        ]
        return written._replace(said=tuple(said))

    def cut_up(self, written: Written, trained: Sequence[tuple[int, int]]) -> Rendered:
        """Cut a text that is written already into pieces.

        Args:
            written: The text.
            trained: [start, end) of what is trained on; the token that follows is too.
        """
        text = written.text
        pieces = list[Piece]()
        at = 0
        for start, stop in trained:
            end = self.ending.match(text, stop)
            pieces += [Piece(text[at:start], False), Piece(text[start:stop], True, said=True)]
            at = end.end() if end else stop
            pieces.append(Piece(text[stop:at], True))
        pieces.append(Piece(text[at:], False))
        return Rendered([piece for piece in pieces if piece.text])

    @cached_property
    def only_writes(self) -> bool:
        """Whether the template does nothing with texts but to write them, see `WritesOnly`."""
        # All published templates are cheap, and no syntax of those that are is deep
        return is_cheap(self.source) and WritesOnly().allows(environment().parse(self.source))

    @cached_property
    def reads(self) -> Reads:
        """What it may read beside role, content and tools of a message."""
        tree = environment().parse(self.source)
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        known = {"messages", "add_generation_prompt", *self.special_tokens, *BOUNDS}
        variables = find_undeclared_variables(tree) - environment().globals.keys() - known
        whole = (node.name in WHOLE and _is_name(node.node) for node in tree.find_all(nodes.Filter))
        fields = None if names & {"items", "values"} or any(whole) else frozenset(names | texts)
        if "tools" in names | texts:  # of the system message, where we put them
            variables -= {"tools"}
        return Reads(fields, frozenset(variables))

    # What the template shows of itself when it renders a question and an answer

    @cached_property
    def begins_with(self) -> str:
        """What a prompt ends in that an answer begins with: ``<think>``, as a rule nothing."""
        return begun_thought(self.write([USER], add_generation_prompt=True))

    @cached_property
    def opens_thought(self) -> str:
        """What the template writes before a thought and no prompt ends in: the model writes it.

        Raises:
            DataError: The template begins an answer in another way than a prompt ends.
        """
        mark = "Qz0zK"
        answered = [USER, ASSISTANT._replace(thought=mark)]
        before, _, _ = self.write(answered, add_generation_prompt=False).partition(mark)
        asked = self.write([USER], add_generation_prompt=True)
        if not before.startswith(asked) and not asked.startswith(before):
            raise DataError(f"{UNCLEAR}: a thought does not follow what a prompt ends in")
        return before[len(asked) :]

    @cached_property
    def turn_end(self) -> str | None:
        """The added token after what the assistant says, if there is one."""
        last = self._example[-1]
        end = self.ending.match("" if last.said else last.text)
        return end[1] if end else None

    @cached_property
    def tokens(self) -> re.Pattern[str]:
        """Finds the added tokens in a text."""
        return token_pattern(self.added)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Finds those that no message should hold: all but the marks around thoughts."""
        return token_pattern(self.added - {THINK, END_OF_THOUGHT})

    @cached_property
    def ending(self) -> re.Pattern[str]:
        """Matches the added token that comes next in a text, and the white space before it."""
        return re.compile(rf"\s*({self.tokens.pattern})")

    @cached_property
    def _example(self) -> list[Piece]:
        return self.render([USER, ASSISTANT]).pieces

    @cached_property
    def _header(self) -> str:
        """What the template writes before what the assistant says, and after what ends a turn."""
        # The pieces end in: header, what the assistant says, and mostly what ends the turn
        before = self._example[-2 if self._example[-1].said else -3]
        return re.sub(rf"^\s*{re.escape(self.turn_end or '')}\s*", "", before.text)

    @cached_property
    def _answer(self) -> re.Pattern[str]:
        header = self._header.rstrip()
        space = re.escape(self._header[len(header) :])
        end = re.escape(self.turn_end or "")
        stop = rf"(?=\s*{end}|\s*(?:{self._heads.pattern})|\Z)"
        return re.compile(rf"{re.escape(header)}(?:{space})?(.*?){stop}", re.DOTALL)

    @cached_property
    def _heads(self) -> re.Pattern[str]:
        """The added tokens that a turn begins with."""
        roles = [token for token in self.added if any(role in token for role in ROLES)]
        return token_pattern([*roles, *self.tokens.findall(self._header)[:1]])


WHOLE = ("tojson", "items", "dictsort", "string", "list", "pprint")
"""Filters that show all that a message has."""


def _is_name(node: nodes.Node | None) -> bool:
    return isinstance(node, nodes.Name)


# The layout of a shape of conversation

TEXTS = ("content", "tools", "thought")
"""What of a turn is a text, which every conversation of a shape has its own of."""

LEAD = "\u2003"
TAIL = "\u2002"
"""White space before and after a mark: it is missing where the template trims. Two kinds, so that
each shows by itself, and none that a template would look for."""

MARK = re.compile(rf"({LEAD}?)Qz(\d+)zK({TAIL}?)")
"""A mark, numbered, in letters that are no word in any template."""

OPEN = "QzOzK"
CLOSE = "QzCzK"
"""Around each ``{% generation %}``, by which a template says what the assistant generates."""

BOUND = re.compile(f"{OPEN}|{CLOSE}|{MARK.pattern}")


class Slot(NamedTuple):
    """A place for a text of the conversation."""

    turn: int
    """Index of the message."""
    field: str
    """One of `TEXTS`."""
    trained: bool
    lead: bool = True
    """Whether white space before the text is kept."""
    tail: bool = True
    """Whether white space after the text is kept."""
    is_asked: bool = False
    """Whether a prompt that ends before it may end in the beginning of its text."""

    def text_in(self, turns: Sequence[Turn]) -> str:
        """Return the conversation's text for this place."""
        return getattr(turns[self.turn], self.field) or ""

    def fill(self, turns: Sequence[Turn]) -> Piece:
        """Put the conversation's text in."""
        return Piece(self.trim(self.text_in(turns)), self.trained, said=True)

    def trim(self, text: str) -> str:
        """Take the white space off that is not kept."""
        text = text if self.lead else text.lstrip()
        return text if self.tail else text.rstrip()


class Layout(NamedTuple):
    """How a template lays out all conversations of one shape."""

    parts: list[Piece | Slot]
    dropped: tuple[str, ...]
    """What the template leaves out, in words."""
    holds: bool
    """Whether it is known to be the layout of all of them: the template only writes texts, and none
    of these is blank, which it may ask."""
    forgotten: bool
    """See `Rendered`."""
    begins_with: str
    """What a prompt has of an answer already, if that begins so: it is not trained on."""

    def filled(self, turns: Sequence[Turn]) -> Rendered:
        """Put the texts of a conversation in."""
        pieces = [part.fill(turns) if isinstance(part, Slot) else part for part in self.parts]
        if any(turn.weight != 1 for turn in turns):
            pieces = [*self._weighted(pieces, turns)]
        if self.begins_with:
            pieces = [*self._without_begun(pieces)]
        return Rendered(pieces, turns, self.dropped, self.forgotten)

    def _weighted(self, pieces: Iterable[Piece], turns: Sequence[Turn]) -> Iterator[Piece]:
        # What ends a message counts as it does, and what comes before all as the first
        weight = next((turns[part.turn].weight for part in self.parts if isinstance(part, Slot)), 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            if isinstance(part, Slot):
                weight = turns[part.turn].weight
            yield piece._replace(weight=weight)

    def _without_begun(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for part, piece in zip(self.parts, pieces, strict=True):
            if isinstance(part, Slot) and part.is_asked and piece.text.startswith(self.begins_with):
                yield piece._replace(text=self.begins_with, trained=False)
                piece = piece._replace(text=piece.text.removeprefix(self.begins_with))
            yield piece


def shape_of(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the conversation with ``x`` for every text, and blank ones at most a space long.

    What else the template reads stays: it may write that, or decide by it.
    """
    return tuple(
        [
            Turn(
                role,
                _outline(content),
                trained,
                tools and _outline(tools),
                None,
                False,
                fields,
                variables,
                thought and _outline(thought),
            )
            for role, content, trained, tools, _, _, fields, variables, thought, _ in turns
        ]
    )


def _outline(text: str) -> str:
    if not text:
        return ""
    return " " if text.isspace() else "x"


@lru_cache(maxsize=4096)
def _layout(template: ChatTemplate, shape: tuple[Turn, ...], ask: bool) -> Layout:
    """Render a shape with marks for texts, and tell the marks from what the template writes."""
    marked = MarkedShape(template, shape, ask)
    dropped = tuple(marked.dropped())
    forgotten = any(shape[turn].trained for turn in marked.forgotten)
    parts = list[Piece | Slot]()
    before: Slot | None = None
    blocks = list[int]()  # where in the parts each open {% generation %} begins
    at = 0
    for mark in BOUND.finditer(marked.text):
        between = marked.text[at : mark.start()]
        at = mark.end()
        if mark[0] in (OPEN, CLOSE):
            parts += _template_pieces(template, between, before, None)
            before = None if between else before
            if mark[0] == OPEN:
                blocks.append(len(parts))
                continue
            start = blocks.pop()
            trained = any(isinstance(part, Slot) and part.trained for part in parts[start:])
            parts[start:] = [part._replace(trained=trained) for part in parts[start:]]
            continue
        slot = marked.slot(mark)
        if slot.turn in marked.forgotten:
            slot = slot._replace(trained=False)
        role = shape[slot.turn].role if slot.field != "tools" else None
        if before is not None and before.field == "thought" and before.turn == slot.turn:
            _refuse_unknown(template, between)
            parts.append(Piece(between, slot.trained))
        elif slot.field == "thought" and slot.trained and not blocks:
            opening = template.opens_thought
            if not between.endswith(opening):
                raise DataError(f"{UNCLEAR}: a thought begins in another way than elsewhere")
            header = between.removesuffix(opening)
            parts += _template_pieces(template, header, before, role)
            parts.append(Piece(opening, True))
        else:
            parts += _template_pieces(template, between, before, role)
            if slot.field == "content" and slot.trained and role == "assistant" and not blocks:
                slot = slot._replace(is_asked=True)
        parts.append(slot)
        before = None if blocks else slot
    parts += _template_pieces(template, marked.text[at:], before, None)
    texts = {text for turn in shape for name in TEXTS if (text := getattr(turn, name)) is not None}
    holds = texts == {"x"} and template.only_writes
    return Layout(_joined(parts), dropped, holds, forgotten, template.begins_with)


def _joined(parts: Iterable[Piece | Slot]) -> list[Piece | Slot]:
    """Put texts of the template together that stand side by side and are trained alike."""
    joined = list[Piece | Slot]()
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Piece) and isinstance(last, Piece) and part.trained is last.trained:
            joined[-1] = last._replace(text=last.text + part.text)
        else:
            joined.append(part)
    return joined


MOST_WORK = 300_000
"""Messages that may be rendered to find out what a template does with those that are blank, a few
seconds long; a conversation with a hundred of each takes ten thousand."""


class MarkedShape:
    r"""A shape of conversation whose texts are marks, and what the template makes of it.

    The shape of a question and an answer, as the template in Phi-3-mini writes it, with ``[`` for
    `LEAD` and ``]`` for `TAIL`::

        <|user|>\n[Qz0zK]<|end|>\n<|assistant|>\n[Qz1zK]<|end|>\n<|endoftext|>

    Mark 0 is the content of turn 0, mark 1 that of turn 1, and all else is the template's. One that
    trims gives ``Qz0zK`` without the white space, and so the slot keeps none.

    A blank text gets a mark too, unless the template does more with it than to write it: where
    ``{% if message['content'] %}`` leaves an empty message out, a mark would bring it back. So each
    blank text is tried, and stays blank if the template then writes something else than the marked
    text with the blank filled in.
    """

    def __init__(self, template: ChatTemplate, shape: Sequence[Turn], ask: bool) -> None:
        """Render the shape with marks, and once more for each blank text."""
        self._template = template
        self._shape = shape
        self._ask = ask
        self._slots = [
            Slot(i, field, turn.trained)
            for i, turn in enumerate(shape)
            for field in TEXTS
            if getattr(turn, field) is not None
        ]
        self._texts = [f"{LEAD}Qz{n}zK{TAIL}" for n in range(len(self._slots))]
        """What stands in each slot: a mark, or a blank text."""
        self._work = 0
        self.text = self._render(self._texts)
        """What the template makes of it."""
        texts = {n: slot.text_in(shape) for n, slot in enumerate(self._slots)}
        blanks = {n: text for n, text in texts.items() if not text.strip()}
        if len(blanks) > 1:
            all_blank = [blanks.get(n, mark) for n, mark in enumerate(self._texts)]
            if self._render(all_blank) == self._filled(blanks):
                return  # the template writes them like any other
        for n, blank in blanks.items():
            one_blank = self._with(n, blank)
            rendered = self._render(one_blank)
            if rendered != self._filled({n: blank}):
                self._texts = one_blank
                self.text = rendered

    def slot(self, mark: re.Match[str]) -> Slot:
        """Return the slot of a mark, and which white space it keeps there."""
        slot = self._slots[int(mark[2])]
        return slot._replace(lead=bool(mark[1]), tail=bool(mark[3]))

    def dropped(self) -> Iterator[str]:
        """Yield what is left out, in words; of blank texts only those that are trained on.

        Raises:
            DataError: A text is repeated, or changed into another.
        """
        marks = Counter(int(mark[2]) for mark in MARK.finditer(self.text))
        for n, slot in enumerate(self._slots):
            if marks[n] == 1:
                continue
            if slot.field == "thought" and slot.turn in self.forgotten:
                continue
            part = "" if slot.field == "content" else f"the {slot.field} of "
            name = f"{part}the {self._shape[slot.turn].role} message"
            is_marked = MARK.search(self._texts[n])
            if is_marked and self._render(self._with(n, "another text")) != self.text:
                raise DataError(f"{UNCLEAR}: the chat template changes or repeats {name}")
            if slot.trained or slot.text_in(self._shape).strip():
                yield name

    @cached_property
    def forgotten(self) -> set[int]:
        """The turns whose thought is left out, and was not before the conversation went on.

        Their answers are not learned: when the model gives one, it has thought before it.
        """
        marks = {int(mark[2]) for mark in MARK.finditer(self.text)}
        thoughts = [(n, slot) for n, slot in enumerate(self._slots) if slot.field == "thought"]
        turns = self._turns_with(self._texts)
        return {
            slot.turn
            for n, slot in thoughts
            if n not in marks
            and f"Qz{n}zK"
            in self._template.write(turns[: slot.turn + 1], add_generation_prompt=False)
        }

    def _filled(self, texts: Mapping[int, str]) -> str:
        """Return what was rendered, with texts in place of their marks."""

        def fill(mark: re.Match[str]) -> str:
            text = texts.get(int(mark[2]))
            return mark[0] if text is None else self.slot(mark).trim(text)

        return MARK.sub(fill, self.text)

    def _with(self, n: int, text: str) -> list[str]:
        """Return what stands in the slots, with a text in slot n."""
        return [*self._texts[:n], text, *self._texts[n + 1 :]]

    def _render(self, texts: Sequence[str]) -> str:
        """Return what the template makes of the shape with these texts in the slots.

        Raises:
            DataError: It was asked too often, for so long a conversation.
        """
        self._work += len(self._shape)
        if self._work > MOST_WORK:
            raise DataError(
                f"the conversation has {len(self._shape)} messages, and too many of them are blank "
                "or left out by the chat template. Split it, or remove those"
            )
        turns = self._turns_with(texts)
        return self._template.write(turns, add_generation_prompt=self._ask, bounds=True)

    def _turns_with(self, texts: Sequence[str]) -> list[Turn]:
        turns = list(self._shape)
        for slot, text in zip(self._slots, texts, strict=True):
            changed: dict[str, Any] = {slot.field: text}
            turns[slot.turn] = turns[slot.turn]._replace(**changed)
        return turns


def _template_pieces(
    template: ChatTemplate, text: str, before: Slot | None, role: str | None
) -> list[Piece]:
    """Check what the template writes between two texts; what ends a trained one is trained too.

    Args:
        template: Writes it.
        text: What it writes.
        before: The text that comes before.
        role: Who speaks after it, if this is a header.
    """
    _refuse_unknown(template, text)
    # A template that takes any role would let a misspelt one pass. (`turn_end` renders an example,
    # which comes here too, but has no such role.)
    if role is not None and role not in ROLES:
        ends = {*template.special_tokens.values(), template.turn_end}
        if not any(role in token for token in {*template.tokens.findall(text)} - ends):
            raise DataError(f"unknown role {role!r}: the chat template has no special token for it")
    if before is None or not before.trained:
        return [Piece(text, False)] if text else []
    end = template.ending.match(text)
    if end is None:
        raise TokenizerError(
            f"{template.file}: the chat template writes {text[:20]!r} after a message that is "
            "trained on, and no added token of tokenizer.json: the model would never learn to "
            f"stop. {CHECK_REVISION}"
        )
    rest = text[end.end() :]
    return [Piece(end[0], True), *([Piece(rest, False)] if rest else [])]


def _refuse_unknown(template: ChatTemplate, text: str) -> None:
    unknown = [token for token in TOKEN.findall(text) if token not in template.added]
    if unknown:
        raise DataError(
            f"the chat template writes {', '.join(unknown)}, no added token of tokenizer.json"
        )


# What the syntax of a template proves


class WritesOnly:
    """Looks for what a template does with texts beside writing them.

    Allowed is what cannot tell one text from another, if neither is blank: to write it, whole or
    trimmed, with ``+`` and ``~`` beside others, and to ask whether it is there::

        {{ '<|user|>' + message['content'] + '<|end|>' }}    {% if message['content'] %}

    Messages are reached through ``messages``, by an index or a loop, and of a message the role and
    other fields may be used for anything: they are a part of the shape. All that is not known here
    is not allowed, as ``message['content'] | length``, a variable or a macro that is given a text,
    or a whole message.
    """

    def __init__(self) -> None:
        """Know of no loop yet."""
        self._loops = set[str]()
        """Variables that stand for a message."""

    def allows(self, node: nodes.Node) -> bool:
        """Whether a statement, with all in it, only writes texts."""
        match node:
            case nodes.Output():
                return all(map(self._is_written, node.nodes))
            case nodes.If():
                inner = [*node.body, *node.elif_, *node.else_]
                return self._is_asked(node.test) and all(map(self.allows, inner))
            case nodes.For():
                if self._is_list(node.iter) and isinstance(node.target, nodes.Name):
                    self._loops.add(node.target.name)
                elif not self._is_textless(node.iter):
                    return False
                if node.test is not None and not self._is_asked(node.test):
                    return False
                return all(map(self.allows, [*node.body, *node.else_]))
            case nodes.Assign():
                return self._is_textless(node.node)
            case nodes.Template() | nodes.Scope():
                return all(map(self.allows, node.body))
        return isinstance(node, nodes.Continue | nodes.Break)

    def _is_written(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Add():
                return self._is_written(node.left) and self._is_written(node.right)
            case nodes.Concat():
                return all(map(self._is_written, node.nodes))
        return self._is_text(node) or self._is_textless(node)

    def _is_asked(self, node: nodes.Node) -> bool:
        match node:
            case nodes.And() | nodes.Or():
                return self._is_asked(node.left) and self._is_asked(node.right)
            case nodes.Not():
                return self._is_asked(node.node)
            case nodes.Test(name="none" | "defined" | "string"):
                return self._is_text(node.node) or self._is_textless(node.node)
        return self._is_text(node) or self._is_textless(node)

    def _is_text(self, node: nodes.Node) -> bool:
        """Whether it is what a message says, perhaps trimmed, or its tools."""
        match node:
            case nodes.Filter(name="trim", args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
                return node.node is not None and self._is_text(node.node)
        return self._field(node) in ("content", "tools", *THOUGHT_FIELDS)

    def _is_textless(self, node: nodes.Node) -> bool:
        """Whether a value depends on the shape of the conversation alone."""
        if (field := self._field(node)) is not None:
            return field not in ("content", "tools", *THOUGHT_FIELDS)
        match node:
            case nodes.Name():
                return node.name not in {"messages", "loop", *self._loops}
            case nodes.Getattr(node=nodes.Name(name="loop")):
                return node.attr in ("first", "last", "index", "index0", "length")
            case nodes.Compare(expr=nodes.Const(), ops=[nodes.Operand(op="in" | "notin") as right]):
                if self._is_message(right.expr):
                    return True
        return all(map(self._is_textless, node.iter_child_nodes()))

    def _is_list(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Getitem(arg=nodes.Slice()):
                return self._is_list(node.node) and self._is_textless(node.arg)
        return isinstance(node, nodes.Name) and node.name == "messages"

    def _is_message(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Getitem(arg=nodes.Const() | nodes.Neg()):
                return self._is_list(node.node)
        return isinstance(node, nodes.Name) and node.name in self._loops

    def _field(self, node: nodes.Node) -> str | None:
        """Return which field of a message it is; None if it is none."""
        match node:
            case nodes.Getitem(arg=nodes.Const() as key) if self._is_message(node.node):
                return str(key.value)
            case nodes.Getattr() if self._is_message(node.node):
                return str(node.attr)
        return None
