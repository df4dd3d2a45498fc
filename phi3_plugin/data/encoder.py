"""From the pieces of rendered conversations to ids, and which of them are trained on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from phi3_plugin.data.added import Disguise
from phi3_plugin.data.layout import Piece

SPECIAL_IN_TEXT = ("parse", "text")
"""What a special token is that somebody wrote into a message."""


class Tokens(NamedTuple):
    """One tokenized conversation of S tokens."""

    ids: NDArray[np.int32]
    """[S]"""
    trained: NDArray[np.bool_]
    """[S]; True where the loss counts the prediction of this token."""


class Encoder:
    """Encodes conversations, each as one text, on all cores."""

    def __init__(self, backend: Tokenizer, special_in_text: str) -> None:
        """Take one of :data:`SPECIAL_IN_TEXT`."""
        self._disguise = Disguise(backend) if special_in_text == "text" else None
        self._backend = backend if self._disguise is None else self._disguise.backend

    def encode(self, chats: Sequence[Sequence[Piece]], limit: int | None) -> list[Tokens]:
        """Encode rendered conversations, and cut each to ``limit`` tokens."""
        if self._disguise is not None:
            chats = [[_hidden(piece, self._disguise) for piece in chat] for chat in chats]
        texts = ["".join(piece.text for piece in chat) for chat in chats]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        tokens = [_mark(*pair, limit) for pair in zip(encodings, chats, strict=True)]
        if self._disguise is None:
            return tokens
        return [chat._replace(ids=self._disguise.true_ids(chat.ids)) for chat in tokens]


def _hidden(piece: Piece, disguise: Disguise) -> Piece:
    return piece if piece.said else Piece(disguise.hide(piece.text), piece.trained)


def _mark(encoding: Encoding, pieces: Sequence[Piece], limit: int | None) -> Tokens:
    # A token belongs to the piece it starts in: one that begins with the header's newline is
    # given, and one that ends what is said may swallow the newline after it.
    starts = np.array([start for start, _ in encoding.offsets[:limit]], dtype=np.int64)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    trained = np.array([piece.trained for piece in pieces], dtype=np.bool_)
    ids = np.array(encoding.ids[:limit], dtype=np.int32)
    marked = trained[np.searchsorted(ends, starts, side="right")]
    marked[:1] = False  # nothing comes before it, from which it could be predicted
    return Tokens(ids, marked)
