"""The text of an answer while it grows: whole characters, and where a stop text ends it."""

from collections.abc import Sequence
from typing import Protocol

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
