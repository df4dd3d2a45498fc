"""What becomes of conversations that are longer than ``max_seq_len``.

right   the end is cut off
left    the oldest exchanges go, whole; the system prompt stays. Where the last one alone is
still too long, tokens after the system prompt go
drop    the conversation goes
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from phi3_plugin.data.encoder import Batch, Tokens
from phi3_plugin.data.layout import Layout, Piece, Rendered, Slot
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
    """
    last = chat
    for turns in _shorter(chat.turns):
        last = render(turns)
        tokens = encode([last]).split()[0]
        if len(tokens.ids) <= limit:
            return tokens
    tokens = encode([last]).split()[0]
    kept = min(_system_tokens(last.layout, last.turns, tokens, encode), limit)
    ids, trained = (
        np.concatenate([values[:kept], values[len(values) - (limit - kept) :]]) for values in tokens
    )
    trained[:1] = False  # Nothing comes before it, from which it could be predicted
    return Tokens(ids, trained)


def _shorter(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Yield the conversation without its oldest exchanges: one less each time, the last alone."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for start in starts[1:]:
        yield [*system, *turns[start:]]


def _system_tokens(layout: Layout, turns: Sequence[Turn], tokens: Tokens, encode: Encode) -> int:
    """Return how many tokens the system prompt takes, with what the template puts around it."""
    if not turns or turns[0].role != "system":
        return 0
    said = [i for i, part in enumerate(layout.parts) if isinstance(part, Slot) and part.turn > 0]
    if not said:
        return 0
    # What is equal when something else follows is not of what follows
    head = Layout((*layout.parts[: said[0]], Piece("x", False)))
    other = encode([Rendered(head, turns)]).split()[0].ids[:-1]
    size = min(len(other), len(tokens.ids))
    differ = np.flatnonzero(other[:size] != tokens.ids[:size])
    return int(differ[0]) if len(differ) else size
