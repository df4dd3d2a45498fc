"""Rows of a better and a worse answer, of which the better one is learned."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_plugin.data.messages import MessageList, with_rest
from phi3_plugin.data.shapes import NAME_COLUMNS, key_names, refuse_filled
from phi3_plugin.data.turns import Turn, kind, make_turn
from phi3_plugin.errors import DataError

PROMPTS = ("prompt", "question", "instruction", "input")
"""Columns that may hold what the answers are given to; a row has one of them."""

DROPPED = ("context", "history")
"""Columns that may be a part of the prompt too, and that this format does not read."""

SPEAKER = re.compile(r"\n\nHuman:|\n\nAssistant:")
HUMAN = "\n\nHuman:"
"""How a conversation begins that is written as in the data set HH-RLHF."""


@dataclass(frozen=True)
class Preference:
    """``chosen`` beside ``rejected``: an answer, messages, or a text as in HH-RLHF."""

    messages: MessageList

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has both answers."""
        return "chosen" in row and "rejected" in row

    def read(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt and the chosen answer; the rejected one is not looked at."""
        refuse_filled(row, DROPPED, NAME_COLUMNS)
        chosen = row.get("chosen")
        if isinstance(chosen, str):
            return with_rest(self._answer(chosen, row), row)
        if not isinstance(chosen, list):
            raise DataError(f"chosen is {kind(chosen)}, expected a text or a list of messages")
        turns = self.messages.listed(chosen, "chosen")
        # A whole conversation says again what the prompt says
        before = self._prompt(row) if turns[0].role == "assistant" else []
        return with_rest([*before, *turns], row)

    def _answer(self, chosen: str, row: Mapping[str, Any]) -> list[Turn]:
        if chosen.startswith(HUMAN):
            return _transcript(chosen)
        before = self._prompt(row)
        if isinstance(_value(row), str) and before[-1].role == "assistant":
            # The prompt is written up to the name of who speaks next
            before, chosen = before[:-1], before[-1].content + chosen.strip()
        return [*before, make_turn("assistant", chosen)]

    def _prompt(self, row: Mapping[str, Any]) -> list[Turn]:
        prompt = _value(row)
        if isinstance(prompt, list):
            return self.messages.listed(prompt, "the prompt")
        if isinstance(prompt, str) and prompt.startswith(HUMAN):
            return _transcript(prompt)
        return [make_turn("user", prompt)]

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return "chosen, rejected and perhaps prompt"


def _value(row: Mapping[str, Any]) -> Any:
    found = [name for name in PROMPTS if row.get(name)]
    if not found:
        raise DataError(f"chosen has no prompt before it; the keys are: {key_names(row)}")
    if len(found) > 1:
        raise DataError(f"the prompt may be any of: {', '.join(found)}; remove the others")
    return row[found[0]]


def _transcript(text: str) -> list[Turn]:
    names, said = SPEAKER.findall(text), SPEAKER.split(text)[1:]
    roles = ["user" if name == HUMAN else "assistant" for name in names]
    return [make_turn(role, part.strip()) for role, part in zip(roles, said, strict=True)]
