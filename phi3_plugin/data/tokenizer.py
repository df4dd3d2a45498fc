"""Phi-3's tokenizer for torchtune, with the ids of Hugging Face."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from phi3_plugin.data.options import check_choice, check_length
from phi3_plugin.data.template import Piece, Turn, make_turn
from phi3_plugin.data.vocabulary import Vocabulary, read_vocabulary, without_added_tokens
from phi3_plugin.errors import ConfigError, DataError, TokenizerError

PADS = ("model", "unk")
SPECIAL_IN_TEXT = ("parse", "text")

SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""What a special token swallows after it: Unicode's White_Space, unlike Python's own notion."""


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

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_seq_len: int | None = None,
        *,
        pad: str = "model",
        special_in_text: str = "parse",
    ) -> None:
        """Wrap the files of a checkpoint; see :func:`phi3_tokenizer`."""
        check_choice("tokenizer.pad", pad, PADS)
        check_choice("tokenizer.special_in_text", special_in_text, SPECIAL_IN_TEXT)
        check_length("tokenizer.max_seq_len", max_seq_len)
        self.max_seq_len = max_seq_len
        self._backend = vocabulary.backend
        self._template = vocabulary.template
        self.stop_tokens = vocabulary.stop_tokens
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        self._ids: dict[str, int] = self._backend.get_vocab()
        self.vocab_size = len(self._ids)
        named = {name: self._ids[text] for name, text in vocabulary.names.items()}
        self.bos_id, self.unk_id = named.get("bos_token"), named.get("unk_token")
        self.eos_id = named["eos_token"]
        self.pad_id = _pad_id(pad, named)
        self._plain = without_added_tokens(self._backend) if special_in_text == "text" else None

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode plain text; special tokens written in it become their ids, whatever messages do.

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
        limit = None if add_generation_prompt else self.max_seq_len
        if self._plain is not None:
            return self._tokenize_apart(self._plain, pieces, limit)
        texts = ["".join(piece.text for piece in chat) for chat in pieces]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [_mark(*pair, limit) for pair in zip(encodings, pieces, strict=True)]

    def _tokenize_apart(
        self, plain: Tokenizer, chats: Sequence[Sequence[Piece]], limit: int | None
    ) -> list[Tokens]:
        # As in one text: a token before what is said swallows its leading whitespace, and the
        # newlines of the template belong to the token before them.
        said = [piece.text.lstrip(SPACE) for chat in chats for piece in chat if piece.said]
        encoded = iter(plain.encode_batch(said, add_special_tokens=False))
        tokenized = []
        for chat in chats:
            parts = [next(encoded).ids if p.said else self._written(p.text) for p in chat]
            trained = np.repeat([piece.trained for piece in chat], [len(part) for part in parts])
            ids = np.array([i for part in parts for i in part][:limit], dtype=np.int32)
            tokenized.append(Tokens(ids, trained[:limit]))
        return tokenized

    def _written(self, text: str) -> list[int]:
        token = text.rstrip("\n")
        return [self._ids[token]] if token else []

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


def phi3_tokenizer(
    path: str | Path | None,
    max_seq_len: int | None = None,
    *,
    pad: str = "model",
    special_in_text: str = "parse",
) -> Phi3Tokenizer:
    """Build the tokenizer of a checkpoint.

    Args:
        path: The checkpoint folder (not a file in it).
        max_seq_len: Cut longer conversations off at this many tokens; None cuts nothing.
        pad: ``pad_id`` is the pad token that the files name ("model"; their end-of-text token
            where they name none) or the unknown token ("unk", as in Microsoft's sample).
        special_in_text: What a special token is that somebody wrote into a message. "parse":
            that token, as for Hugging Face. "text": the characters it is written in, so that
            data cannot end a turn or speak for another role; the ids of such messages differ
            from Hugging Face's, those of all others are the same.

    Raises:
        ConfigError: The path is not given, or an option has a value that it cannot have.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or of a generation that is not supported.
    """
    vocabulary = read_vocabulary(path)
    return Phi3Tokenizer(vocabulary, max_seq_len, pad=pad, special_in_text=special_in_text)


def _pad_id(pad: str, named: Mapping[str, int]) -> int:
    if pad == "model":
        return named.get("pad_token", named["eos_token"])
    if "unk_token" not in named:
        raise ConfigError(
            "tokenizer.pad: 'unk' needs a token that tokenizer_config.json does not name. Use "
            "'model'."
        )
    return named["unk_token"]


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
