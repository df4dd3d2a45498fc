"""Talk to a base model, or to a base model and an adapter: `phi3-tune chat --base A --adapter B`.

What was said before is not computed again: the model reads only what is new.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from phi3_plugin.checkpoint.files import append_whole
from phi3_plugin.config import read_config
from phi3_plugin.data.thoughts import THOUGHT_FIELDS, split_thought
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import Turn, make_turn
from phi3_plugin.errors import DataError, OutputError, Phi3Error
from phi3_plugin.generate import Generator
from phi3_plugin.load import load_model, tokenizer_of
from phi3_plugin.models.cache import serve
from phi3_plugin.options import ChatOptions, closest
from phi3_plugin.prompts import (
    Speaker,
    as_line,
    check_stop,
    check_system,
    prompt_ids,
    too_long,
)

HELP = """\
/reset        start a new conversation
/system TEXT  set the system message; without a text, remove it
/retry        answer the last message again
/save FILE    add the conversation to a .jsonl file, as a row to train on
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next.
A message that starts with / needs a space before it."""

SAME_ANSWER = (
    "At temperature 0 the answer would be the same. Start with --temperature 0.7 to vary it."
)

SECOND_PRESS = 3.0
"""Seconds within which a second Ctrl-C leaves; a later one may clear another line."""


def run(o: ChatOptions) -> int:
    """Talk until the user leaves, and return the exit code."""
    tokenizer = tokenizer_of(o.checkpoint_dir, o.adapter, dropped="warn")
    check_stop(o.stop, tokenizer)
    check_system(o.system, tokenizer)
    positions = read_config(o.checkpoint_dir).max_position_embeddings
    prepare_streams()
    if is_terminal():
        tell("Loading ...")
    model = load_model(
        o.checkpoint_dir, o.adapter, dtype=o.dtype, device=o.device, quantize=o.quantize
    )
    serve(model)
    generator = Generator(model, tokenizer, o, batch_size=1)
    if is_terminal():
        tell("/help lists what you can type. Ctrl-C stops an answer, Ctrl-D leaves.")
    with suppress(BrokenPipeError):  # `| head` has seen enough
        hide = {"hide_thoughts": o.hide_thoughts}
        return talk(ChatSession(generator, tokenizer, positions, o.system, **hide))
    return 1


def talk(chat: "ChatSession") -> int:
    """Read and answer until the input ends; at the prompt, Ctrl-C leaves when it is repeated."""
    interrupted = -math.inf
    while True:
        try:
            text = message()
        except EOFError:
            if is_terminal():
                print()
            return 0
        except KeyboardInterrupt:
            if time.monotonic() - interrupted < SECOND_PRESS or not is_terminal():
                print()
                return 0 if is_terminal() else 130
            tell("\n(Ctrl-C again leaves, as Ctrl-D and /exit do.)")
            interrupted = time.monotonic()
            continue
        if text.strip() and not chat.take(text):
            return 0


class ChatSession:
    """A conversation, and who answers."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Phi3Tokenizer,
        positions: int,
        system: str | None,
        *,
        hide_thoughts: bool = False,
    ) -> None:
        """Start with nothing said.

        Args:
            generator: Answers.
            tokenizer: Renders the conversation.
            positions: How many tokens the model can take.
            system: The system message.
            hide_thoughts: Whether what is thought before an answer is not shown.
        """
        self.generator = generator
        self.tokenizer = tokenizer
        self.positions = positions
        self.system = system
        self.hide_thoughts = hide_thoughts
        self.turns: list[Turn] = []
        """The user and the assistant by turns."""
        self._first = 0  # before this turn, the model sees nothing any more
        self._stopped = False  # whether the last answer is not whole
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/system": self.set_system,
            "/retry": self.retry,
            "/save": self.save,
            "/help": lambda _: tell(HELP),
        }

    def take(self, text: str) -> bool:
        """Do what a message or a command asks for; return whether to go on."""
        name, rest = [*text.split(maxsplit=1), "", ""][:2]
        if name in ("/exit", "/quit"):
            return False
        try:
            if not text.startswith("/"):
                self.ask(text.strip())
            elif name in self._commands:
                self._commands[name](rest.strip())
            else:
                meant = closest(name, self._commands)
                advice = f"Did you mean {meant}?" if meant else "/help lists commands."
                say = "To say it to the model, put a space before it."
                tell(f"There is no {name}. {advice} {say}")
        except OutputError:  # nobody would see the answers
            raise
        except Phi3Error as error:
            tell(str(error))
        return True

    def ask(self, text: str) -> None:
        """Answer a message. One that gets no answer is taken back."""
        if not text:
            return
        self.turns.append(make_turn("user", text))
        if reply := self._reply():
            self.turns.append(reply)
        else:
            self.turns.pop()

    def retry(self, _: str = "") -> None:
        """Answer the last message again; the answer before stays if there is no other."""
        if not self.turns:
            return tell("There is no answer yet.")
        if not (self._stopped or self.generator.sampling.temperature):
            return tell(SAME_ANSWER)
        before = self.turns.pop()
        self.turns.append(self._reply() or before)

    def _reply(self) -> Turn | None:
        """Let the model answer; None if it says nothing."""
        speaker = Speaker(hide_thoughts=self.hide_thoughts)
        try:
            reason = self.generator.answer(self._prompt(), speaker).reason
        except KeyboardInterrupt:
            reason = "stopped"
        except DataError as error:
            tell(f"Not sent: {error}.")
            return None
        except torch.OutOfMemoryError:
            tell("The device has no memory left for a conversation of this length. Try /reset.")
            return None
        text = speaker.text
        self._stopped = reason == "stopped"
        if text or self._stopped:
            speaker.end()
        if cut := speaker.told(reason, self.generator.sampling):
            tell(f"({cut.capitalize()}.)")
        if not text.strip():
            tell("(No answer. Your message was taken back.)")
            return None
        if self.tokenizer.template.reads.thought is None:
            return make_turn("assistant", text)
        thought, said = split_thought(text)  # as the template takes them
        return make_turn("assistant", said)._replace(thought=thought or None)

    def _prompt(self) -> list[int]:
        """Return what the model reads; where it has no room for all, the oldest is left out.

        Raises:
            DataError: There is no room for the last message alone.
        """
        first = self._first
        room = min(self.generator.sampling.max_new_tokens, self.positions // 4)
        while True:
            ids = prompt_ids(self.tokenizer, [*self._head(), *self.turns[first:]])
            if len(ids) + room <= self.positions or first >= len(self.turns) - 1:
                break
            first += 2
        if len(ids) >= self.positions:
            raise DataError(too_long(len(ids), self.positions))
        if first > self._first:
            tell(f"(The model sees {self.positions:,} tokens: your first {first // 2} no longer.)")
        self._first = first
        return ids

    def _head(self) -> list[Turn]:
        return [make_turn("system", self.system)] if self.system else []

    def reset(self, _: str = "") -> None:
        """Forget what was said."""
        self.turns = []
        self._first = 0
        self._stopped = False
        tell("A new conversation.")

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it; what was said stays."""
        check_system(text, self.tokenizer)
        self.system = text or None
        tell(f"The system message is {'set' if text else 'removed'}; /reset starts anew under it.")

    def save(self, name: str) -> None:
        """Add the conversation to a file as a row of chat data, after the end of its last line."""
        file = Path(name).expanduser()
        if not self.turns:
            return tell("There is nothing to save yet.")
        if file.suffix != ".jsonl":
            return tell("Name a file that ends in .jsonl, as in /save chats.jsonl.")
        turns = [*self._head(), *self.turns]
        row = {"messages": [_message(turn) for turn in turns]}
        line = as_line(row).encode()
        try:
            if file.exists() and (size := file.stat().st_size):
                with file.open("rb") as opened:
                    opened.seek(size - 1)
                    line = line if opened.read(1) == b"\n" else b"\n" + line
            append_whole(file, line)
        except OSError as error:
            return tell(f"{file} cannot be written: {error.strerror or error}.")
        tell(f"Added a conversation of {len(turns)} messages to {file}.")


def _message(turn: Turn) -> dict[str, str]:
    thought = {} if turn.thought is None else {THOUGHT_FIELDS[0]: turn.thought}
    return {"role": turn.role, "content": turn.content, **thought}


# The terminal, or the streams of a program.


def is_terminal() -> bool:
    """Whether a person types, and reads the answers."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def tell(text: str) -> None:
    """Tell the user what is no answer, and keep it out of answers that a program reads."""
    print(text, file=sys.stdout if is_terminal() else sys.stderr, flush=True)


def prepare_streams() -> None:
    """Let lines be edited, and odd characters be no reason to end."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if is_terminal():
        with suppress(ImportError):
            import readline  # input() uses it once it is there

            readline.parse_and_bind("set enable-bracketed-paste on")  # keeps pasted lines together


def message() -> str:
    """Return a message: a line, and those after it as long as it ends with a backslash."""
    first, following = (">>> ", "... ") if is_terminal() else ("", "")
    text = input(first)
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + input(following)
        except EOFError:
            break
    return text
