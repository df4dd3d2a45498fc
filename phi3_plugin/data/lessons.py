"""What of a conversation is trained on, and what is put in front of it and at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.encoder import Batch
from phi3_plugin.data.layout import Rendered
from phi3_plugin.data.options import check_choice, check_switch
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import Chat, Turn, Written, make_turn
from phi3_plugin.errors import ConfigError, DataError

TRAIN_ON = ("assistant", "last", "marked", "all")
"""Every assistant turn that does not say otherwise, the last assistant turn, the messages that ask
for it, or all tokens but the first."""

NOTHING = {
    "assistant": "no assistant turn that is trained on starts",
    "last": "the last assistant turn does not start",
    "marked": "no message that asks to be trained on starts",
    "all": "there is no second token",
}
"""Why a conversation that was cut trains nothing; the length it was cut to follows."""


@dataclass(frozen=True)
class Lesson:
    """Turns a conversation as it was read into one to learn from."""

    train_on: str = "assistant"
    """One of :data:`TRAIN_ON`."""
    system: Turn | None = None
    """Comes before conversations that have no system message."""
    add_eos: bool = False
    """Whether the end-of-text token follows where the template does not write it."""

    def render(self, chat: Chat, tokenizer: Phi3Tokenizer) -> Rendered:
        """Write a conversation as the template does, and mark what is trained on.

        Raises:
            DataError: There is nothing to train on, or the conversation cannot be rendered.
        """
        if isinstance(chat, Written):
            if self.system is not None:
                raise DataError(
                    "dataset.system_prompt cannot be put in front of a text that is written already"
                )
            return self._follow(tokenizer.closed(chat) if self.add_eos else chat, tokenizer)
        return self.write(self.prepare(chat), tokenizer)

    def write(self, turns: Sequence[Turn], tokenizer: Phi3Tokenizer) -> Rendered:
        """Write turns that are prepared already.

        Raises:
            DataError: They cannot be rendered.
        """
        rendered = tokenizer.render(turns)
        trained = self.train_on == "all"
        return tokenizer.ended(rendered, trained=trained) if self.add_eos else rendered

    def prepare(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Mark the turns that are trained on, and add the system message.

        Raises:
            DataError: There is nothing to train on.
        """
        chosen = self._chosen(turns)
        if self.train_on != "all" and not any(chosen):
            raise DataError(_nothing(self.train_on, turns))
        if [turn.trained for turn in turns] != chosen:
            turns = [
                Turn(turn.role, turn.content, trained, turn.tools)
                for turn, trained in zip(turns, chosen, strict=True)
            ]
        if self.system is None or any(turn.role == "system" for turn in turns):
            return turns
        return [self.system, *turns]

    def mark(self, batch: Batch) -> Batch:
        """Mark the tokens that are trained on, given those that the turns mark."""
        if self.train_on != "all":
            return batch
        trained = np.ones(len(batch.ids), dtype=np.bool_)
        # Nothing comes before the first, from which it could be predicted
        trained[_starts(batch)] = False
        return batch._replace(trained=trained)

    def passes_over(self, chat: Chat) -> bool:
        """Whether a message asks for something that this lesson does not do."""
        if isinstance(chat, Written) or self.train_on == "marked":
            return False
        asked = [turn for turn in chat if turn.wanted is not None]
        if self.train_on == "assistant":
            return any(turn.wanted and turn.role != "assistant" for turn in asked)
        return bool(asked)

    def _chosen(self, turns: Sequence[Turn]) -> list[bool]:
        if self.train_on == "marked":
            return [turn.wanted is True for turn in turns]
        if self.train_on == "last":
            answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
            return [i in answers[-1:] for i in range(len(turns))]
        return [turn.role == "assistant" and turn.wanted is not False for turn in turns]

    def _follow(self, chat: Written, tokenizer: Phi3Tokenizer) -> Rendered:
        if self.train_on == "all":
            return tokenizer.template.follow(chat, ())
        if self.train_on == "marked":
            raise DataError("a text has no messages that could ask to be trained on")
        said = chat.said if chat.said is not None else tokenizer.template.split(chat).said or ()
        if not said:
            raise DataError(_nothing(self.train_on, ()))
        return tokenizer.template.follow(chat, said[-1:] if self.train_on == "last" else said)


def make_lesson(train_on: str, system_prompt: str | None, add_eos: bool = False) -> Lesson:
    """Check the options of the data set.

    Raises:
        ConfigError: An option has a value that it cannot have.
    """
    check_choice("dataset.train_on", train_on, TRAIN_ON)
    check_switch("dataset.add_eos", add_eos)
    if system_prompt is None:
        return Lesson(train_on, None, add_eos)
    try:
        return Lesson(train_on, make_turn("system", system_prompt), add_eos)
    except DataError as error:
        raise ConfigError(f"dataset.system_prompt: {error}.") from error


def _nothing(train_on: str, turns: Sequence[Turn]) -> str:
    if train_on == "marked":
        return "no message has a weight of 1 or train: true, so nothing to train on"
    if any(turn.role == "assistant" for turn in turns):
        return "every assistant turn has a weight of 0 or train: false, so nothing to train on"
    return "there is no assistant turn, so nothing to train on"


def _starts(batch: Batch) -> NDArray[np.int64]:
    starts: NDArray[np.int64] = (np.cumsum(batch.lengths) - batch.lengths)[batch.lengths > 0]
    return starts
