"""What becomes of conversations that are longer than ``max_seq_len``.

right   the end is cut off
left    the oldest exchanges go, whole, and the system prompt stays. Where the last exchange alone
        is still too long, its question loses its start; where the answer is, its end is cut off
drop    the conversation goes
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from phi3_plugin.data.encoder import Batch, Tokens
from phi3_plugin.data.layout import Rendered
from phi3_plugin.data.turns import Turn

TRUNCATE = ("right", "left", "drop")

Encode = Callable[[Sequence[Rendered]], Batch]
Render = Callable[[Sequence[Turn]], Rendered]


def cut(batch: Batch, limit: int) -> Batch:
    """Keep the first ``limit`` tokens of each conversation."""
    if not len(batch.lengths) or batch.lengths.max() <= limit:
        return batch
    starts = np.cumsum(batch.lengths) - batch.lengths
    kept = np.arange(len(batch.ids)) - np.repeat(starts, batch.lengths) < limit
    lengths = np.minimum(batch.lengths, limit)
    return Batch(batch.ids[kept], batch.trained[kept], lengths, batch.special)


def keep_end(chat: Rendered, limit: int, render: Render, encode: Encode) -> Tokens:
    """Shorten one conversation from its start.

    Args:
        chat: What is too long.
        limit: Tokens that may be left.
        render: Writes turns as the template does; they carry what is trained on.
        encode: Encodes rendered conversations.

    Raises:
        DataError: The template fails on what is left.
    """

    def tokens_of(turns: Sequence[Turn]) -> Tokens:
        return encode([render(turns)]).split()[0]

    if not chat.turns:
        return _tail(encode([chat]).split()[0], limit)
    shorter = _without_oldest(chat.turns) or [list(chat.turns)]
    if (found := _first_fit(shorter, tokens_of, limit)) is not None:
        return found
    last = shorter[-1]
    if (found := _first_fit(_WithoutStart(last), tokens_of, limit)) is not None:
        return found
    return tokens_of(last).first(limit)


def _first_fit(
    candidates: Sequence[Sequence[Turn]], tokens_of: Callable[[Sequence[Turn]], Tokens], limit: int
) -> Tokens | None:
    """Return the first that is short enough, of conversations that get shorter."""
    known = dict[int, Tokens]()

    def fits(index: int) -> bool:
        known[index] = tokens_of(candidates[index])
        return len(known[index].ids) <= limit

    at = bisect_left(range(len(candidates)), True, key=fits)
    return known[at] if at in known and len(known[at].ids) <= limit else None


def _without_oldest(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Return the conversation without its oldest exchanges: one less each time, the last alone."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > len(system)]
    return [[*system, *turns[start:]] for start in starts]


class _WithoutStart(Sequence[Sequence[Turn]]):
    """A conversation whose question lacks its first character, its first two, … and all of it."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = turns
        users = [i for i, turn in enumerate(turns) if turn.role == "user" and not turn.trained]
        self._user = users[0] if users else None

    def __len__(self) -> int:
        return 0 if self._user is None else len(self._turns[self._user].content)

    @overload
    def __getitem__(self, index: int) -> Sequence[Turn]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[Turn]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[Any]:
        assert isinstance(index, int) and self._user is not None
        turns = list(self._turns)
        content = turns[self._user].content[index + 1 :]
        turns[self._user] = turns[self._user]._replace(content=content)
        return turns


def _tail(tokens: Tokens, limit: int) -> Tokens:
    """Keep the end of a text, but do not train the rest of an answer whose start is cut off."""
    ids, trained = tokens.ids[-limit:], tokens.trained[-limit:].copy()
    if not tokens.trained[1:].all():
        trained[: int(np.argmin(trained)) if not trained.all() else len(trained)] = False
    trained[:1] = False  # Nothing comes before it, from which it could be predicted
    return Tokens(ids, trained)
