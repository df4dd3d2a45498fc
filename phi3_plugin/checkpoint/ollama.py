r"""A Modelfile, by which ollama serves an adapter with the checkpoint's own chat template.

ollama renders prompts with a template in Go's syntax, the checkpoint with one in Jinja's. What a
template of the family writes around each message is found by rendering marks, and written down::

    {% for message in messages %}…        {{ range .Messages }}{{ if eq .Role "user" }}<|user|>
    {{'<|user|>\n' + message['content']   {{ .Content }}<|end|>
       + '<|end|>\n'}}…                   {{ end }}…{{ end }}<|assistant|>

Source: ollama 0.9 and later, docs/modelfile.md, parser/parser.go, template/template.go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phi3_plugin.errors import ConfigError

Message = tuple[str, str]
"""Role and what is said."""
Render = Callable[[Sequence[Message]], str]
"""Renders a conversation with the checkpoint's template, and asks for an answer."""

ROLES = ("system", "user", "assistant")
MARKS = ("Qz1zK", "Qz2zK", "Qz3zK")


@dataclass(frozen=True)
class Block:
    """What a template writes before and after what a role says."""

    before: str
    after: str
    if_empty: bool = True
    """Whether it is written around nothing, too."""

    def write(self, said: str) -> str:
        """Return the message as the template writes it."""
        return f"{self.before}{said}{self.after}" if said or self.if_empty else ""


@dataclass(frozen=True)
class Shape:
    """A chat template that writes the messages one after the other, each in its role's block."""

    start: str
    blocks: dict[str, Block]
    """By role; what other roles say is left out."""
    opening: str
    """Asks for an answer."""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that ollama makes."""
        written = [self.blocks[role].write(said) for role, said in messages if role in self.blocks]
        return self.start + "".join(written) + self.opening


def modelfile(base: str, adapter_file: str, template: str, stops: Sequence[str]) -> str:
    """Return the text of a Modelfile.

    Args:
        base: What ollama calls the base model (``phi3:mini``), or its GGUF file.
        adapter_file: The adapter's GGUF file, from the Modelfile's folder.
        template: In Go's syntax, from :func:`go_template`.
        stops: The tokens that end an answer.

    Raises:
        ConfigError: A value cannot be written down.
    """
    for key, value in {"from_model": base, "adapter": adapter_file}.items():
        if not value.strip() or "\n" in value or '"' in value:
            raise ConfigError(f"{key}: {value!r} cannot stand in a Modelfile. Rename the file.")
    for token in stops:
        if '"' in token or "\n" in token:
            raise ConfigError(f"{token!r} cannot be a stop of ollama.")
    if '"""' in template:
        raise ConfigError('The chat template writes """, which a Modelfile cannot hold.')
    lines = [f"FROM {base}", f"ADAPTER {adapter_file}", f'TEMPLATE """{template}"""']
    return "\n".join([*lines, *(f'PARAMETER stop "{token}"' for token in stops)]) + "\n"


def go_template(render: Render, bos: str = "") -> str:
    """Return the checkpoint's chat template in Go's syntax, as ollama takes it.

    Tools are left out. So is the token with which a text begins, if the template writes it: the
    tokenizer in a GGUF file adds it.

    Args:
        render: Of the checkpoint.
        bos: The token with which a text begins.

    Raises:
        ConfigError: It does not write every message as its role alone says.
    """
    shape = shape_of(render)
    cases = [_case(role, block) for role, block in shape.blocks.items()]
    turns = "{{ else ".join(cases) + "{{ end }}"
    start = _literal(shape.start.removeprefix(bos))
    return f"{start}{{{{ range .Messages }}}}{{{{ {turns}{{{{ end }}}}{_literal(shape.opening)}"


def shape_of(render: Render) -> Shape:
    """Find what a template writes around messages, and check it on conversations of all kinds.

    Raises:
        ConfigError: It is not of that kind.
    """
    try:
        shape = _guess(render)
        wrong = [probe for probe in _probes() if shape.render(probe) != render(probe)]
    except ValueError as error:
        raise ConfigError(f"{_NOT_SO} {error}. {_ADVICE}") from error
    if wrong:
        roles = ", ".join(role for role, _ in wrong[0])
        raise ConfigError(f"{_NOT_SO} it does otherwise in a conversation of {roles}. {_ADVICE}")
    return shape


_NOT_SO = "ollama needs a chat template that writes each message as its role alone says:"
_ADVICE = "Write TEMPLATE by hand, or serve the merged model, whose template llama.cpp runs."


def _guess(render: Render) -> Shape:
    """Read the blocks off three conversations; `shape_of` checks whether they are right."""
    one, two, three = MARKS
    head, between, tail = _cut(render([("user", one), ("user", two)]), one, two)
    before = _common_end(head, between)
    start, after = head.removesuffix(before), between.removesuffix(before)
    opening = tail.removeprefix(after)
    _, to_answer, to_user, _ = _cut(
        render([("user", one), ("assistant", two), ("user", three)]), one, two, three
    )
    answer = Block(to_answer.removeprefix(after), to_user.removesuffix(before))
    blocks = {"user": Block(before, after), "assistant": answer}
    told = render([("system", one), ("user", two)])
    if one in told:
        head, between, _ = _cut(told, one, two)
        silent = render([("system", ""), ("user", two)]) == render([("user", two)])
        system = Block(head.removeprefix(start), between.removesuffix(before), not silent)
        blocks = {"system": system, **blocks}
    return Shape(start, blocks, opening)


def _cut(text: str, *marks: str) -> list[str]:
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("it leaves out or repeats what a message says")
        pieces.append(piece)
    return [*pieces, text]


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _probes() -> list[list[Message]]:
    """Return conversations in which every role follows every other, and texts with white space."""
    texts = {"system": "\n Be terse. ", "user": " {{ 1 }}\n", "assistant": "a <b> & 'c'\n\n"}
    orders = ["u", "uu", "uau", "su", "suau", "sua", "ua", "uauau", "ssu", "usu", "uaus", "uaa"]
    role_of = {role[0]: role for role in ROLES}
    probes = [[(role_of[r], texts[role_of[r]]) for r in order] for order in orders]
    empty = [[(r, "" if r == role else texts[r]) for r in ("user", role, "user")] for role in ROLES]
    return [*probes, *empty, [("system", ""), ("user", "x")]]


def _case(role: str, block: Block) -> str:
    asked = f'eq .Role "{role}"' if block.if_empty else f'and (eq .Role "{role}") .Content'
    return f"if {asked} }}}}{_literal(block.before)}{{{{ .Content }}}}{_literal(block.after)}"


def _literal(text: str) -> str:
    """Return what Go writes as this text."""
    return text.replace("{{", '{{ "{{" }}')
