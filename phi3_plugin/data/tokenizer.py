"""Phi-3's tokenizer for torchtune, with the ids of Hugging Face."""

from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from phi3_plugin.data.template import Piece, Turn, make_turn
from phi3_plugin.data.vocabulary import Vocabulary, read_vocabulary
from phi3_plugin.errors import ConfigError, DataError, TokenizerError


class Message(Protocol):
    """The part of torchtune's ``Message`` that is read here."""

    role: str
    content: list[dict[str, Any]]
    masked: bool


class Tokens(NamedTuple):
    """One tokenized conversation of S tokens."""

    ids: NDArray[np.int32]
    """[S]"""
    trained: NDArray[np.bool_]
    """[S]; True where the loss counts the prediction of this token."""


class Phi3Tokenizer:
    """Satisfies torchtune's ``ModelTokenizer`` and ``Transform`` protocols.

    A conversation is rendered by the checkpoint's own chat template and encoded as one text.
    Encoding message by message would give other ids: a special token swallows the newline
    after it, and the text that follows gets a prefix space.
    """

    def __init__(self, vocabulary: Vocabulary, max_seq_len: int | None = None) -> None:
        """Wrap the files of a checkpoint; see :func:`phi3_tokenizer`."""
        if max_seq_len is not None and (type(max_seq_len) is not int or max_seq_len < 1):
            raise ConfigError(
                f"tokenizer.max_seq_len: {max_seq_len!r} must be a whole number above 0, "
                "or null for no limit."
            )
        self.max_seq_len = max_seq_len
        self._backend = vocabulary.backend
        self._template = vocabulary.template
        self.stop_tokens = vocabulary.stop_tokens
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        ids = self._backend.get_vocab()
        self.vocab_size = len(ids)
        named = {name: ids[text] for name, text in vocabulary.names.items()}
        self.bos_id, self.unk_id = named.get("bos_token"), named.get("unk_token")
        self.eos_id = named["eos_token"]
        self.pad_id = named.get("pad_token", self.eos_id)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode plain text; special tokens written in it become their ids.

        Raises:
            TokenizerError: A beginning-of-text token is asked for and the files name none.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos: tokenizer_config.json names no bos_token.")
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn ids back into text."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def tokenize_chats(
        self, chats: Iterable[Sequence[Turn]], *, add_generation_prompt: bool = False
    ) -> list[Tokens]:
        """Tokenize many conversations at once, which uses all cores.

        Args:
            chats: The conversations.
            add_generation_prompt: End each with an open assistant header, to generate from.
                Such prompts are not cut to ``max_seq_len``: that would cut the header off.

        Raises:
            DataError: A conversation is empty.
            TokenizerError: The chat template cannot be followed.
        """
        pieces = [
            self._template.pieces(chat, add_generation_prompt=add_generation_prompt)
            for chat in chats
        ]
        texts = ["".join(piece.text for piece in chat) for chat in pieces]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        limit = None if add_generation_prompt else self.max_seq_len
        return [_mark(*pair, limit) for pair in zip(encodings, pieces, strict=True)]

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokenize one conversation as torchtune asks for it.

        Args:
            messages: torchtune messages, text only. What ``masked`` ones say is not trained on.
            add_generation_prompt: End with an open assistant header, to generate from.

        Returns:
            The ids, and a mask that is True where a token is *not* trained on.
        """
        turns = [make_turn(m.role, _text(m), not m.masked) for m in messages]
        chats = self.tokenize_chats([turns], add_generation_prompt=add_generation_prompt)
        return chats[0].ids.tolist(), (~chats[0].trained).tolist()

    def __call__(
        self, sample: MutableMapping[str, Any], inference: bool = False
    ) -> MutableMapping[str, Any]:
        """Replace a sample's ``messages`` by ``tokens`` and ``mask``.

        Args:
            sample: Holds ``messages``, see :meth:`tokenize_messages`.
            inference: Leave the last turn open for the model. torchtune marks that turn with
                an empty assistant message, which is dropped.
        """
        messages = sample.pop("messages")
        if inference and messages and messages[-1].role == "assistant" and not _text(messages[-1]):
            messages = messages[:-1]
        tokens, mask = self.tokenize_messages(messages, add_generation_prompt=inference)
        sample.update(tokens=tokens, mask=mask)
        return sample


def phi3_tokenizer(path: str | Path | None, max_seq_len: int | None = None) -> Phi3Tokenizer:
    """Build the tokenizer of a checkpoint.

    Args:
        path: The checkpoint folder (not a file in it).
        max_seq_len: Cut longer conversations off at this many tokens; None cuts nothing.

    Raises:
        ConfigError: The path is not given, or the length is not a positive number.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or of a generation that is not supported.
    """
    return Phi3Tokenizer(read_vocabulary(path), max_seq_len)


def _mark(encoding: Encoding, pieces: Sequence[Piece], limit: int | None) -> Tokens:
    # A token belongs to the piece it starts in. Only whitespace reaches into the next piece,
    # swallowed by the special token before it.
    starts = np.array([start for start, _ in encoding.offsets[:limit]], dtype=np.int64)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    trained = np.array([piece.trained for piece in pieces])
    ids = np.array(encoding.ids[:limit], dtype=np.int32)
    return Tokens(ids, trained[np.searchsorted(ends, starts, side="right")])


def _text(message: Message) -> str:
    others = {part["type"] for part in message.content} - {"text"}
    if others:
        raise DataError(f"a message holds {', '.join(sorted(others))}, expected text only")
    return "".join(part["content"] for part in message.content)
