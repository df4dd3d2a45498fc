r"""A checkpoint's chat template, split into text that is trained on and text that is not.

The two supported revisions lay a conversation out as::

    <|system|>\n{content}<|end|>\n        3.5 leaves out a system message without content
    <|user|>\n{content}<|end|>\n
    <|assistant|>\n{content}<|end|>\n
    <|endoftext|>                         or <|assistant|>\n, to ask for an answer

A message is a header (``<|role|>\n``) and an output (``{content}<|end|>``); the output is what
training on a message counts. The layout is written by hand, because a rendered text does not
tell where an output starts, but the template has the last word: every conversation is
rendered by both, and a difference is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.errors import DataError, TokenizerError

ROLES = ("system", "user", "assistant")
END = "<|end|>"
SURROGATE = re.compile("[\ud800-\udfff]")


class Turn(NamedTuple):
    """One checked message of a conversation."""

    role: str
    content: str
    trained: bool
    """Whether the loss counts the content and its ``<|end|>``."""


class Piece(NamedTuple):
    """A stretch of rendered text that is trained on as a whole or not at all."""

    text: str
    trained: bool
    said: bool = False
    """Whether it is the content of a message; the rest is written by the template."""


def make_turn(role: object, content: object, trained: bool | None = None) -> Turn:
    """Check one message.

    Args:
        role: Who speaks.
        content: What is said.
        trained: Whether the loss counts it; by default what the assistant says counts.

    Raises:
        DataError: The role is unknown, or the content is not text.
    """
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}, expected one of: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"the {role} content is {kind(content)}, expected a string")
    if SURROGATE.search(content):
        raise DataError(f"the {role} content is not valid Unicode: it has half a surrogate pair")
    return Turn(str(role), content, role == "assistant" if trained is None else trained)


def kind(value: object) -> str:
    """Name the type of a JSON value for an error message."""
    return "null" if value is None else type(value).__name__


PROBES = tuple(
    [make_turn(role, content) for role, content in probe]
    for probe in (
        [("user", " a <b> & {{ 1 }}\n")],
        [("system", " brief\n"), ("user", "a"), ("assistant", "\n b "), ("user", "")],
        [("system", ""), ("user", "a"), ("assistant", "")],
        [("user", "a"), ("user", "b"), ("system", "c"), ("assistant", "d"), ("assistant", "e")],
    )
)
"""Conversations on which the known layouts, and those we refuse, come apart."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template whose layout is known."""

    source: str
    """The Jinja text."""
    file: str
    """Where it was read, for error messages."""
    special_tokens: Mapping[str, str]
    """``bos_token``, ``eos_token``, … as the template sees them."""
    skips_empty_system: bool

    @classmethod
    def fit(cls, source: str, file: str, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """Find the layout of a template by rendering a few conversations.

        Raises:
            TokenizerError: The template fails, or renders unlike both supported revisions.
        """
        for skips_empty_system in (False, True):
            template = cls(source, file, special_tokens, skips_empty_system)
            if all(template._agrees(probe, ask) for probe in PROBES for ask in (False, True)):
                return template
        raise TokenizerError(
            f"{file}: this chat template is not supported. Supported are those of "
            "Phi-3-mini (4k and 128k, revisions since June 2024) and Phi-3.5-mini: "
            "system, user and assistant messages as '<|role|>\\n{content}<|end|>\\n', then "
            "'<|endoftext|>' or '<|assistant|>\\n'. Use a current revision of one of these."
        )

    def pieces(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[Piece]:
        """Render a conversation.

        Args:
            turns: The messages, at least one.
            add_generation_prompt: End with an open assistant header, to generate from.

        Returns:
            Pieces whose texts, joined, are what the template renders.

        Raises:
            DataError: There is no message.
            TokenizerError: The template renders something else, or fails.
        """
        if not turns:
            raise DataError("the conversation is empty, expected at least one message")
        pieces = list(self._layout(turns, add_generation_prompt))
        if _joined(pieces) != self._rendered(turns, add_generation_prompt):
            raise TokenizerError(
                f"{self.file}: the chat template renders a conversation unlike its own layout on "
                f"others, so it cannot be followed exactly. The first message: {turns[0]}"
            )
        return pieces

    def _layout(self, turns: Sequence[Turn], add_generation_prompt: bool) -> Iterator[Piece]:
        for turn in turns:
            if self.skips_empty_system and turn.role == "system" and not turn.content:
                continue
            yield Piece(f"<|{turn.role}|>\n", False)
            yield Piece(turn.content, turn.trained, said=True)
            yield Piece(END, turn.trained)
            yield Piece("\n", False)
        last = "<|assistant|>\n" if add_generation_prompt else self.special_tokens["eos_token"]
        yield Piece(last, False)

    def _agrees(self, turns: Sequence[Turn], ask: bool) -> bool:
        return _joined(self._layout(turns, ask)) == self._rendered(turns, ask)

    def _rendered(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            chunks = _compile(self.source).generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
            # A known layout takes one chunk a message; the cap ends a template that never does.
            return "".join(islice(chunks, 64 + 8 * len(turns)))
        except Exception as error:
            raise TokenizerError(f"{self.file}: the chat template failed: {error}") from error


def _joined(pieces: Iterator[Piece] | list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@lru_cache
def _compile(source: str) -> jinja2.Template:
    # Whitespace control and helpers as in transformers 5, utils/chat_template_utils.py. Jinja's
    # own globals are left out: the layouts need none, and a hostile file finds less to reach.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.clear()
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
