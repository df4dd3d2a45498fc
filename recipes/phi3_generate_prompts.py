"""The prompts of `phi3_plugin.recipes.phi3_generate`: read, checked and tokenized.

Everything that is wrong with a file is said before a model is loaded, line by line.
"""

import io
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from phi3_plugin.recipes.phi3_generate_options import STDIN, Options, listed, prompt_ids, too_long

from phi3_plugin.data.json_files import lines
from phi3_plugin.data.messages import MessageList
from phi3_plugin.data.tokenizer import Phi3Tokenizer, warn_of_dropped
from phi3_plugin.data.turns import Turn, kind, make_turn
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from phi3_plugin.train.stock_keys import closest

JSONL, TEXT = (".jsonl", ".ndjson"), (".txt",)

KEYS = ("prompt", "messages")


class Prompt(NamedTuple):
    """What is to be answered."""

    where: str
    """How the user finds it."""
    row: dict[str, Any]
    """What the line of its answer starts with."""
    turns: list[Turn]
    """What was said; without a chat template the text is the only one."""
    ids: "array[int]"
    """Its tokens, four bytes each."""


def read_prompts(o: Options, tokenizer: Phi3Tokenizer, positions: int) -> list[Prompt]:
    """Return the prompts, tokenized.

    Args:
        o: Where they are.
        tokenizer: See :func:`prompt_ids`.
        positions: How many tokens the model can take.

    Raises:
        ConfigError: Nothing says what to answer, or two things do.
        DataError: There are none, or some cannot be used; they are listed.
        MissingFileError: There is no such file.
    """
    prompts, problems = list[Prompt](), list[str]()
    dropped = Counter[str]() if o.dropped == "warn" else None
    for where, row in _rows(o):
        try:
            turns = _turns(row, o)
            text = turns[0].content
            ids = tokenizer.encode(text) if o.raw else prompt_ids(tokenizer, turns, dropped)
            if len(ids) >= positions:
                raise DataError(too_long(len(ids), positions))
            prompts.append(Prompt(where, row, turns, array("i", ids)))
        except DataError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise DataError(f"Not every prompt can be answered.\n{listed(problems)}")
    if not prompts:
        raise DataError(f"{_source(o)} holds no prompts.")
    warn_of_dropped(dropped or {})
    return prompts


def _source(o: Options) -> str:
    return "standard input" if o.prompts == STDIN else str(o.prompts)


def _rows(o: Options) -> Iterator[tuple[str, Any]]:
    """Yield each row, and where it stands."""
    if o.prompt and o.prompts is not None:
        raise ConfigError("prompt and prompts: both are given. Name a file, or type a prompt.")
    if o.prompt:
        if len(o.prompt) > 1 and not any(" " in text.strip() for text in o.prompt):
            raise ConfigError(
                f"prompt: {len(o.prompt)} prompts of one word. Put a prompt in quotes: "
                f'"{" ".join(o.prompt)}". One-word prompts go into a file, one a line.'
            )
        return ((f"prompt {n}", {"prompt": text}) for n, text in enumerate(o.prompt, 1))
    if o.prompts is None:
        raise ConfigError(
            "prompts is not set. Give a prompt in quotes, a .jsonl or .txt file, or - for standard "
            "input."
        )
    is_jsonl = _is_jsonl(o)
    return _from_text(_read(o), is_jsonl)


def _is_jsonl(o: Options) -> bool | None:
    """Whether the name says that each line is JSON; None where it does not say."""
    suffix = Path(str(o.prompts)).suffix.lower()
    if o.prompts == STDIN or not suffix:
        return None
    if suffix not in JSONL + TEXT:
        raise ConfigError(
            f"prompts: {o.prompts} must end in .jsonl, with {{prompt}} or {{messages}} in each "
            "line, or in .txt, with one prompt a line."
        )
    return suffix in JSONL


def _read(o: Options) -> str:
    name = _source(o)
    try:
        data = sys.stdin.buffer.read() if o.prompts == STDIN else Path(str(o.prompts)).read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingFileError(f"prompts: {name} is not there.") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} is not UTF-8 (line {line}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def _from_text(text: str, is_jsonl: bool | None) -> Iterator[tuple[str, Any]]:
    stream = io.StringIO(text, newline=None)  # \r\n and \r end lines too
    if is_jsonl or (is_jsonl is None and _looks_like_json(text)):
        yield from ((f"line {n}", row) for n, row in lines(stream))
        return
    # Empty lines at the end are no prompts; those between others are mistakes, and told as such
    for n, line in enumerate(stream.read().rstrip().split("\n") if text.strip() else [], 1):
        yield f"line {n}", {"prompt": line}


def _looks_like_json(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _turns(row: Any, o: Options) -> list[Turn]:
    """Return what the model is to answer: the conversation, or the text alone."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{kind(row)}, expected an object with prompt or messages")
    key = _key(row)
    if isinstance(row[key], str) and key == "prompt":
        if not row[key].strip():
            raise DataError("the prompt is empty")
        turns = [make_turn("user", row[key])]
    elif key == "prompt" and not isinstance(row[key], list):
        raise DataError(f"prompt is {kind(row[key])}, expected a text")
    elif o.raw:
        raise DataError(f"{key} is {kind(row[key])}; without a chat template, prompt is a text")
    else:
        turns = _without_reference(MessageList(key, "role").read(row))
    if o.system and not any(turn.role == "system" for turn in turns):
        turns.insert(0, make_turn("system", o.system))
    return turns


def _key(row: Mapping[str, Any]) -> str:
    found = [key for key in KEYS if row.get(key) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError("there are prompt and messages; remove one")
    meant = [(name, close) for name in row if (close := closest(str(name), KEYS))]
    said = "; did you mean {1!r} by {0!r}?".format(*meant[0]) if meant else ""
    raise DataError(f"there is neither prompt nor messages{said}")


def _without_reference(turns: list[Turn]) -> list[Turn]:
    """Leave out what the assistant says at the end, which is what the answer is compared with."""
    asked = turns[:-1] if turns[-1].role == "assistant" else turns
    if not any(turn.content.strip() for turn in asked if turn.role != "system"):
        raise DataError("nothing is said that could be answered")
    return asked
