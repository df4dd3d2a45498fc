"""What a model thinks before it answers, between ``<think>`` and ``</think>``.

A row has it in the content, or in a field of the message. Where the chat template reads such a
field, it gets it; where the checkpoint thinks and its template does not (Phi-4-reasoning,
Phi-4-mini-reasoning), the thought is written in front of the content.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from phi3_plugin.errors import DataError

THINK, END_OF_THOUGHT = "<think>", "</think>"

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message for it: of DeepSeek's API and of OpenRouter, of vLLM, of ollama and TRL."""

THOUGHT_DETAILS = ("reasoning_details", "thinking_blocks")
"""Fields that have the same once more, in parts and with signatures."""

THOUGHT_IN_TEXT = f"{THINK}\n{{}}\n{END_OF_THOUGHT}\n"
"""How it is written in front of a content, with {} for it."""

SHOW_REASONING = (THINK, "an AI math expert")
"""Words in the chat templates of checkpoints that think: in Phi-4-reasoning's system prompt, and in
that of Phi-4-mini-reasoning, which does not name the marks."""


def thought_of(message: Mapping[str, Any]) -> str | None:
    """Return what a message says that was thought; None where it says nothing.

    Raises:
        DataError: It says two things, or no text.
    """
    filled = {name: message[name] for name in THOUGHT_FIELDS if message.get(name)}
    for name, value in filled.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is {type(value).__name__}, expected a string")
    if len({*filled.values()}) > 1:
        raise DataError(f"a message has {' and '.join(filled)}, which differ; remove one")
    details = [name for name in THOUGHT_DETAILS if message.get(name)]
    if details and not filled:
        raise DataError(
            f"a message has {details[0]}, which nothing reads; write it as {THOUGHT_FIELDS[0]}, or "
            "remove it"
        )
    thought = next(iter(filled.values()), "")
    return thought if thought.strip() else None


def split_thought(text: str) -> tuple[str | None, str]:
    """Return what was thought and what was answered, without the marks and the lines around them.

    None where nothing was thought; an answer whose thought does not end is empty.
    """
    before, end, after = text.partition(END_OF_THOUGHT)
    begins = before.lstrip().startswith(THINK)
    if not begins and not end:
        return None, text
    thought = before.lstrip().removeprefix(THINK).strip("\n")
    return thought, after.lstrip("\n")


def begun_thought(text: str) -> str:
    """Return the mark at the end of a prompt that opens a thought, with the space after it."""
    match = re.search(rf"{THINK}\s*\Z", text)
    return match[0] if match else ""


def is_thinking(text: str) -> bool:
    """Whether an answer ends before its thought does."""
    return END_OF_THOUGHT not in text and split_thought(text)[0] is not None


class ThoughtsHidden:
    """Passes on an answer as it is written, without what is thought before it."""

    def __init__(self, show: Callable[[str], None]) -> None:
        """Take what shows a piece of text."""
        self._show = show
        self._text = ""
        self._answers = False  # whether what comes now is answer

    def __call__(self, piece: str) -> None:
        """Take a piece; it is held back while it may belong to a thought."""
        self._text += piece
        if not self._answers:
            start = self._text.lstrip()
            thinks = start.startswith(THINK) or THINK.startswith(start)
            answer = split_thought(self._text)[1]
            if (thinks and END_OF_THOUGHT not in self._text) or not answer:
                return
            self._answers, piece = True, answer
        self._show(piece)

    def end(self) -> None:
        """Show what was held back and is no thought."""
        if not self._answers and not is_thinking(self._text):
            self._show(split_thought(self._text)[1])
