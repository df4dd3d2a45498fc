"""From rendered conversations to ids, and which of them are trained on."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from phi3_plugin.data.added import Disguise
from phi3_plugin.data.layout import Piece, Rendered
from phi3_plugin.data.marks import Marker, Marks
from phi3_plugin.data.spaces import Script, without_normalizer

SPECIAL_IN_TEXT = ("parse", "text")
"""What a special token is that somebody wrote into a message."""

# Shapes: N conversations, S tokens of one, T of all


class Tokens(NamedTuple):
    """One tokenized conversation."""

    ids: NDArray[np.int32]
    """[S]"""
    trained: NDArray[np.bool_]
    """[S]; True where the loss counts the prediction of this token."""

    def first(self, count: int | None) -> "Tokens":
        """Return the first tokens; None is all."""
        return Tokens(self.ids[:count], self.trained[:count])


class Batch(NamedTuple):
    """Tokenized conversations, one after the other."""

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]"""
    lengths: NDArray[np.int64]
    """[N]"""
    special: NDArray[np.bool_]
    """[N]; True where a message holds special tokens of its own."""

    def split(self) -> list[Tokens]:
        """Return the conversations one by one."""
        ends, lengths = np.cumsum(self.lengths).tolist(), self.lengths.tolist()
        places = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        return [Tokens(self.ids[place], self.trained[place]) for place in places]


class Encoder:
    """Encodes conversations, each as one text, on all cores."""

    def __init__(self, backend: Tokenizer, special_in_text: str) -> None:
        """Take one of :data:`SPECIAL_IN_TEXT`."""
        self._disguise = Disguise(backend) if special_in_text == "text" else None
        self._backend = backend if self._disguise is None else self._disguise.backend
        self._marker, self._bare = Marker(backend), without_normalizer(backend)
        added = list(backend.get_added_tokens_decoder())
        self._is_added = np.zeros(max(backend.get_vocab().values()) + 1, dtype=np.bool_)
        self._is_added[added] = True

    def encode(self, chats: Sequence[Rendered]) -> Batch:
        """Encode rendered conversations."""
        marks = [self._marker.marks(chat.layout) for chat in chats]
        ask = [self._disguise is not None or not mark.tell for mark in marks]
        quick = [n for n, asked in enumerate(ask) if not asked]
        batch = self._encode_quickly([chats[n] for n in quick], [marks[n] for n in quick])
        if len(quick) == len(chats) and not batch.special.any():
            return batch
        tokens = dict(zip(quick, batch.split(), strict=True))
        own = {quick[i] for i in np.flatnonzero(batch.special)}
        places = [n for n, asked in enumerate(ask) if asked or n in own]
        tokens.update(zip(places, self._encode_asking([chats[n] for n in places]), strict=True))
        special = [n in own or self._has_own(tokens[n], marks[n]) for n in range(len(chats))]
        return joined([tokens[n] for n in range(len(chats))], special)

    def _encode_quickly(self, chats: Sequence[Rendered], marks: Sequence[Marks]) -> Batch:
        """Encode, and mark by added tokens; wrong where a message holds some of its own."""
        lists = self._ids(chats, [mark.script for mark in marks])
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        if not chats:
            return Batch(ids, ids > 0, lengths, lengths > 0)
        added, sizes = self._is_added[ids], np.array([len(mark.token) for mark in marks])
        counts, ends = np.concatenate([[0], np.cumsum(added)]), np.cumsum(lengths)
        begun = counts[ends - lengths]
        own = counts[ends] - begun + 1 != sizes
        at = np.repeat(np.cumsum(sizes) - sizes - begun, lengths) + counts[1:]
        at = np.minimum(at, sizes.sum() - 1)
        token, after = (np.concatenate([mark[i] for mark in marks])[at] for i in (0, 1))
        trained = np.where(added, token, after)
        trained[(ends - lengths)[lengths > 0]] = False  # nothing comes before it
        return Batch(ids, trained, lengths, own)

    def _ids(self, chats: Sequence[Rendered], scripts: Sequence[Script | None]) -> list[list[int]]:
        backend, known = self._backend, [script for script in scripts if script is not None]
        if self._bare is not None and len(known) == len(chats):
            backend = self._bare
            texts = [script.write(chat.turns) for script, chat in zip(known, chats, strict=True)]
        else:
            texts = [chat.text for chat in chats]
        # Without the places of the tokens, and so quicker than encode_batch
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _encode_asking(self, chats: Sequence[Rendered]) -> list[Tokens]:
        """Encode, and mark by where each token starts in the text."""
        pieces = [chat.pieces for chat in chats]
        hide = self._disguise
        if hide is not None:
            pieces = [[_hidden(piece, hide) for piece in chat] for chat in pieces]
        texts = ["".join(piece.text for piece in chat) for chat in pieces]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        tokens = [_mark(*pair) for pair in zip(encodings, pieces, strict=True)]
        if hide is None:
            return tokens
        return [chat._replace(ids=hide.true_ids(chat.ids)) for chat in tokens]

    def _has_own(self, chat: Tokens, marks: Marks) -> bool:
        return int(self._is_added[chat.ids].sum()) + 1 != len(marks.token)


def joined(chats: Sequence[Tokens], special: Sequence[bool] | NDArray[np.bool_]) -> Batch:
    """Put tokenized conversations one after the other."""
    lengths = np.array([len(chat.ids) for chat in chats], dtype=np.int64)
    ids = np.concatenate([np.zeros(0, np.int32), *(chat.ids for chat in chats)])
    trained = np.concatenate([np.zeros(0, np.bool_), *(chat.trained for chat in chats)])
    return Batch(ids, trained, lengths, np.array(special, dtype=np.bool_))


def _hidden(piece: Piece, disguise: Disguise) -> Piece:
    return piece if piece.said else Piece(disguise.hide(piece.text), piece.trained)


def _mark(encoding: Encoding, pieces: Sequence[Piece]) -> Tokens:
    # A token belongs to the piece it starts in: one that begins with the header's newline is
    # given, and one that ends what is said may swallow the newline after it.
    starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    trained = np.array([piece.trained for piece in pieces], dtype=np.bool_)
    ids = np.array(encoding.ids, dtype=np.int32)
    marked = trained[np.searchsorted(ends, starts, side="right")]
    marked[:1] = False  # nothing comes before it, from which it could be predicted
    return Tokens(ids, marked)
