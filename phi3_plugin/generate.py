"""Text from a model: how a token is chosen, when an answer ends, and many answers at once."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import count, takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from phi3_plugin.errors import CheckpointError, ConfigError, DataError

# How the next token is chosen, and what else is asked of an answer.


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


# The text of an answer while it grows: whole characters, and where a stop text ends it.

UNFINISHED = "�"
"""What bytes decode to that are no character yet."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed."""

    special_tokens: dict[str, int]
    stop_tokens: list[int]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn ids back into text."""


class Text:
    """What the tokens so far say, and how much of it can be shown."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str]) -> None:
        """Start empty.

        Args:
            tokenizer: Knows what tokens say.
            stop: Texts that end the answer, and are no part of it.
        """
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._before = self._read = 0  # tokens [before:read] were said with the last piece
        self._said, self._shown = "", 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; return what can be shown now and could not be before."""
        self._tokens.append(token)
        # Only the last tokens are decoded, and those before them to see what is new: the first
        # token of a text may lose a space that it has elsewhere.
        before = self._tokenizer.decode(self._tokens[self._before : self._read])
        now = self._tokenizer.decode(self._tokens[self._before :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return self._take(now[len(before) :])

    def end(self) -> str:
        """Return what was held back, and is no part of a stop text after all."""
        shown = ""
        if not self.stopped:
            whole = self._tokenizer.decode(self._tokens)
            if whole.startswith(self._said):
                shown = self._take(whole[len(self._said) :])
            else:  # bytes that were no character; what was shown of them stays
                self._said = whole
                return ""
        rest, self._shown = self._said[self._shown :], len(self._said)
        return shown + rest

    @property
    def said(self) -> str:
        """The text so far, without a stop text."""
        return self._said

    def _take(self, piece: str) -> str:
        searched = max(len(self._said) - max(map(len, self._stop), default=0), 0)
        self._said += piece
        found = [at for at in (self._said.find(stop, searched) for stop in self._stop) if at >= 0]
        if found:
            self._said, self.stopped = self._said[: min(found)], True
        ready = len(self._said) if self.stopped else len(self._said) - self._could_stop()
        shown = self._said[self._shown : ready]
        self._shown = max(ready, self._shown)
        return shown

    def _could_stop(self) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self._said)), 0, -1):
            if any(stop.startswith(self._said[-count:]) for stop in self._stop):
                return count
        return 0


# Many answers at once: a row that has ended makes room for the next prompt.

TOGETHER = 4096
"""Tokens of new prompts that are read at once, if they are several."""

OnText = Callable[[int, str], None]
"""(number of the prompt, the next piece of its answer)."""


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    index: int
    """Of the prompt."""
    text: str
    """Without the token or text that ended it."""
    tokens: tuple[int, ...]
    """As they came, with the token that ended it."""
    reason: str
    """Why it ended: stop, length, time or context."""
    prompt_tokens: int


class _Row:
    """An answer in the making."""

    def __init__(self, index: int, prompt: Sequence[int], asked: Sampling, text: Text) -> None:
        self.index, self.prompt, self.asked, self.text = index, len(prompt), asked, text
        self.tokens, self.reason = list(prompt), ""
        self.random = torch.Generator().manual_seed((asked.seed * 1_000_003 + index) % 2**63)
        self.started = time.monotonic()

    def answer(self) -> Answer:
        """Return the finished answer."""
        said, text = tuple(self.tokens[self.prompt :]), self.text.said
        return Answer(self.index, text, said, self.reason, self.prompt)


class Generator:
    """Answers prompts with one model."""

    def __init__(
        self, model: Any, tokenizer: Decoder, sampling: Sampling, *, batch_size: int = 8
    ) -> None:
        """Take what answers, and how it is asked.

        Args:
            model: torchtune's decoder as this package builds it, in evaluation mode.
            tokenizer: Of the checkpoint.
            sampling: What is asked of each answer.
            batch_size: Answers in the making at a time, 1 or more.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size!r} must be a whole number from 1.")
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.batch_size = batch_size
        # A special token never shows in a text, so a stop text that is one is a stop token.
        special = getattr(tokenizer, "special_tokens", {})
        self._ends = {*tokenizer.stop_tokens, *(special[t] for t in sampling.stop if t in special)}
        self._stop = [text for text in sampling.stop if text not in special]
        self._device = model.norm.scale.device
        self._alone: Any = None
        self._heard: list[int] = []
        self._asked = 0

    def check(self, index: int, prompt: Sequence[int]) -> None:
        """Refuse a prompt that cannot be answered.

        Args:
            index: Its number, from 0.
            prompt: Its tokens.

        Raises:
            DataError: It has no token or unknown ones, or leaves no room for an answer.
        """
        limit, known = self.model.max_seq_len, self.model.tok_embeddings.num_embeddings
        if not len(prompt):
            raise DataError(f"prompt {index + 1} is empty. Give it some text, or leave it out.")
        if len(prompt) >= limit:
            raise DataError(
                f"prompt {index + 1} has {len(prompt)} tokens, but the model has {limit} "
                "positions for prompt and answer. Shorten it."
            )
        if strange := next((token for token in prompt if not 0 <= token < known), None):
            told = f"prompt {index + 1} has the token {strange}, but the model knows {known}."
            raise DataError(f"{told} Use the tokenizer of its own folder.")

    def answers(
        self,
        prompts: Iterable[Sequence[int]],
        on_text: OnText | None = None,
        *,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Answer]:
        """Answer prompts, and yield the answers in the order in which they end.

        What one is answered does not depend on the others, but for rounding.

        Args:
            prompts: Tokens of each; taken as there is room.
            on_text: Told how the answers grow.
            numbers: Of the prompts, if not from 0 on: what is drawn for one goes by its number.

        Raises:
            DataError: A prompt cannot be answered, see :meth:`check`.
        """
        counted = count() if numbers is None else numbers
        waiting, rows = zip(counted, prompts, strict=False), list[_Row]()
        cache = self.model.cache(self.batch_size)
        while True:
            self._fill(rows, waiting)
            if not rows:
                return
            self._extend(cache, rows, on_text)
            for number in reversed(range(len(rows))):
                if rows[number].reason:
                    yield self._ended(cache, rows, number, on_text)

    def answer(self, prompt: Sequence[int], on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer one prompt; what it begins with as the last one did is not read again.

        Args:
            prompt: Its tokens.
            on_text: Told how the answer grows.

        Raises:
            DataError: It cannot be answered, see :meth:`check`.
        """
        self.check(0, prompt)
        tell = None if on_text is None else lambda _, piece: on_text(piece)
        cache = self._alone = self._alone or self.model.cache(1)
        heard, self._heard = self._heard, []  # until it is known again, whatever happens
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(heard, prompt, strict=False))
        # The last token is always read: what follows it is asked for.
        same = min(sum(1 for _ in pairs), len(prompt) - 1)
        cache.keep(0, same if self.model.turns_alike(len(heard), len(prompt)) else 0)
        row, self._asked = self._row(self._asked, prompt), self._asked + 1
        try:
            while not row.reason:
                self._extend(cache, [row], tell)
        finally:
            self._heard = row.tokens[: cache.lengths[0]]
        if (rest := row.text.end()) and tell:
            tell(0, rest)
        return row.answer()

    def _row(self, index: int, prompt: Sequence[int]) -> _Row:
        return _Row(index, prompt, self.sampling, Text(self.tokenizer, self._stop))

    def _fill(self, rows: list[_Row], waiting: Iterator[tuple[int, Sequence[int]]]) -> None:
        while len(rows) < self.batch_size and (found := next(waiting, None)):
            self.check(*found)
            rows.append(self._row(*found))

    def _ended(self, cache: Any, rows: list[_Row], number: int, on_text: OnText | None) -> Answer:
        """Take a row out, and put the last one in its place."""
        row, last = rows[number], rows.pop()
        if row is not last:
            rows[number] = last
            cache.move(len(rows), number)
        cache.keep(len(rows), 0)
        if (rest := row.text.end()) and on_text:
            on_text(row.index, rest)
        return row.answer()

    # A cache outlives a call, and is written in place: not as a tensor of inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def _extend(self, cache: Any, rows: list[_Row], on_text: OnText | None) -> None:
        """Add a token to every row."""
        for number, row in enumerate(rows):
            length = cache.lengths[number]
            if length and not self.model.turns_alike(length, len(row.tokens)):
                cache.keep(number, 0)
        new = [number for number in range(len(rows)) if not cache.lengths[number]]
        old = [number for number in range(len(rows)) if cache.lengths[number]]
        for group in (*_groups(new, rows), old):
            if group:
                logits = self._logits(cache, rows, group)
                chosen = [rows[number] for number in group]
                for row, token in zip(chosen, self._chosen(chosen, logits), strict=True):
                    self._say(row, token, on_text)

    def _logits(self, cache: Any, rows: list[_Row], group: list[int]) -> Tensor:
        """Read what is not cached yet of some rows; return what may follow, ``[rows, V]``."""
        unread = [rows[number].tokens[cache.lengths[number] :] for number in group]
        tokens = torch.tensor([token for row in unread for token in row], device=self._device)
        step = self.model.step(cache, group, [len(row) for row in unread])
        with torch.autocast(self._device.type, enabled=False):  # the model's dtype is the cache's
            logits: Tensor = self.model(tokens[None], step=step)
        return logits

    def _chosen(self, rows: list[_Row], logits: Tensor) -> list[int]:
        asked, (highest, likeliest) = self.sampling, logits.max(dim=-1)
        if not highest.isfinite().all():
            raise CheckpointError(
                "the model's scores are not finite: its weights or those of the adapter are "
                "damaged. Download or train them again."
            )
        if asked.temperature == 0 and asked.repetition_penalty == 1:
            return likeliest.tolist()
        return [
            choose(scores, torch.tensor(row.tokens), asked, row.random)
            for row, scores in zip(rows, logits, strict=True)
        ]

    def _say(self, row: _Row, token: int, on_text: OnText | None) -> None:
        row.tokens.append(token)
        asked, said = self.sampling, len(row.tokens) - row.prompt
        if token in self._ends:
            row.reason = "stop"
            return
        if (piece := row.text.push(token)) and on_text:
            on_text(row.index, piece)
        if row.text.stopped:
            row.reason = "stop"
        elif said == asked.max_new_tokens:
            row.reason = "length"
        elif len(row.tokens) >= self.model.max_seq_len:
            row.reason = "context"
        elif asked.max_time and time.monotonic() - row.started >= asked.max_time:
            row.reason = "time"


def _groups(new: list[int], rows: list[_Row]) -> Iterator[list[int]]:
    """Yield new rows by so many that they are read at once."""
    group, size = list[int](), 0
    for number in new:
        length = len(rows[number].tokens)
        if group and size + length > TOGETHER:
            yield group
            group, size = [], 0
        group.append(number)
        size += length
    if group:
        yield group
