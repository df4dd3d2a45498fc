"""How the next token is chosen, and what else is asked of an answer."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from phi3_plugin.errors import ConfigError


# Shapes: V vocabulary
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked of every answer; by default the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; nothing below but the penalty matters then."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Leave out tokens with less than this part of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides what speaks for tokens that were there before, the prompt included; 1 is off."""
    seed: int = 0
    """Decides the draws of each prompt; those of its neighbours change nothing."""
    max_time: float | None = None
    """Seconds that one answer may take."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""


_RULES: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda n: n >= 1, "a whole number from 1"),
    "temperature": ((int, float), lambda t: 0 <= t <= 1e6, "a number from 0 to a million"),
    "top_k": (int, lambda k: k >= 0, "a whole number from 0, which is off"),
    "top_p": ((int, float), lambda p: 0 < p <= 1, "above 0 and at most 1, which is off"),
    "min_p": ((int, float), lambda p: 0 <= p < 1, "from 0, which is off, and below 1"),
    "repetition_penalty": ((int, float), lambda r: 1e-6 <= r <= 1e6, "from 1e-6 to a million"),
    "seed": (int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1"),
    "max_time": ((int, float), lambda s: 0 < s < math.inf, "a number of seconds above 0"),
    "stop": (tuple, lambda texts: all(_is_text(text) for text in texts), "texts, none empty"),
}


def read_sampling(given: Mapping[str, Any]) -> Sampling:
    """Return what is asked, checked.

    Args:
        given: By name; None is the default. ``stop`` is a text or several.

    Raises:
        ConfigError: Names or values are wrong; each on a line.
    """
    values = {name: value for name, value in given.items() if value is not None}
    stop = values.get("stop", ())
    if isinstance(stop, str):
        values["stop"] = (stop,)
    elif isinstance(stop, Iterable):
        values["stop"] = tuple(stop)
    problems = [line for name, value in values.items() for line in _wrong(name, value)]
    if problems:
        raise ConfigError("\n".join(problems))
    return Sampling(**values)


def _wrong(name: str, value: Any) -> list[str]:
    if name not in _RULES:
        known = [field.name for field in fields(Sampling)]
        close = get_close_matches(str(name), known, 1)
        meant = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
        return [f"{name}: unknown, with the value {value!r}. {meant}"]
    kinds, holds, words = _RULES[name]
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        return [f"{name}: {value!r} must be {words}."]
    return []


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Return the next token of one row.

    Args:
        logits: ``[V]``.
        seen: Tokens of the row so far, prompt included, ``[tokens]``.
        sampling: What is asked.
        random: On the CPU; moves on by one draw if there is one.

    Source: transformers 5.23 ``generation/logits_process.py``, in its order.
    """
    if sampling.repetition_penalty == 1 and sampling.temperature == 0:
        return int(logits.argmax())
    scores = penalized(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    chances = probabilities(scores, sampling).cpu()
    return int(torch.multinomial(chances, 1, generator=random))


def penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return scores ``[V]`` in which tokens that were there before have less to say for them."""
    if penalty == 1:
        return scores
    tokens = seen.unique().to(scores.device)
    before = scores[tokens]
    after = torch.where(before < 0, before * penalty, before / penalty)
    return scores.index_put((tokens,), after)


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return with which probability each token is drawn, ``[V]``; the temperature is above 0."""
    # Ever colder, the likeliest ones alone are left; a quotient could be infinite
    scores = (scores - scores.max()) / max(sampling.temperature, 1e-6)
    if 0 < sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort()
        rest = ordered.softmax(0).cumsum(0) <= 1 - sampling.top_p
        rest[-1] = False
        scores = scores.index_fill(0, order[rest], -math.inf)
    chances = scores.softmax(0)
    if sampling.min_p > 0:
        chances = chances.masked_fill(chances < sampling.min_p * chances.max(), 0)
    return chances / chances.sum()
