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
from typing import NamedTuple

from phi3_plugin.data.added import token_pattern
from phi3_plugin.data.layout import UNCLEAR, Layout, Marked, Piece, Slot, shape_of
from phi3_plugin.data.sandbox import run_template
from phi3_plugin.data.turns import ROLES, Turn, make_turn
from phi3_plugin.errors import DataError, TokenizerError

TOKEN = re.compile(r"<\|[^<>|]*\|>")
"""What a special token of the family looks like."""

USER, ASSISTANT = make_turn("user", " a <b> & {{ 1 }}\n"), make_turn("assistant", "\n'c' ", False)
PROBES = (([USER], True), ([USER, ASSISTANT], False), ([USER, ASSISTANT] * 2, False))
"""Conversations that every chat template can be expected to render, and what is asked for."""


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    pieces: list[Piece]
    """Their texts, joined, are what the template renders."""
    dropped: tuple[str, ...]
    """What the template leaves out, in words."""


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
        layout = _layout(self, shape_of(turns), add_generation_prompt)
        pieces = layout.fill(turns)
        if "".join(piece.text for piece in pieces) != self._run(turns, add_generation_prompt):
            raise DataError(f"{UNCLEAR}: the chat template changes what the messages say")
        return Rendered(pieces, layout.dropped)

    @cached_property
    def turn_end(self) -> str | None:
        """The added token after what the assistant says, if there is one."""
        pieces = self.render([USER, ASSISTANT]).pieces
        end = self._end.match("" if pieces[-1].said else pieces[-1].text)
        return end[1] if end else None

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
        if role not in ROLES and not any(role in token for token in self._tokens.findall(text)):
            raise DataError(f"unknown role {role!r}: the chat template has no special token for it")

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
