"""What `phi3_plugin.recipes.phi3_generate` and `phi3_chat` are asked for, checked."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.turns import Turn, make_turn
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.generate.sampling import Sampling, read_sampling
from phi3_plugin.generate_cli import OPTIONS, SAMPLING
from phi3_plugin.train.stock_keys import shown, unknown_key

STDIN = "-"

SPECIAL = re.compile(r"<\|.*\|>")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys, each by the name it has in the YAML; phi3_plugin/generate_cli.py explains them."""

    checkpoint_dir: str
    adapter: str | None = None
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    output: str | None = None
    overwrite: bool = False
    system: str | None = None
    raw: bool = False
    batch_size: int = 8
    dropped: str = "error"
    dtype: str = "bf16"
    device: str | None = None
    quantize: bool = False
    sampling: Sampling


def checked(given: Mapping[str, Any], known: Sequence[str], owner: str) -> Options:
    """Return what was given, every value of the type it must have.

    Args:
        given: By key; those that are None are not given.
        known: The keys that there are.
        owner: Who has them, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or has a value it cannot have; all are listed.
    """
    options = {key: value for key, value in given.items() if value is not None}
    if options.get("prompts") == [None]:
        options["prompts"] = STDIN  # what YAML makes of a single dash
    problems = [p for key, value in options.items() for p in _wrong(key, value, known, owner)]
    sampling = Sampling()
    try:
        named = {k: v for k, v in options.items() if k in SAMPLING and k in known}
        sampling = read_sampling({k: v for k, v in named.items() if k != "stop" or _is_stop(v)})
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    checkpoint_folder(options.get("checkpoint_dir"))
    names = {field.name for field in fields(Options)}
    own = {key: value for key, value in options.items() if key in names}
    own["prompt"] = tuple(own.get("prompt", ()))
    return Options(**own, sampling=sampling)


def _wrong(key: str, value: Any, known: Sequence[str], owner: str) -> list[str]:
    if key not in known:
        return [unknown_key(key, value, owner, known, f"Available: {', '.join(known)}.")]
    if key == "stop" and not _is_stop(value):
        return [f"stop: {shown(value)} must be a text, or a list of texts such as '[\"Q:\"]'."]
    if key in SAMPLING:
        return []
    problem = next((words for ok, words in _rules(key) if not ok(value)), None)
    return [f"{key}: {shown(value)} must be {problem}."] if problem else []


def _rules(key: str) -> list[tuple[Callable[[Any], bool], str]]:
    how = OPTIONS[key].how
    if "choices" in how:
        return [(lambda v: v in how["choices"], f"one of {', '.join(how['choices'])}")]
    if how.get("action") == "store_true":
        return [(lambda v: isinstance(v, bool), "True or False")]
    if how.get("type") is int:
        return [(lambda v: type(v) is int and v >= 1, "a whole number from 1")]
    if key == "prompt":
        return []
    if key == "system":
        return [(lambda v: isinstance(v, str), "a text; quote it as 'system=\"...\"'")]
    return [(lambda v: isinstance(v, str) and v != "", f"a name, such as ./my_{key}")]


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(text, str) for text in texts)


def check_stop(stop: Sequence[str], tokenizer: Phi3Tokenizer) -> None:
    """Refuse a text that is meant as a special token and is none of this tokenizer's.

    Raises:
        ConfigError: There is one.
    """
    known = tokenizer.special_tokens
    if unknown := [text for text in stop if SPECIAL.fullmatch(text) and text not in known]:
        raise ConfigError(
            f"stop: {', '.join(map(repr, unknown))} would never be written: the special tokens of "
            f"this checkpoint are {', '.join(known)}."
        )


def check_system(system: str | None, tokenizer: Phi3Tokenizer) -> None:
    """Refuse a system message that the chat template leaves out.

    Raises:
        ConfigError: It does.
        DataError: It is no valid text.
    """
    if not system:
        return
    turns = [make_turn("system", system), make_turn("user", "Hello")]
    if tokenizer.template.render(turns, add_generation_prompt=True).dropped:
        raise ConfigError(
            "system: the chat template of this checkpoint leaves system messages out. Write it "
            "at the start of the prompt instead."
        )


def prompt_ids(
    tokenizer: Phi3Tokenizer, turns: Sequence[Turn], dropped: Counter[str] | None = None
) -> list[int]:
    """Return the tokens of a conversation, with the header of the answer at the end.

    Args:
        tokenizer: One that lets the template leave messages out, to be judged here.
        turns: What was said.
        dropped: Counts the messages that are left out; None allows none.

    Raises:
        DataError: It cannot be rendered.
    """
    rendered = tokenizer.render(turns, add_generation_prompt=True)
    if rendered.dropped and dropped is None:
        raise DataError(
            f"the chat template leaves out {', '.join(dict.fromkeys(rendered.dropped))}; remove "
            "it, or set dropped to warn to go on without"
        )
    if dropped is not None:
        dropped.update(rendered.dropped)
    (tokens,) = tokenizer.encode_chats([rendered]).split()
    ids: list[int] = tokens.ids.tolist()
    return ids


def too_long(tokens: int, positions: int) -> str:
    """Say that a prompt leaves no room for an answer."""
    return f"{tokens:,} tokens, but the model has {positions:,} positions, answer included"


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems one a line, the first of them where there are many."""
    more = len(problems) - most
    return "\n".join([*problems[:most], *([f"... and {more:,} more."] if more > 0 else [])])
