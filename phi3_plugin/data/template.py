"""A checkpoint's chat template, rendered once per shape of conversation and filled in."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from phi3_plugin.data.formats import ROLES, Turn, Written, make_turn
from phi3_plugin.errors import ConfigError, DataError, TokenizerError

# The added tokens of a tokenizer: where they stand in text, and how to keep text from them.


def token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the tokens as a tokenizer does: first the leftmost, longest."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class Disguise:
    """A tokenizer that knows its added tokens by secret names.

    The template's ``<|end|>`` is replaced by the secret name; one that somebody wrote into a
    message keeps the characters it is written in. All else is encoded as before: the flags of
    the tokens, and what they do to the text beside them, are the same.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """Copy the tokenizer."""
        secret = secrets.token_hex(8)  # nobody's text holds it
        added = backend.get_added_tokens_decoder()
        self._names = {token.content: f"{secret}-{i}-" for i, token in added.items()}
        self._tokens = token_pattern(self._names)
        self._hidden: dict[str, str] = {}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._names[token["content"]]
        self.backend = Tokenizer.from_str(json.dumps(content))
        # Those that were in the model's own vocabulary are new to it and move the others
        ids = self.backend.get_vocab()
        self._true_ids = np.arange(max(ids.values()) + 1, dtype=np.int32)
        for i, token in added.items():
            self._true_ids[ids[self._names[token.content]]] = i

    def hide(self, text: str) -> str:
        """Replace the added tokens in a text of the template, of which there are few."""
        if text not in self._hidden:
            self._hidden[text] = self._tokens.sub(lambda found: self._names[found[0]], text)
        return self._hidden[text]

    def true_ids(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the ids in the original tokenizer, [S] to [S]."""
        return self._true_ids[ids]


# Runs a chat template as transformers does, out of reach of everything but the conversation.
#
# The filters of rows run here too, out of reach of everything but the row.

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


# Tell from a chat template's source whether it writes every text as it is.
#
# Such a template need not be run for each conversation: who speaks and which texts are blank decide
# what stands around the texts (see :mod:`phi3_plugin.data.template`). All published templates of the
# family are of this kind. What is not understood here counts as not plain, which costs time only.

SAFE, TEXT, MESSAGE, MESSAGES, LOOP = "safe", "text", "message", "messages", "loop"
"""What an expression is: independent of the texts, a text or one with something around it, …"""

FIELDS = {"role": SAFE, "content": TEXT, "tools": TEXT}
LOOP_FIELDS = ("first", "last", "index", "index0", "length", "revindex", "revindex0")
PLAIN_TESTS = ("defined", "undefined", "none", "string", "mapping", "sequence")
"""Tests of a text whose outcome does not hang on what it says."""

Names = dict[str, str]


class _Unclear(Exception):
    """Something that is not understood."""


def is_plain(source: str) -> bool:
    """Whether the template writes texts as they are, and looks only at whether they are empty."""
    try:
        _statements(template_environment().parse(source).body, {"messages": MESSAGES})
    except (_Unclear, TemplateError, RecursionError):
        return False
    return True


def _statements(body: list[nodes.Node], names: Names) -> None:
    for node in body:
        handle = STATEMENTS.get(type(node))
        if handle is None:
            raise _Unclear
        handle(node, names)


def _output(node: nodes.Output, names: Names) -> None:
    for child in node.nodes:
        if not isinstance(child, nodes.TemplateData):
            _need(child, names, SAFE, TEXT)


def _if(node: nodes.If, names: Names) -> None:
    _truth(node.test, names)
    for body in (node.body, node.elif_, node.else_):
        _statements(list(body), names)


def _for(node: nodes.For, names: Names) -> None:
    if not isinstance(node.target, nodes.Name) or node.recursive:
        raise _Unclear
    _need(node.iter, names, MESSAGES)
    inside = {**names, node.target.name: MESSAGE, "loop": LOOP}
    if node.test is not None:
        _truth(node.test, inside)
    _statements(node.body, inside)
    _statements(node.else_, names)


def _assign(node: nodes.Assign, names: Names) -> None:
    if not isinstance(node.target, nodes.Name):
        raise _Unclear
    name, value = node.target.name, _kind(node.node, names)
    # One that is set in a branch keeps its value after it, so it must be the same in both
    if names.setdefault(name, value) != value:
        raise _Unclear


def _scope(node: nodes.Scope, names: Names) -> None:
    _statements(node.body, dict(names))


STATEMENTS: Mapping[type[nodes.Node], Callable[..., None]] = {
    nodes.Output: _output,
    nodes.If: _if,
    nodes.For: _for,
    nodes.Assign: _assign,
    nodes.Scope: _scope,
    nodes.Break: lambda node, names: None,
    nodes.Continue: lambda node, names: None,
}


def _need(node: nodes.Node, names: Names, *kinds: str) -> str:
    found = _kind(node, names)
    if found not in kinds:
        raise _Unclear
    return found


def _truth(node: nodes.Node, names: Names) -> None:
    """Check an expression of which only the truth counts; of a text that is whether it is empty."""
    if isinstance(node, nodes.And | nodes.Or):
        _truth(node.left, names)
        _truth(node.right, names)
    elif isinstance(node, nodes.Not):
        _truth(node.node, names)
    else:
        _need(node, names, SAFE, TEXT, MESSAGES, MESSAGE)


def _kind(node: nodes.Node, names: Names) -> str:
    handle = EXPRESSIONS.get(type(node))
    if handle is None:
        raise _Unclear
    return handle(node, names)


def _name(node: nodes.Name, names: Names) -> str:
    return names.get(node.name, SAFE)


def _field(node: nodes.Getattr | nodes.Getitem, names: Names) -> str:
    of = _kind(node.node, names)
    if isinstance(node, nodes.Getitem) and of == MESSAGES:
        return _element(node.arg, names)
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    if of == LOOP and key in LOOP_FIELDS:
        return SAFE
    if of != MESSAGE or key not in FIELDS:
        raise _Unclear
    return FIELDS[key]


def _element(place: nodes.Node, names: Names) -> str:
    if isinstance(place, nodes.Slice):
        _all_safe(place, names)
        return MESSAGES
    number = place.node if isinstance(place, nodes.Neg) else place
    if isinstance(number, nodes.Const):
        return MESSAGE
    raise _Unclear


def _joined(node: nodes.Add | nodes.Concat, names: Names) -> str:
    parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
    return TEXT if TEXT in [_need(part, names, SAFE, TEXT) for part in parts] else SAFE


def _compared(node: nodes.Compare, names: Names) -> str:
    if [operand.op for operand in node.ops] in (["in"], ["notin"]):
        _need(node.expr, names, SAFE)
        _need(node.ops[0].expr, names, SAFE, MESSAGE)
    else:
        for part in (node.expr, *(operand.expr for operand in node.ops)):
            _need(part, names, SAFE)
    return SAFE


def _tested(node: nodes.Test, names: Names) -> str:
    kind = _need(node.node, names, SAFE, TEXT, MESSAGE, MESSAGES)
    if node.args or node.kwargs or (kind != SAFE and node.name not in PLAIN_TESTS):
        raise _Unclear
    return SAFE


def _filtered(node: nodes.Filter, names: Names) -> str:
    if node.name not in ("length", "count") or node.args or node.kwargs or node.node is None:
        raise _Unclear
    _need(node.node, names, MESSAGES, SAFE)
    return SAFE


def _called(node: nodes.Call, names: Names) -> str:
    if not isinstance(node.node, nodes.Name) or node.node.name != "raise_exception":
        raise _Unclear
    for argument in node.args:
        _need(argument, names, SAFE)
    return SAFE


def _chosen(node: nodes.CondExpr, names: Names) -> str:
    _truth(node.test, names)
    ends = [node.expr1, *([node.expr2] if node.expr2 else [])]
    return TEXT if TEXT in [_need(end, names, SAFE, TEXT) for end in ends] else SAFE


def _all_safe(node: nodes.Node, names: Names) -> str:
    for child in node.iter_child_nodes():
        _need(child, names, SAFE)
    return SAFE


EXPRESSIONS: Mapping[type[nodes.Node], Callable[..., str]] = {
    nodes.Name: _name,
    nodes.Const: lambda node, names: SAFE,
    nodes.Getattr: _field,
    nodes.Getitem: _field,
    nodes.Add: _joined,
    nodes.Concat: _joined,
    nodes.Compare: _compared,
    nodes.Test: _tested,
    nodes.Filter: _filtered,
    nodes.Call: _called,
    nodes.CondExpr: _chosen,
    **dict.fromkeys(
        (nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Sub, nodes.Mod, nodes.List, nodes.Tuple),
        _all_safe,
    ),
}


# Where a chat template puts what the messages say.
#
# A rendered text does not tell where a message starts. So the template renders the conversation
# once more with a mark in place of every text; what stands between the marks is the template's
# own. The layout depends only on the shape of a conversation: who speaks, what is empty.

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


# "The normalizer of Phi-3's tokenizer, done while a conversation is written.
#
# Between two added tokens it puts ``▁`` in front, and ``▁`` for every space. That is a quarter of
# the time it takes to encode, since the library keeps the place of each character. Where nobody asks
# for places, a text that is normalized before gives the same ids::
#
#     <|user|>\n How are you?<|end|>\n   ->   <|user|>▁How▁are▁you?<|end|>

SPACE_MARK = "▁"
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE_MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
    ],
}
WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's white space, which an added token may swallow; Python's has four more characters."""


class Said(NamedTuple):
    """A place for a text between two added tokens."""

    slot: Slot
    swallowed: bool
    """Whether the added token before it swallows white space."""

    def write(self, turns: Sequence[Turn]) -> str:
        """Return the conversation's text, normalized."""
        text = self.slot.said(turns)
        if self.swallowed:
            text = text.lstrip(WHITE)
        return text and SPACE_MARK + text.replace(" ", SPACE_MARK)


class Script(NamedTuple):
    """How conversations of one layout are written, normalized."""

    parts: tuple[str | Said, ...]

    def write(self, turns: Sequence[Turn]) -> str:
        """Write a conversation."""
        return "".join([p if isinstance(p, str) else p.write(turns) for p in self.parts])


def without_normalizer(backend: Tokenizer) -> Tokenizer | None:
    """Return a tokenizer for texts that are normalized; None if it has another normalizer."""
    added = backend.get_added_tokens_decoder()
    if not _is_known(backend, list(added.values())):
        return None
    bare = Tokenizer(backend.model)
    for _, token in sorted(added.items()):
        (bare.add_special_tokens if token.special else bare.add_tokens)([token])
    found = {i: token.content for i, token in bare.get_added_tokens_decoder().items()}
    return bare if found == {i: token.content for i, token in added.items()} else None


def script(between: Sequence[Sequence[str | Slot]], tokens: Sequence[AddedToken]) -> Script | None:
    """Return how a layout is written; None if a text does not stand alone between added tokens.

    Args:
        between: What stands before the first added token and after each.
        tokens: The added tokens of the layout.
    """
    parts = list[str | Said]()
    for i, listed in enumerate(between):
        swallowed = i > 0 and tokens[i - 1].rstrip
        kept = list(listed)
        while swallowed and kept and isinstance(kept[0], str) and not kept[0].strip(WHITE):
            kept.pop(0)
        slots = [part for part in kept if isinstance(part, Slot)]
        if slots and len(kept) > 1:
            return None
        text = "".join(part for part in kept if isinstance(part, str))
        text = text.lstrip(WHITE) if swallowed else text
        parts += [Said(slot, swallowed) for slot in slots]
        parts.append(text and SPACE_MARK + text.replace(" ", SPACE_MARK))
        parts += [token.content for token in tokens[i : i + 1]]
    return Script(tuple(part for part in parts if part))


def _is_known(backend: Tokenizer, added: Sequence[AddedToken]) -> bool:
    normalizer = backend.normalizer
    return (
        normalizer is not None
        and json.loads(normalizer.__getstate__()) == NORMALIZER
        and backend.pre_tokenizer is None
        and not any(token.normalized or token.single_word or token.lstrip for token in added)
        and not any(set(token.content) & {*WHITE, SPACE_MARK} for token in added)
    )


# "Which tokens are trained, told from the added tokens of the template.
#
# Asking a tokenizer where each token starts in the text takes longer than encoding. Most templates
# write added tokens around every text, so those tell it too::
#
#     <|user|>\n  H i  <|end|>\n<|assistant|>\n  Y o  <|end|>\n<|endoftext|>
#         .       . .     .          .           x x     x          .
#
# Where the template writes more (a newline that stays a token beside what is said) or a text holds
# added tokens of its own, the tokenizer has to be asked; see :mod:`phi3_plugin.data.tokenizer`.

Part = tuple[str | Slot | None, bool]
"""Text of the template, a slot, or None for a text that is said; and whether it is trained on."""


class Marks(NamedTuple):
    """What is trained in a layout with K added tokens."""

    token: NDArray[np.bool_]
    """[K + 1]; each added token. The first entry stands for none."""
    after: NDArray[np.bool_]
    """[K + 1]; what comes before the first added token, and after each."""
    tell: bool
    """Whether these tell; if not, some are trained only in part."""
    script: Script | None
    """How such a conversation is written with its normalizer done, if that is known."""


class Marker:
    """Finds the marks of layouts."""

    def __init__(self, backend: Tokenizer) -> None:
        """Read the added tokens."""
        self._added = {t.content: t for t in backend.get_added_tokens_decoder().values()}
        self._pattern = token_pattern(self._added)
        self._simple = not any(t.single_word or t.normalized for t in self._added.values())

    def marks(self, layout: Layout) -> Marks:
        """Return the marks of a layout."""
        # With the layout, which the template forgets: there may be any number of shapes
        if self not in layout.notes:
            layout.notes[self] = self._read(layout)
        found: Marks = layout.notes[self]
        return found

    def _read(self, layout: Layout) -> Marks:
        tokens, trained = list[AddedToken](), [False]
        between: list[list[Part]] = [[]]
        for part, counts in self._cut(layout):
            if isinstance(part, str) and part in self._added:
                tokens.append(self._added[part])
                trained.append(counts)
                between.append([])
            else:
                between[-1].append((part, counts))
        beside = [None, *tokens, None]
        after = [_agreed(b, *beside[i : i + 2]) for i, b in enumerate(between)]
        tell = self._simple and None not in after
        parts = [[part for part, _ in listed if part is not None] for listed in between]
        whole = sum(map(len, parts)) == sum(map(len, between))
        written = script(parts, tokens) if tell and whole else None
        return Marks(
            np.array(trained, dtype=np.bool_), np.array(after, dtype=np.bool_), tell, written
        )

    def _cut(self, layout: Layout) -> Iterator[Part]:
        """Yield the template's added tokens, and what stands between."""
        for part in layout.parts:
            if isinstance(part, Slot):
                yield part, part.trained
            elif part.said:
                yield None, part.trained
            else:
                for text in re.split(f"({self._pattern.pattern})", part.text):
                    if text:
                        yield text, part.trained


def _agreed(
    between: Sequence[tuple[str | Slot | None, bool]],
    before: AddedToken | None,
    after: AddedToken | None,
) -> bool | None:
    """Return whether all tokens between two added ones are trained; None if only some are."""
    kept = list(between)
    while kept and before is not None and before.rstrip and _blank(kept[0]):
        kept.pop(0)  # Swallowed by the added token, which it belongs to then
    while kept and after is not None and after.lstrip and _blank(kept[-1]):
        kept.pop()
    found = {trained for _, trained in kept}
    return None if len(found) > 1 else found == {True}


def _blank(entry: Part) -> bool:
    return isinstance(entry[0], str) and not entry[0].strip()


# "A checkpoint's chat template, split into text that is trained on and text that is not.
#
# The template in the checkpoint is the only truth. Those of the Phi-3 family differ::
#
#     <s><|user|>\n{content}<|end|>\n<|assistant|>\n       launch, April 2024: no system message
#     <|user|>\n{content}<|end|>\n<|assistant|>\n          Phi-3-medium: the same without <s>
#     <|user|>\n{content}<|end|>\n … <|endoftext|>         mini since June 2024, Phi-3.5
#     <|user|>{content}<|end|> … <|endoftext|>             Phi-4-mini
#     <|im_start|>user<|im_sep|>{content}<|im_end|>        Phi-4
#
# So nothing about them is written here. A conversation is rendered and compared with its layout
# (see :mod:`phi3_plugin.data.template`): other templates work if they keep to theirs. Training on a
# message counts what it says and the added token that follows, by which the model learns to stop.

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
