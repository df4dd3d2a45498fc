"""Talk to a base model, or to a base model and an adapter: `phi3-tune chat --base A --adapter B`.

What was said before is not computed again: the model reads only what is new.
"""

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from phi3_plugin.recipes.phi3_generate import generator
from phi3_plugin.recipes.phi3_generate_conversation import Chat, is_terminal, tell
from phi3_plugin.recipes.phi3_generate_options import check_stop, check_system, checked
from phi3_plugin.recipes.phi3_generate_output import open_streams, set_stdout

from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.generate_cli import CHAT

MAX_NEW_TOKENS = 1024
"""Of an answer, by default: whoever reads along can stop it."""

SOON = 3.0
"""Seconds within which a second Ctrl-C leaves; a later one may clear another line."""


def run(options: Mapping[str, Any]) -> int:
    """Talk until the user leaves, and return the exit code.

    Args:
        options: By key, see phi3_plugin/generate_cli.py; those that are not given are absent.
    """
    o = checked({"max_new_tokens": MAX_NEW_TOKENS, **options}, CHAT, "chat")
    tokenizer = phi3_tokenizer(o.checkpoint_dir, dropped="warn")
    check_stop(o.sampling.stop, tokenizer)
    check_system(o.system, tokenizer)
    positions = read_config(o.checkpoint_dir).max_position_embeddings
    prepare()
    if is_terminal():
        tell("Loading ...")
    chat = Chat(generator(o, tokenizer), tokenizer, positions, o.system)
    if is_terminal():
        tell("/help lists what you can type. Ctrl-C stops an answer, Ctrl-D leaves.")
    with suppress(BrokenPipeError):  # `| head` has seen enough
        return talk(chat)
    return 1


def prepare() -> None:
    """Let lines be edited, and odd characters be no reason to end."""
    open_streams()
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    set_stdout(errors="replace")
    if is_terminal():
        with suppress(ImportError):
            import readline  # input() uses it once it is there

            readline.parse_and_bind("set enable-bracketed-paste on")  # keeps pasted lines together


def talk(chat: Chat) -> int:
    """Read and answer until the input ends; at the prompt, Ctrl-C leaves when it is repeated."""
    warned = -math.inf
    while True:
        try:
            text = message()
        except EOFError:
            if is_terminal():
                print()
            return 0
        except KeyboardInterrupt:
            if time.monotonic() - warned < SOON or not is_terminal():
                print()
                return 0 if is_terminal() else 130
            tell("\n(Ctrl-C again leaves, as Ctrl-D and /exit do.)")
            warned = time.monotonic()
            continue
        if text.strip() and not chat.take(text):
            return 0


def message() -> str:
    """Return a message: a line, and those after it as long as it ends with a backslash."""
    first, next_one = (">>> ", "... ") if is_terminal() else ("", "")
    text = input(first)
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + input(next_one)
        except EOFError:
            break
    return text
