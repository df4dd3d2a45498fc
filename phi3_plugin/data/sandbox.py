"""Runs a chat template as transformers does, out of reach of everything but the conversation.

The filters of rows run here too, out of reach of everything but the row.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from phi3_plugin.data.turns import Turn
from phi3_plugin.errors import ConfigError, DataError

NOW = datetime.now()
"""What templates are told is the time."""

CHUNKS = 1000, 100
"""A template may write this many pieces, and so many a message; published ones write a few."""


def run_template(
    source: str,
    turns: Sequence[Turn],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Render a conversation.

    Args:
        source: The Jinja text.
        turns: The messages.
        add_generation_prompt: Whether the template is asked for an open assistant header.
        special_tokens: ``bos_token``, ``eos_token``, … as the template sees them.

    Raises:
        DataError: The template fails, or does not come to an end.

    Source: transformers 5.23, utils/chat_template_utils.py.
    """
    limit = CHUNKS[0] + CHUNKS[1] * len(turns)
    try:
        chunks = _compile(source).generate(
            messages=[_message(turn) for turn in turns],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
        written = list(islice(chunks, limit + 1))
    except Exception as error:
        raise DataError(f"the chat template failed: {error}") from error
    if len(written) > limit:
        raise DataError("the chat template failed: it writes without end")
    return "".join(written)


class FilterFailed(DataError):
    """It cannot be said whether a row passes a filter."""


def compile_filter(
    expression: str, key: str = "dataset.filter"
) -> Callable[[Mapping[str, Any]], bool]:
    """Read an expression over the columns of a row, such as ``lang == 'en' and rating >= 4``.

    Args:
        expression: Jinja, without braces; ``row`` is the whole row, for columns whose names are
            no words or are ``row``.
        key: Where it stands, for error messages.

    Returns:
        Whether it is true of a row; raises :class:`FilterFailed` where it cannot be said.

    Raises:
        ConfigError: It is no expression.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, extensions=[_Self]
    )
    environment.globals.clear()
    try:
        compiled = environment.compile_expression(expression, undefined_to_none=False)
    except Exception as error:
        raise ConfigError(
            f"{key}: {expression!r} is no expression: {error}. Expected one over the columns of a "
            "row, as in lang == 'en' and rating >= 4."
        ) from error

    def passes(row: Mapping[str, Any]) -> bool:
        try:
            return bool(compiled({**row, "row": row}))
        except Exception as error:
            raise FilterFailed(f"{key} {expression!r} failed: {error}") from error

    return passes


def _message(turn: Turn) -> dict[str, str]:
    message = {"role": turn.role, "content": turn.content}
    return message if turn.tools is None else {**message, "tools": turn.tools}


class _Generation(Extension):
    """``{% generation %}``, by which a template says what the assistant wrote: adds no text."""

    tags = {"generation"}  # noqa: RUF012  (how Jinja asks for it)

    def parse(self, parser: Parser) -> nodes.Node:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body)


class _Self(Extension):
    """Reads ``self`` as a column; by itself Jinja takes it for the template that is run."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        after = ""
        for token in stream:
            if token.type == "name" and token.value == "self" and after != "dot":
                parts = (("name", "row"), ("dot", "."), ("name", "self"))
                yield from (Token(token.lineno, *part) for part in parts)
            else:
                yield token
            after = token.type


@lru_cache
def _compile(source: str) -> jinja2.Template:
    return template_environment().from_string(source)


@lru_cache
def template_environment() -> ImmutableSandboxedEnvironment:
    """Return what chat templates are read and run in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    # Most of Jinja's own globals are left out, so that a hostile file finds less to reach
    environment.globals.clear()
    environment.globals.update(
        namespace=Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    # One time for all conversations, since layouts are kept
    return NOW.strftime(format)
