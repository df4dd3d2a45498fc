"""`phi3-tune generate ...` and `phi3-tune chat ...`: what can be typed, and what it means.

The keys of `generate` are those of `tune run phi3_generate`, which takes them as `key=value`.
Needs the standard library alone until a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = ("bf16", "fp32")
DROPPED = ("error", "warn")


class Option(NamedTuple):
    """A key, and how it is typed."""

    flags: tuple[str, ...]
    """None of them: it is typed by its place."""
    how: dict[str, Any]
    """What argparse is told."""


def _number(flag: str, kind: type, text: str) -> Option:
    return Option((flag,), {"type": kind, "metavar": "N", "help": text})


MODEL = {
    "checkpoint_dir": Option(
        ("--base", "--checkpoint-dir"),
        {"metavar": "DIR", "help": "folder of the base model, as it was downloaded"},
    ),
    "adapter": Option(
        ("--adapter",), {"metavar": "DIR", "help": "folder of an adapter, ours or anyone's"}
    ),
    "dtype": Option(
        ("--dtype",), {"choices": DTYPES, "help": "what is computed in (default: bf16)"}
    ),
    "device": Option(("--device",), {"help": "cpu or cuda (default: a GPU where there is one)"}),
    "quantize": Option(
        ("--quantize",), {"action": "store_true", "help": "keep the base's weights in NF4"}
    ),
}
"""Which model answers."""

SAMPLING = {
    "max_new_tokens": _number(
        "--max-new-tokens", int, "tokens of an answer at most (default: 256; chat: 1024)"
    ),
    "temperature": _number(
        "--temperature", float, "0, the default: always the most probable token; else sampled"
    ),
    "top_k": _number("--top-k", int, "sample from the N most probable tokens (0, off)"),
    "top_p": _number("--top-p", float, "sample from tokens that together have probability N (1)"),
    "min_p": _number(
        "--min-p", float, "sample from tokens of at least N of the best one's probability (0)"
    ),
    "repetition_penalty": _number(
        "--repetition-penalty", float, "above 1: tokens that were there become less probable (1)"
    ),
    "seed": _number("--seed", int, "of the sampling (0)"),
    "max_time": _number("--max-time", float, "seconds of an answer at most, from its first token"),
    "stop": Option(
        ("--stop",),
        {
            "action": "append",
            "metavar": "TEXT",
            "help": "text that ends an answer and is not part of it; may be repeated",
        },
    ),
}
"""How tokens are chosen, and when an answer ends."""

SYSTEM = {"system": Option(("--system",), {"metavar": "TEXT", "help": "system message"})}

PROMPTS = {
    "prompt": Option(
        (),
        {
            "nargs": "*",
            "metavar": "PROMPT",
            "help": "what to answer, in quotes; the answer is printed as it is written",
        },
    ),
    "prompts": Option(
        ("--file", "--prompts"),
        {
            "metavar": "FILE",
            "help": "many prompts: .jsonl with {prompt} or {messages}, or .txt with one a line; - "
            "is standard input",
        },
    ),
    "output": Option(
        ("-o", "--output"), {"metavar": "OUT", "help": "JSONL file to write (standard output)"}
    ),
    "overwrite": Option(("--overwrite",), {"action": "store_true", "help": "replace OUT"}),
    "raw": Option(
        ("--raw",), {"action": "store_true", "help": "complete the text, without chat template"}
    ),
    "batch_size": _number("--batch-size", int, "prompts that are answered at a time (8)"),
    "dropped": Option(
        ("--dropped",),
        {
            "choices": DROPPED,
            "help": "what a message is that the chat template leaves out (default: error)",
        },
    ),
}
"""Of `generate` alone."""

OPTIONS = {**MODEL, **PROMPTS, **SYSTEM, **SAMPLING}
"""Every key."""

CHAT = (*MODEL, *SYSTEM, *SAMPLING)
"""The keys of `chat`."""

RECIPE = tuple(key for key in OPTIONS if key != "prompt")
"""The keys of the recipe. It takes prompts from a file: `key=value` would mangle free text."""

VERBS = {
    "generate": (
        "Answer prompts",
        "Answer a prompt in the terminal, or a file of prompts into a JSONL file. Ctrl-C keeps "
        "the answers that are there, and the same command goes on from them.",
        tuple(OPTIONS),
    ),
    "chat": (
        "Talk to a model",
        "Talk to a model in the terminal. /help lists what can be typed.",
        CHAT,
    ),
}
"""What a verb is listed as, what it does, and its keys."""


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return what was given to a command.

    Args:
        words: The command line from the command on, ``generate`` or ``chat``.
    """
    given = vars(parser(words[0]).parse_intermixed_args(words[1:]))
    if given.get("prompt") == ["-"]:  # standard input, as everywhere, and no prompt
        given |= {"prompt": [], "prompts": "-"}
    # 0 and an empty text are values
    return {key: v for key, v in given.items() if v is not None and v is not False and v != []}


def parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a command. Prompts and options may come in any order."""
    _, does, keys = VERBS[verb]
    made = argparse.ArgumentParser(prog=f"phi3-tune {verb}", description=does)
    for key in keys:
        flags, how = OPTIONS[key]
        if flags:
            made.add_argument(*flags, dest=key, required=key == "checkpoint_dir", **how)
        else:
            made.add_argument(key, **how)
    return made
