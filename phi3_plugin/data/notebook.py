"""ShareGPT rows, written with the plain words of Microsoft's inference notebook."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_plugin.data.messages import MessageList
from phi3_plugin.data.turns import Written
from phi3_plugin.errors import DataError

PREFIXES = {"system": "system\n", "user": "\nuser\n", "assistant": "\nassistant\n"}
"""What is written before each message, and a space after it."""


@dataclass(frozen=True)
class PlainWords:
    """Conversations whose roles are words and not special tokens.

    The notebook wrote the number of the end-of-text token after each, by mistake; the token is
    put there.

    Source: microsoft/Phi-3CookBook, code/04.Finetuning/Phi_3_Inference_Finetuning.ipynb.
    """

    messages: MessageList

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row lists messages."""
        return self.messages.fits(row)

    def read(self, row: Mapping[str, Any]) -> Written:
        """Write the conversation, and mark what the assistant says."""
        text, said = "", list[tuple[int, int]]()
        for turn in self.messages.read(row):
            if turn.role not in PREFIXES:
                raise DataError(f"there is no plain word for the role {turn.role!r}")
            if turn.tools is not None or turn.wanted is not None:
                raise DataError("a message has tools, weight or train, which this format drops")
            text += PREFIXES[turn.role]
            if turn.role == "assistant":
                # With the space: it is a part of the first word's token
                said.append((len(text), len(text) + 1 + len(turn.content)))
            text += f" {turn.content}\n"
        return Written(text, tuple(said), eos=True)

    def __str__(self) -> str:
        """Show the shape in an error message."""
        return f"{self.messages}, only by name"
