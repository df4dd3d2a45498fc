"""A Modelfile: how ollama is told of a model in a GGUF file.

It has the chat template as a Go template, the texts that end an answer, and a context of at most
4096 tokens, within which LongRoPE computes with its short factors.

Source: ollama's docs/modelfile.md and docs/template.md.
"""

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from phi3_plugin.config import ORIGINAL, Phi3Config
from phi3_plugin.data.template import ChatTemplate
from phi3_plugin.data.turns import ROLES, Turn
from phi3_plugin.data.vocabulary import Vocabulary
from phi3_plugin.errors import DataError

MODELFILE = ".Modelfile"
"""How its name ends; the rest is that of the GGUF file."""


def modelfile(file: Path, config: Phi3Config, vocabulary: Vocabulary) -> str:
    """Return what `ollama create NAME -f` reads.

    Args:
        file: The GGUF file, which will lie beside it.
        config: Sizes of the model.
        vocabulary: Its chat template and stop ids.
    """
    lines = [
        f"FROM ./{file.name}",
        f"PARAMETER num_ctx {min(config.max_position_embeddings, ORIGINAL)}",
    ]
    for number in vocabulary.stop_tokens:
        text = vocabulary.backend.id_to_token(number)
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    template = go_template(vocabulary.template)
    if template is None:
        lines.append("# This chat template has no counterpart in Go: ollama chooses one itself.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


CONVERSATIONS = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""On which both templates are compared, with an answer asked for."""


def go_template(template: ChatTemplate) -> str | None:
    """Return a chat template for ollama that writes what this one does before an answer.

    What stands around the text of each role is read off three conversations, and others compared.

    Returns:
        None if the template does not write each message by itself.
    """
    try:
        before, after = _around(template, "user")
        start, answer_before, answer_after, end = _around(template, "user", "assistant", "user")
        told = _around(template, "system", "user")
    except (DataError, ValueError):
        return None
    head = _common_start(before[::-1], answer_after[::-1])[::-1]
    foot = _common_start(after, answer_before)
    lead, tail = before.removesuffix(head), after.removeprefix(foot)
    around = {
        "user": (head, foot),
        "assistant": (answer_before.removeprefix(foot), answer_after.removesuffix(head)),
    }
    if len(told) == 3:  # some templates drop it
        around["system"] = (told[0].removeprefix(lead), told[1].removesuffix(head))
    if (start, end) != (before, after) or any(
        _composed(roles, around, lead, tail) != _written(template, roles) for roles in CONVERSATIONS
    ):
        return None
    cases = [
        f'if eq .Role "{role}" }}}}{around[role][0]}{{{{ .Content }}}}{around[role][1]}{{{{'
        for role in ROLES
        if role in around
    ]
    literals = [lead, tail, *(text for pair in around.values() for text in pair)]
    if any(mark in text for text in literals for mark in ("{{", "}}", '"""')):
        return None
    messages = f"{{{{ range .Messages }}}}{{{{ {' else '.join(cases)} end }}}}{{{{ end }}}}"
    return f"{lead}{messages}{tail}"


def _text(number: int) -> str:
    return f"Qz{number}zK"


def _written(template: ChatTemplate, roles: Sequence[str]) -> str:
    turns = [Turn(role, _text(i), False) for i, role in enumerate(roles)]
    return template.write(turns, add_generation_prompt=True)


def _around(template: ChatTemplate, *roles: str) -> list[str]:
    """Return what the template writes before, between and after the texts of these roles."""
    return re.split(r"Qz\d+zK", _written(template, roles))


def _common_start(one: str, other: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _composed(
    roles: Sequence[str], around: dict[str, tuple[str, str]], lead: str, tail: str
) -> str:
    """Return a conversation as the template for ollama writes it."""
    written = [_text(i).join(around[role]) for i, role in enumerate(roles) if role in around]
    return f"{lead}{''.join(written)}{tail}"
