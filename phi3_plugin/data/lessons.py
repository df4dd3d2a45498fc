"""What of a conversation is trained on, and the system message put in front of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi3_plugin.data.encoder import Tokens
from phi3_plugin.data.options import check_choice
from phi3_plugin.data.turns import Turn, make_turn
from phi3_plugin.errors import ConfigError, DataError

TRAIN_ON = ("assistant", "last", "all")
"""Every assistant turn, the last assistant turn, or all tokens but the first."""

NOTHING = {
    "assistant": "no assistant turn starts",
    "last": "the last assistant turn does not start",
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

    def prepare(self, turns: Sequence[Turn]) -> list[Turn]:
        """Mark the turns that are trained on, and add the system message.

        Raises:
            DataError: There is nothing to train on.
        """
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.train_on != "all" and not answers:
            raise DataError("there is no assistant turn, so nothing to train on")
        chosen = set(answers[-1:] if self.train_on == "last" else answers)
        marked = [turn._replace(trained=i in chosen) for i, turn in enumerate(turns)]
        if self.system is None or any(turn.role == "system" for turn in turns):
            return marked
        return [self.system, *marked]

    def mark(self, chat: Tokens) -> Tokens:
        """Mark the tokens that are trained on, given those that the turns mark."""
        if self.train_on != "all":
            return chat
        # Nothing comes before the first, from which it could be predicted
        return chat._replace(trained=np.arange(len(chat.ids)) > 0)


def make_lesson(train_on: str, system_prompt: str | None) -> Lesson:
    """Check the options of the data set.

    Raises:
        ConfigError: An option has a value that it cannot have.
    """
    check_choice("dataset.train_on", train_on, TRAIN_ON)
    if system_prompt is None:
        return Lesson(train_on)
    try:
        return Lesson(train_on, make_turn("system", system_prompt))
    except DataError as error:
        raise ConfigError(f"dataset.system_prompt: {error}.") from error
