"""Text from a model: how a token is chosen, when an answer ends, and many answers at once."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.data import Message

from phi3_plugin.callable_module import CallableModule
from phi3_plugin.data.thoughts import begun_thought
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.device import computes_ahead, sent
from phi3_plugin.errors import CheckpointError, DataError
from phi3_plugin.models.cache import is_served
from phi3_plugin.models.recorded import Recorded
from phi3_plugin.options import Sampling

# Which token comes next. Source: transformers 5.23 ``generation/logits_process.py``, in its order.


# Shapes: V vocabulary
def choose(logits: Tensor, seen: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Return the next token of one row.

    Args:
        logits: ``[V]``.
        seen: Tokens of the row so far, prompt included, ``[tokens]``.
        sampling: How it is chosen.
        random: On the CPU; moves on by one draw if there is one.
    """
    scores = penalized(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(probabilities(scores, sampling).cpu(), 1, generator=random))


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
        ascending, order = scores.sort()
        rest = ascending.softmax(0).cumsum(0) <= 1 - sampling.top_p
        rest[-1] = False
        scores = scores.index_fill(0, order[rest], -math.inf)
    chances = scores.softmax(0)
    if sampling.min_p > 0:
        chances = chances.masked_fill(chances < sampling.min_p * chances.max(), 0)
    return chances / chances.sum()


# The text of an answer while it grows.


def answer_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return what makes a text of an answer's tokens: ours shows thoughts, others what they do."""
    decode: Callable[[Sequence[int]], str]
    decode = getattr(tokenizer, "decode_answer", tokenizer.decode)
    return decode


class GrowingText:
    """The text of the tokens so far: shown in whole characters, and ended by a stop text."""

    def __init__(
        self, tokenizer: Phi3Tokenizer, stops: Sequence[str] = (), begun: str = ""
    ) -> None:
        """Start with what is there already.

        Args:
            tokenizer: Decodes.
            stops: Texts that end the answer, and are no part of it.
            begun: What the prompt has of it.
        """
        self.text = begun
        """So far, without a stop text."""
        self._begun = begun
        self.stopped = False
        """Whether a stop text ended it."""
        self._decode = answer_decoder(tokenizer)
        self._stops = stops
        self._tokens: list[int] = []
        self._last = slice(0, 0)  # the tokens that the last piece came from
        self._shown = 0  # characters

    def push(self, token: int) -> str:
        """Take a token; return what can be shown now and could not be before."""
        self._tokens.append(token)
        # Only the last tokens are decoded, and those before them to see what is new: the first
        # token of a text may lose a space that it has elsewhere.
        before = self._decode(self._tokens[self._last])
        now = self._decode(self._tokens[self._last.start :])
        # Bytes that are no character yet decode to a replacement character
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._last = slice(self._last.stop, len(self._tokens))
        return self._grow(now[len(before) :])

    def end(self) -> str:
        """Return what was held back, and is no part of a stop text after all."""
        shown = ""
        if not self.stopped:
            whole = self._begun + self._decode(self._tokens)
            if not whole.startswith(self.text):  # bytes that were no character: shown as they are
                self.text = whole
                return ""
            shown = self._grow(whole[len(self.text) :])
        rest = self.text[self._shown :]
        self._shown = len(self.text)
        return shown + rest

    def _grow(self, piece: str) -> str:
        searched = max(len(self.text) - max(map(len, self._stops), default=0), 0)
        self.text += piece
        starts = [self.text.find(stop, searched) for stop in self._stops]
        if starts := [start for start in starts if start >= 0]:
            self.text = self.text[: min(starts)]
            self.stopped = True
        ready = len(self.text)
        if not self.stopped:  # the end may be the beginning of a stop text
            beginnings = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
            ready -= max((len(b) for b in beginnings if self.text.endswith(b)), default=0)
        shown = self.text[self._shown : ready]
        self._shown = max(ready, self._shown)
        return shown


# Many answers at once: a row that has ended makes room for the next prompt.

TOKENS_OF_A_MARK = 16
"""At the end of a prompt in which it is looked for: ``<think>`` and white space take fewer."""

READ_AT_ONCE = 4096
"""Tokens of new prompts that are read together, if they are several."""


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt."""

    index: int
    """Number of the prompt."""
    text: str
    """Without the token or text that ended it; with the ``<think>`` that its prompt may end in."""
    tokens: tuple[int, ...]
    """As they came, with the token that ended it."""
    reason: str
    """Why it ended: stop, length, time or context."""
    prompt_tokens: int


class _Row:
    """An answer in the making."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, text: GrowingText) -> None:
        self.index = index
        self.prompt_tokens = len(prompt)
        self.tokens = list(prompt)
        self.text = text
        self.reason = ""
        self.random = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        self.started = time.monotonic()

    def answer(self) -> Answer:
        tokens = tuple(self.tokens[self.prompt_tokens :])
        return Answer(self.index, self.text.text, tokens, self.reason, self.prompt_tokens)


class Generator:
    """Answers prompts with one model."""

    def __init__(
        self, model: Any, tokenizer: Phi3Tokenizer, sampling: Sampling, *, batch_size: int = 8
    ) -> None:
        """Take what answers, and how.

        Args:
            model: torchtune's decoder as this package builds it, in evaluation mode.
            tokenizer: Of the checkpoint.
            sampling: How tokens are chosen, and when an answer ends.
            batch_size: Answers in the making at a time, 1 or more.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.batch_size = batch_size
        # A special token never shows in a text, so a stop text that is one is a stop token.
        special = tokenizer.special_tokens
        self._stop_texts = [text for text in sampling.stop if text not in special]
        self._stop_tokens = set(tokenizer.stop_tokens)
        self._stop_tokens |= {special[text] for text in sampling.stop if text in special}
        self._device = model.norm.scale.device
        self._recorded: Recorded | None = None
        self._may_record = computes_ahead(self._device) and is_served(model)
        self._cache: Any = None  # of `answer`, and the tokens that it holds
        self._cached: list[int] = []
        self._count = 0

    def answers(
        self,
        prompts: Iterable[Sequence[int]],
        on_text: Callable[[int, str], None] | None = None,
        *,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Answer]:
        """Answer prompts, and yield the answers in the order in which they end.

        What one is answered does not depend on the others, but for rounding.

        Args:
            prompts: Tokens of each; taken as there is room.
            on_text: Called with the number of a prompt and the next piece of its answer.
            numbers: Of the prompts, if not from 0 on: what is drawn for one goes by its number.

        Raises:
            DataError: A prompt has no token or unknown ones, or leaves no room for an answer.
        """
        waiting = zip(count() if numbers is None else numbers, prompts, strict=False)
        cache = self.model.cache(self.batch_size)
        rows: list[_Row] = []
        while True:
            while len(rows) < self.batch_size and (following := next(waiting, None)):
                rows.append(self._row(*following))
            if not rows:
                return
            self._extend(cache, rows, on_text)
            for slot in reversed(range(len(rows))):
                if not (row := rows[slot]).reason:
                    continue
                last = rows.pop()
                if row is not last:  # which takes its place
                    rows[slot] = last
                    cache.move(len(rows), slot)
                cache.keep(len(rows), 0)
                if (rest := row.text.end()) and on_text:
                    on_text(row.index, rest)
                yield row.answer()

    def answer(self, prompt: Sequence[int], on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer one prompt; what it begins with as the last one did is not read again.

        Args:
            prompt: Its tokens.
            on_text: Called with each piece of the answer.

        Raises:
            DataError: See :meth:`answers`.
        """
        row = self._row(self._count, prompt)
        show = None if on_text is None else lambda _, piece: on_text(piece)
        cache = self._cache = self._cache or self.model.cache(1)
        before, self._cached = self._cached, []  # until it is known again, whatever happens
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(before, prompt, strict=False))
        # The last token is always read: what follows it is asked for.
        same = min(sum(1 for _ in pairs), len(prompt) - 1)
        cache.keep(0, same if self.model.turns_alike(len(before), len(prompt)) else 0)
        self._count += 1
        try:
            while not row.reason:
                self._extend(cache, [row], show)
        finally:
            self._cached = row.tokens[: cache.lengths[0]]
        if (rest := row.text.end()) and on_text:
            on_text(rest)
        return row.answer()

    def _row(self, index: int, prompt: Sequence[int]) -> _Row:
        """Begin an answer, to a prompt that can have one."""
        positions, vocabulary = self.model.max_seq_len, self.model.tok_embeddings.num_embeddings
        if not len(prompt):
            raise DataError(f"prompt {index + 1} is empty. Give it some text, or leave it out.")
        if len(prompt) >= positions:
            raise DataError(
                f"prompt {index + 1} has {len(prompt)} tokens, but the model has {positions} "
                "positions for prompt and answer. Shorten it."
            )
        if unknown := [token for token in prompt if not 0 <= token < vocabulary]:
            raise DataError(
                f"prompt {index + 1} has the token {unknown[0]}, but the model knows {vocabulary}. "
                "Use the tokenizer of its own folder."
            )
        begun = begun_thought(answer_decoder(self.tokenizer)(list(prompt[-TOKENS_OF_A_MARK:])))
        text = GrowingText(self.tokenizer, self._stop_texts, begun)
        return _Row(index, prompt, self.sampling.seed, text)

    # A cache outlives a call, and is written in place: not as a tensor of inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def _extend(
        self, cache: Any, rows: list[_Row], on_text: Callable[[int, str], None] | None
    ) -> None:
        """Add a token to every row."""
        for slot, row in enumerate(rows):
            length = cache.lengths[slot]
            if length and not self.model.turns_alike(length, len(row.tokens)):
                cache.keep(slot, 0)
        new = [slot for slot in range(len(rows)) if not cache.lengths[slot]]
        old = [slot for slot in range(len(rows)) if cache.lengths[slot]]
        for slots in [*_groups(new, rows), *([old] if old else [])]:
            logits = self._logits(cache, rows, slots)
            group = [rows[slot] for slot in slots]
            for row, token in zip(group, self._chosen(group, logits), strict=True):
                self._append(row, token, on_text)

    def _logits(self, cache: Any, rows: list[_Row], slots: list[int]) -> Tensor:
        """Read what is not cached yet of some rows; return what may follow, ``[rows, V]``."""
        unread = [rows[slot].tokens[cache.lengths[slot] :] for slot in slots]
        tokens = [token for row in unread for token in row]
        with torch.autocast(self._device.type, enabled=False):  # the model's dtype is the cache's
            is_one_each = len(tokens) == len(slots) and slots == [*range(len(slots))]
            if is_one_each and (replayed := self._replayed(cache, tokens)) is not None:
                return replayed
            step = self.model.step(cache, slots, [len(row) for row in unread])
            logits: Tensor = self.model(sent(torch.tensor(tokens), self._device)[None], step=step)
        return logits

    def _replayed(self, cache: Any, tokens: list[int]) -> Tensor | None:
        """Return the same of a token for each of the first rows, if that can be recorded."""
        if not self._may_record:
            return None
        if self._recorded is None or self._recorded.cache is not cache:
            self._recorded = Recorded(self.model, cache)
        logits = self._recorded.logits(tokens)
        self._may_record = self._recorded.usable
        return logits

    def _chosen(self, rows: list[_Row], logits: Tensor) -> list[int]:
        highest, likeliest = logits.max(dim=-1)
        # Asked for in one go: each question waits for a GPU
        finite, *chosen = torch.cat([highest.isfinite().all()[None], likeliest]).tolist()
        if not finite:
            raise CheckpointError(
                "the model's scores are not finite: its weights or those of the adapter are "
                "damaged. Download or train them again."
            )
        if self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1:
            return list(chosen)
        return [
            choose(scores, torch.tensor(row.tokens), self.sampling, row.random)
            for row, scores in zip(rows, logits, strict=True)
        ]

    def _append(self, row: _Row, token: int, on_text: Callable[[int, str], None] | None) -> None:
        row.tokens.append(token)
        if token in self._stop_tokens:
            row.reason = "stop"
            return
        if (piece := row.text.push(token)) and on_text:
            on_text(row.index, piece)
        limit = self.sampling.max_time
        if row.text.stopped:
            row.reason = "stop"
        elif len(row.tokens) - row.prompt_tokens == self.sampling.max_new_tokens:
            row.reason = "length"
        elif len(row.tokens) >= self.model.max_seq_len:
            row.reason = "context"
        elif limit is not None and time.monotonic() - row.started >= limit:
            row.reason = "time"


def _groups(slots: list[int], rows: list[_Row]) -> Iterator[list[int]]:
    """Yield new rows by as many as are read at once."""
    group: list[int] = []
    size = 0
    for slot in slots:
        length = len(rows[slot].tokens)
        if group and size + length > READ_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(slot)
        size += length
    if group:
        yield group


# Answers to a few fixed questions while a model is trained.

NOT_FINITE = "(no answer: the model's scores are not finite)"
"""Stands where an answer would."""


def answers_in_training(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Answer each question greedily; every process of a sharded model must ask.

    Args:
        model: Evaluated, then trained on.
        tokenizer: Renders a conversation and knows where an answer stops.
        prompts: What the user says.
        max_new_tokens: Of an answer.
    """
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=max_new_tokens), batch_size=8)
    asked = []
    for prompt in prompts:
        messages = [Message(role="user", content=prompt)]
        asked.append(list(tokenizer({"messages": messages}, inference=True)["tokens"]))
    was_training = model.training
    model.eval()
    # Compiled layers would be compiled again for every length that a cache can have
    try:
        with torch.compiler.set_stance("force_eager"):
            answers = list(generator.answers(asked))
    except CheckpointError:  # not finite; when a run is given up for that, the run decides
        return [NOT_FINITE] * len(prompts)
    finally:
        model.train(was_training)
    return [answer.text for answer in sorted(answers, key=lambda answer: answer.index)]


sys.modules[__name__].__class__ = CallableModule
