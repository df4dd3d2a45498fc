"""What EleutherAI's harness asks for, in our words: tokens of a text, chats, ways to answer."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from phi3_plugin.data.sandbox import run_template
from phi3_plugin.data.template import ChatTemplate
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import DataError
from phi3_plugin.generate.sampling import Sampling, read_sampling

log = logging.getLogger(__name__)

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What the harness calls the length of an answer; the first that is given counts."""

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""What tasks may ask of transformers that changes nothing here."""


def plain_encoder(folder: Path) -> Tokenizer:
    """Return what encodes a text as transformers does, with the tokens that go around it.

    Args:
        folder: Of a checkpoint whose files were read before.
    """
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def chat_text(template: ChatTemplate, history: Sequence[Mapping[str, str]], *, ask: bool) -> str:
    """Return a conversation as the template writes it.

    Args:
        template: Of the checkpoint.
        history: Role and content of each message.
        ask: For an answer; otherwise the last message is left open, to be gone on with.

    Raises:
        DataError: The template fails.
    """

    def write(messages: Sequence[Mapping[str, str]]) -> str:
        turns = [make_turn(message["role"], message["content"]) for message in messages]
        names = template.special_tokens
        how: Any = {"add_generation_prompt": ask, "special_tokens": names}
        return run_template(template.source, turns, **how)

    try:
        text = write(history)
    except DataError:
        history = [message for message in history if message["role"] != "system"]
        text = write(history)
        log.warning("The chat template takes no system message, which is left out.")
    return text if ask else _left_open(text, history[-1]["content"])


def _left_open(text: str, last: str) -> str:
    """Return a text up to the end of its last message, with or without the spaces it ends in.

    Source: transformers 5.23, ``utils/chat_template_utils.py``.
    """
    at = text.rfind(last.strip())
    if at < 0:
        raise DataError("the chat template changes the message that is to be gone on with")
    whole = at + len(last.lstrip())
    return text[:whole] if text[at:whole] == last.lstrip() else text[: at + len(last.strip())]


def sampling_of(given: Mapping[str, Any], default: int) -> Sampling:
    """Return what a task asks of answers.

    Args:
        given: Its ``generation_kwargs``.
        default: Tokens of an answer where it does not say.

    Raises:
        ConfigError: It asks for what we do not do; each on a line.
    """
    rest = {k: v for k, v in given.items() if v is not None and NEUTRAL.get(k, ...) != v}
    lengths = [rest.pop(key) for key in LENGTHS if key in rest]
    until, draws = rest.pop("until", ()), rest.pop("do_sample", None)
    texts = [until] if isinstance(until, str) else list(until)
    temperature = float(rest.pop("temperature", 0.0)) if draws is not False else 0.0
    if draws and not temperature:
        log.warning("do_sample is true, but there is no temperature: the likeliest token is taken.")
    # The harness's own seed, so that --seed decides what is drawn.
    own = {"seed": torch.initial_seed() % 2**63, "max_new_tokens": int([*lengths, default][0])}
    stop = tuple(text for text in texts if text)
    return read_sampling({**own, **rest, "temperature": temperature, "stop": stop})
