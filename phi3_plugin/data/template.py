r"""A checkpoint's chat template, split into text that is trained on and text that is not.

The template in the checkpoint is the only truth. Those of the Phi-3 family differ::

    <s><|user|>\n{content}<|end|>\n<|assistant|>\n       launch, April 2024: no system message
    <|user|>\n{content}<|end|>\n<|assistant|>\n          Phi-3-medium: the same without <s>
    <|user|>\n{content}<|end|>\n … <|endoftext|>         mini since June 2024, Phi-3.5
    <|user|>{content}<|end|> … <|endoftext|>             Phi-4-mini
    <|im_start|>user<|im_sep|>{content}<|im_end|>        Phi-4

So nothing about them is written here. A conversation is rendered and compared with its layout
(see :mod:`phi3_plugin.data.layout`): other templates work if they keep to theirs. Training on a
message counts what it says and the added token that follows, by which the model learns to stop.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from phi3_plugin.data.added import token_pattern
from phi3_plugin.data.layout import UNCLEAR, Layout, Marked, Piece, Rendered, Slot, shape_of
from phi3_plugin.data.plain import is_plain
from phi3_plugin.data.sandbox import run_template
from phi3_plugin.data.turns import ROLES, Turn, Written, make_turn
from phi3_plugin.errors import DataError, TokenizerError

TOKEN = re.compile(r"<\|[^<>|]*\|>")
"""What a special token of the family looks like."""

USER, ASSISTANT = make_turn("user", " a <b> & {{ 1 }}\n"), make_turn("assistant", "\n'c' ", False)
PROBES = (([USER], True), ([USER, ASSISTANT], False), ([USER, ASSISTANT] * 2, False))
"""Conversations that every chat template can be expected to render, and what is asked for."""


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
            except DataError as error:
                raise TokenizerError(f"{self.file}: {error}. {self._advice}") from error
            if dropped:
                raise TokenizerError(
                    f"{self.file}: {UNCLEAR}: the chat template leaves out {dropped[0]}. "
                    + self._advice
                )

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
        rendered = Rendered(_layout(self, shape_of(turns), add_generation_prompt), turns)
        if not self._is_plain and rendered.text != self._run(turns, add_generation_prompt):
            raise DataError(f"{UNCLEAR}: the chat template changes what the messages say")
        return rendered

    def split(self, written: Written) -> Written:
        """Find what the assistant says in a text that was written by this template.

        Raises:
            DataError: No assistant message is found.
        """
        found = list(self._said.finditer(written.text))
        if not found:
            raise DataError(
                f"the text has no assistant message, which would start with {self._header!r}"
            )
        for said in found:
            self._check_ended(written.text[said.end() :])
        return written._replace(said=tuple(said.span(1) for said in found))

    def _check_ended(self, rest: str) -> None:
        if (next_turn := self._heads.match(rest.lstrip())) is not None:
            raise DataError(
                f"an assistant message goes on into {next_turn[0]!r}, expected {self.turn_end!r} "
                "before it"
            )

    def follow(self, written: Written, trained: Sequence[tuple[int, int]]) -> Rendered:
        """Lay out a text, given where what is trained on stands in it."""
        text, parts, at = written.text, list[Piece](), 0
        for start, stop in trained:
            end = self._end.match(text, stop)
            parts += [Piece(text[at:start], False), Piece(text[start:stop], True, said=True)]
            at = end.end() if end else stop
            parts += [Piece(text[stop:at], True)]
        rest = Piece(text[at:], False)
        return Rendered(Layout(tuple(part for part in (*parts, rest) if part.text)))

    @cached_property
    def turn_end(self) -> str | None:
        """The added token after what the assistant says, if there is one."""
        pieces = self.render([USER, ASSISTANT]).pieces
        end = self._end.match("" if pieces[-1].said else pieces[-1].text)
        return end[1] if end else None

    @cached_property
    def _header(self) -> str:
        """What the template writes before what the assistant says, and after what ends a turn."""
        pieces = self.render([USER, ASSISTANT]).pieces
        before = pieces[-2] if pieces[-1].said else pieces[-3]
        return re.sub(rf"^\s*{re.escape(self.turn_end or '')}\s*", "", before.text)

    @cached_property
    def _said(self) -> re.Pattern[str]:
        header, end = self._header.rstrip(), re.escape(self.turn_end or "")
        space, heads = re.escape(self._header[len(header) :]), self._heads.pattern
        stop = rf"(?=\s*{end}|\s*(?:{heads})|\Z)"
        return re.compile(rf"{re.escape(header)}(?:{space})?(.*?){stop}", re.DOTALL)

    @cached_property
    def _heads(self) -> re.Pattern[str]:
        """The added tokens that a turn begins with."""
        asks = [text for text in self.added if any(role in text for role in ROLES)]
        return token_pattern([*asks, *self._tokens.findall(self._header)[:1]])

    @cached_property
    def _is_plain(self) -> bool:
        return is_plain(self.source)

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        return token_pattern(self.added)

    @cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._tokens.pattern})")

    @property
    def _advice(self) -> str:
        return "Check that it is the template of this checkpoint's own revision."

    def _run(self, turns: Sequence[Turn], ask: bool) -> str:
        names = self.special_tokens
        return run_template(self.source, turns, add_generation_prompt=ask, special_tokens=names)

    def _check_written(self, text: str, role: str) -> None:
        unknown = [token for token in TOKEN.findall(text) if token not in self.added]
        if unknown:
            raise DataError(
                f"the chat template writes {', '.join(unknown)}, no added token of tokenizer.json"
            )
        # A template that takes any role would let a misspelt one pass
        if role not in ROLES and not any(role in token for token in self._speakers(text)):
            raise DataError(f"unknown role {role!r}: the chat template has no special token for it")

    def _speakers(self, text: str) -> set[str]:
        """Return the added tokens of a text that may say who speaks."""
        return {*self._tokens.findall(text)} - {*self.special_tokens.values(), self.turn_end}

    def _split(self, text: str, before: Slot | None) -> list[Piece]:
        if before is None or not before.trained:
            return [Piece(text, False)]
        end = self._end.match(text)
        if end is None:
            raise TokenizerError(
                f"{self.file}: the chat template writes {text[:20]!r} after a message that is "
                "trained on, and no added token of tokenizer.json: the model would never learn to "
                "stop. " + self._advice
            )
        return [Piece(end[0], True), Piece(text[end.end() :], False)]


@lru_cache(maxsize=4096)
def _layout(template: ChatTemplate, shape: tuple[Turn, ...], ask: bool) -> Layout:
    marked = Marked(shape, lambda turns: template._run(turns, ask))
    dropped, parts = tuple(marked.dropped()), list[Piece | Slot]()
    before = None
    for text, slot in marked.cut():
        header = slot is not None and slot.field == "content"
        template._check_written(text, shape[slot.turn].role if slot and header else ROLES[0])
        parts += [piece for piece in template._split(text, before) if piece.text]
        parts += [slot] if slot else []
        before = slot
    return Layout(tuple(parts), dropped)
