"""From text to ids, and which of them are trained on: a tokenizer with the ids of Hugging Face."""

import json
import logging
import secrets
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torchtune.utils import log_rank_zero

from phi3_plugin.data.added_tokens import ManyTokens
from phi3_plugin.data.template import Piece, Rendered, token_pattern
from phi3_plugin.data.thoughts import (
    END_OF_THOUGHT,
    SHOW_REASONING,
    THINK,
    THOUGHT_IN_TEXT,
)
from phi3_plugin.data.turns import Turn, make_turn
from phi3_plugin.data.vocabulary import Vocabulary, naming, read_vocabulary
from phi3_plugin.errors import ConfigError, DataError, TokenizerError
from phi3_plugin.options import Count, OnResume, made, option_problems, takes

logger = logging.getLogger(__name__)

# Shapes: N conversations, S tokens of one, T of all


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """The options of :func:`phi3_tokenizer`."""

    max_seq_len: Count | None = None
    """Cut longer conversations off at this many tokens; None cuts nothing."""
    pad: Literal["model", "unk"] = "model"
    """``pad_id`` is the pad token that the files name ("model"; their end-of-text token where they
    name none) or the unknown token ("unk", as in Microsoft's sample)."""
    special_in_text: Literal["parse", "text"] = "parse"
    """What a special token is that somebody wrote into a message. "parse": that token, as for
    Hugging Face. "text": the characters it is written in, so that data cannot end a turn or speak
    for another role; the ids of such messages differ from Hugging Face's, those of all others are
    the same."""
    dropped: Literal["error", "warn"] = "error"
    """What a message is that the template leaves out, as many do with the system message. "error",
    or "warn": go on without, and log how many there were. An empty message that is left out is
    neither."""
    add_tokens: Annotated[ManyTokens | None, OnResume.REFUSED] = None
    """Texts that become one token each, as by transformers' ``tokenizer.add_tokens``; our recipe
    trains their rows of embedding and head. For a Phi-3 such a text is a token after a space or
    at the start of a message alone: ``{content: '<call>', normalized: False}`` is one anywhere."""


@takes(TokenizerOptions)
def phi3_tokenizer(
    path: str | Path | None, max_seq_len: int | None = None, **options: Any
) -> "Phi3Tokenizer":
    """Build the tokenizer of a checkpoint.

    Args:
        path: The checkpoint folder (not a file in it).
        max_seq_len: As in `TokenizerOptions`.
        **options: The others there.

    Raises:
        ConfigError: The path is not given, or an option has a value that it cannot have.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or the chat template cannot be followed.
    """
    options["max_seq_len"] = max_seq_len
    problems = option_problems(TokenizerOptions, options, "phi3_tokenizer", section="tokenizer.")
    if problems:
        raise ConfigError("\n".join(problems))
    chosen = made(TokenizerOptions, options)
    return Phi3Tokenizer(read_vocabulary(path, chosen.add_tokens or ()), chosen)


class Tokens(NamedTuple):
    """One tokenized conversation."""

    ids: NDArray[np.int32]
    """[S]"""
    trained: NDArray[np.bool_]
    """[S]; True where the loss counts the prediction of this token."""
    weights: NDArray[np.float32] | None = None
    """[S]; how much it counts it; None is 1 throughout."""

    def first(self, count: int | None) -> "Tokens":
        """Return the first tokens; None is all."""
        return self.part(slice(count))

    def part(self, where: slice) -> "Tokens":
        """Return a stretch of the tokens."""
        weights = None if self.weights is None else self.weights[where]
        return Tokens(self.ids[where], self.trained[where], weights)


@dataclass(frozen=True, eq=False)
class TokenizedChats:
    """Tokenized conversations, one after the other.

    The first token of a conversation is never trained on, whatever was asked for: nothing comes
    before it, from which it could be predicted.
    """

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]; written to, so that it is false at each start."""
    lengths: NDArray[np.int64]
    """[N]"""
    weights: NDArray[np.float32] | None = None
    """[T]; how much the loss counts each token that is trained on; None is 1 throughout."""

    def __post_init__(self) -> None:
        """Leave the first tokens out of what is trained on."""
        starts = np.cumsum(self.lengths) - self.lengths
        self.trained[starts[self.lengths > 0]] = False

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Tokens of each conversation that are trained on, [N]."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        ends = np.cumsum(self.lengths)
        labelled: NDArray[np.int64] = before[ends] - before[ends - self.lengths]
        return labelled

    def select(self, kept: NDArray[np.bool_]) -> "TokenizedChats":
        """Return some of the conversations; ``kept`` is [N]."""
        tokens = np.repeat(kept, self.lengths)
        weights = None if self.weights is None else self.weights[tokens]
        return TokenizedChats(self.ids[tokens], self.trained[tokens], self.lengths[kept], weights)

    def split(self) -> list[Tokens]:
        """Return the conversations one by one."""
        ends = np.cumsum(self.lengths)
        whole = Tokens(self.ids, self.trained, self.weights)
        return [whole.part(slice(*span)) for span in zip(ends - self.lengths, ends, strict=True)]

    @classmethod
    def join(cls, chats: Sequence[Tokens]) -> "TokenizedChats":
        """Put tokenized conversations one after the other."""
        ids = np.concatenate([np.zeros(0, np.int32), *(chat.ids for chat in chats)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(chat.trained for chat in chats)])
        lengths = np.array([len(chat.ids) for chat in chats], dtype=np.int64)
        if all(chat.weights is None for chat in chats):
            return cls(ids, trained, lengths)
        ones = (np.ones(len(chat.ids), np.float32) for chat in chats)
        weights = [
            one if chat.weights is None else chat.weights
            for chat, one in zip(chats, ones, strict=True)
        ]
        return cls(ids, trained, lengths, np.concatenate(weights))


class Message(Protocol):
    """The part of torchtune's ``Message`` that is read here."""

    role: str
    content: list[dict[str, Any]]
    masked: bool


class Phi3Tokenizer:
    """Satisfies torchtune's ``ModelTokenizer`` and ``Transform`` protocols.

    A conversation is rendered by the checkpoint's own chat template and encoded as one text.
    Encoding message by message would give other ids: a special token may swallow the newline
    after it, and text may get a prefix space or merge with what the template writes.
    """

    def __init__(self, vocabulary: Vocabulary, options: TokenizerOptions) -> None:
        """Wrap the files of a checkpoint; see :func:`phi3_tokenizer`."""
        self.max_seq_len = options.max_seq_len
        self.backend = vocabulary.backend
        self._file = vocabulary.file
        self.template = vocabulary.template
        self.stop_tokens = vocabulary.stop_tokens
        self.special_in_text = options.special_in_text
        self._may_drop = options.dropped == "warn"
        self.new_tokens = vocabulary.new_tokens
        """By id; those that are in no file of the checkpoint."""
        added = self.backend.get_added_tokens_decoder()
        marks = (THINK, END_OF_THOUGHT)  # tokens that messages hold, where they are tokens at all
        self._thought_tokens = {i for i, token in added.items() if token.content in marks}
        self._disguise = self.disguise if options.special_in_text == "text" else None
        self.text_start = vocabulary.text_start
        """What comes in front of a text that is no chat."""
        ids: dict[str, int] = self.backend.get_vocab()
        self.vocab_size = len(ids)
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        named = {name: ids[text] for name, text in self.template.special_tokens.items()}
        self.bos_id = named.get("bos_token")
        self.unk_id = named.get("unk_token")
        self.eos_id = named["eos_token"]
        self.eos_token = self.template.special_tokens["eos_token"]
        self.text_end = ids.get("<|endoftext|>", self.eos_id)
        """What ends such a text; the end token of a Phi-4 is that of a turn."""
        self.pad_id = named.get("pad_token", self.eos_id)
        if options.pad == "unk":
            if self.unk_id is None:
                raise ConfigError(
                    "tokenizer.pad: 'unk' needs a token that tokenizer_config.json does not name. "
                    "Use 'model'."
                )
            self.pad_id = self.unk_id

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode plain text; special tokens written in it become their ids, whatever messages do.

        Raises:
            TokenizerError: A beginning-of-text token is asked for and the files name none.
        """
        with naming(self._file):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos: tokenizer_config.json names no bos_token.")
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn ids back into text."""
        with naming(self._file):
            return str(self.backend.decode([*token_ids], skip_special_tokens=skip_special_tokens))

    @property
    def thoughts(self) -> str | None:
        """How a thought is written in front of what is said, with {} for it.

        None where the template writes it by itself, and where nothing shows that the checkpoint
        thinks.
        """
        thinks = self._thought_tokens or any(w in self.template.source for w in SHOW_REASONING)
        return THOUGHT_IN_TEXT if thinks and self.template.reads.thought is None else None

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """Turn what a model wrote into text; of special tokens the marks of a thought show."""
        if not self._thought_tokens:
            return self.decode(token_ids)
        hidden = {*self.special_tokens.values()} - self._thought_tokens
        return self.decode([i for i in token_ids if i not in hidden], skip_special_tokens=False)

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write a conversation as the chat template does.

        Raises:
            DataError: The template fails on it, changes what it says or, unless ``dropped``
                is "warn", leaves a message out.
            TokenizerError: The chat template cannot be followed.
        """
        if self._disguise is not None:
            beside = "".join([turn.fields + turn.variables for turn in turns])
            if token := self.template.control_tokens.search(beside):
                raise DataError(
                    f"a field beside the content holds {token[0]!r}, which could end a turn; "
                    "remove it, or set tokenizer.special_in_text to parse"
                )
        rendered = self.template.render(turns, add_generation_prompt=add_generation_prompt)
        if rendered.dropped and not self._may_drop:
            raise DataError(
                f"the chat template leaves out {', '.join(dict.fromkeys(rendered.dropped))}; to "
                "go on without, set tokenizer.dropped to warn"
            )
        return rendered

    def encode_chats(self, chats: Sequence[Rendered]) -> TokenizedChats:
        """Encode rendered conversations, each whole and as one text, on all cores.

        A token is trained on if any of its text is: one that ends what is said may swallow the
        newline after it, and after a header that ends in a space the first word of the answer
        begins with that space::

            pieces         USER:  Hi  ASSISTANT:␣  Yo  <|end|>
            trained on                             ^^  ^^^^^^^  characters 19 to 28
            tokens         USER:  Hi  ASSISTANT:  ␣Yo  <|end|>  tokens 3 and 4

        An added token is the exception: the white space of an answer that the header's
        ``<|assistant|>`` takes to itself does not make it a part of the answer. One that the user
        has added is a word like others, and so is ``<think>``.
        """
        pieces = [chat.pieces for chat in chats]
        backend = self.backend
        if self._disguise is not None:
            backend = self._disguise.backend
            pieces = [list(map(self._disguise.hide, chat)) for chat in pieces]
        texts = ["".join([piece.text for piece in chat]) for chat in pieces]
        with naming(self._file):
            encodings = backend.encode_batch(texts, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, total)
        if self._disguise is not None:
            ids = self._disguise.true_ids(ids)
        trained = np.zeros(total, np.bool_)
        weights = None
        if any(piece.weight != 1 for chat in pieces for piece in chat):
            weights = np.ones(total, np.float32)
        words = self.new_tokens.keys() | self._thought_tokens
        added = backend.get_added_tokens_decoder().keys() - words
        starts = (np.cumsum(lengths) - lengths).tolist()
        for at, chat, encoding in zip(starts, pieces, encodings, strict=True):
            for start, end, weight in _trained_spans(chat):
                first, last = _tokens_of(encoding, start, end)
                if first < last and _chars(encoding, first)[0] < start:
                    first += encoding.ids[first] in added
                trained[at + first : at + last] = True
                if weights is not None:
                    weights[at + first : at + last] = weight
        return TokenizedChats(ids, trained, lengths, weights)

    def encode_documents(self, texts: Sequence[str], *, special: bool) -> TokenizedChats:
        """Encode raw texts as transformers' tokenizer does, the end-of-text token after each.

        Args:
            texts: Documents.
            special: Whether special tokens that are written in a text are those tokens, as for
                transformers by itself; or else the characters they are written in.
        """
        backend = self.backend if special else self.disguise.backend
        with naming(self._file):
            encodings = backend.encode_batch(texts, add_special_tokens=False)
        documents = list[Tokens]()
        for encoding in encodings:
            inner = np.array(encoding.ids, np.int32)
            inner = inner if special else self.disguise.true_ids(inner)
            end = [] if len(inner) and inner[-1] == self.text_end else [self.text_end]
            ids = np.array([*self.text_start, *inner, *end], np.int32)
            documents.append(Tokens(ids, np.ones(len(ids), np.bool_)))
        return TokenizedChats.join(documents)

    @cached_property
    def disguise(self) -> "Disguise":
        """The tokenizer that takes special tokens in a text for text."""
        return Disguise(self.backend, self.new_tokens.keys() | self._thought_tokens)

    def tokenize_chats(
        self, chats: Iterable[Sequence[Turn]], *, add_generation_prompt: bool = False
    ) -> list[Tokens]:
        """Tokenize many conversations at once, which uses all cores.

        Args:
            chats: The conversations.
            add_generation_prompt: End each with an open assistant header, to generate from.
                Such prompts are not cut to ``max_seq_len``: that would cut the header off.

        Raises:
            DataError: A conversation is empty, or cannot be rendered.
            TokenizerError: The chat template cannot be followed.
        """
        rendered = [
            self.render(chat, add_generation_prompt=add_generation_prompt) for chat in chats
        ]
        warn_of_dropped(Counter(name for chat in rendered for name in chat.dropped))
        limit = None if add_generation_prompt else self.max_seq_len
        return [chat.first(limit) for chat in self.encode_chats(rendered).split()]

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
        turns = [make_turn(m.role, _message_text(m), not m.masked) for m in messages]
        (chat,) = self.tokenize_chats([turns], add_generation_prompt=add_generation_prompt)
        return chat.ids.tolist(), (~chat.trained).tolist()

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
        last = messages[-1] if inference and messages else None
        if last is not None and last.role == "assistant" and not _message_text(last):
            messages = messages[:-1]
        tokens, mask = self.tokenize_messages(messages, add_generation_prompt=inference)
        sample.update(tokens=tokens, mask=mask)
        return sample

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a conversation becomes."""
        parts: list[Any] = [self.backend.to_str(), *self.template.identity]
        parts += [self._may_drop, self.special_in_text]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _trained_spans(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, float]]:
    """Yield [start, end) of the characters that are trained on, and how much they count."""
    at = 0
    for (trained, weight), run in groupby(pieces, key=attrgetter("trained", "weight")):
        end = at + sum(len(piece.text) for piece in run)
        if trained and at < end:
            yield at, end, weight
        at = end


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """Return [start, end) of the characters of a token."""
    span = encoding.token_to_chars(token)
    assert span is not None  # All tokens are of this text
    return span


def _tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """Return [first, last) of the tokens that hold any of the characters from start to end.

    By bisection: to ask for the place of every token takes longer than much of the encoding.
    """
    tokens = range(len(encoding))
    first = bisect_right(tokens, start, key=lambda token: _chars(encoding, token)[1])
    last = bisect_left(tokens, end, first, key=lambda token: _chars(encoding, token)[0])
    return first, last


def warn_of_dropped(counts: Mapping[str, int]) -> None:
    """Log one line about what the template left out, if it did."""
    if counts:
        listed = ", ".join(f"{name} ({count} times)" for name, count in counts.items())
        log_rank_zero(logger, f"the chat template leaves out {listed}", logging.WARNING)


def _message_text(message: Message) -> str:
    others = {part["type"] for part in message.content} - {"text"}
    if others:
        raise DataError(f"a message holds {', '.join(sorted(others))}, expected text only")
    return "".join(part["content"] for part in message.content)


class Disguise:
    """A tokenizer that knows its added tokens by secret names.

    The template's ``<|end|>`` is replaced by the secret name; one that somebody wrote into a
    message keeps the characters it is written in. All else is encoded as before: the flags of
    the tokens, and what they do to the text beside them, are the same. Tokens that the user has
    added are meant to be written into messages, and keep their names.
    """

    def __init__(self, backend: Tokenizer, open_tokens: Collection[int] = ()) -> None:
        """Copy the tokenizer; the ids are those of tokens that are not disguised."""
        secret = secrets.token_hex(8)  # nobody's text holds it
        added = backend.get_added_tokens_decoder()
        self._names = {
            token.content: f"{secret}-{i}-" for i, token in added.items() if i not in open_tokens
        }
        self._tokens = token_pattern(self._names)
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        self.backend = Tokenizer.from_str(json.dumps(content))
        # Those that were in the model's own vocabulary are new to it and move the others
        ids = self.backend.get_vocab()
        self._true_ids = np.arange(max(ids.values()) + 1, dtype=np.int32)
        for i, token in added.items():
            self._true_ids[ids[self._names.get(token.content, token.content)]] = i

    def hide(self, piece: Piece) -> Piece:
        """Replace the added tokens in what the template writes."""
        if piece.said:
            return piece
        return piece._replace(
            text=self._tokens.sub(lambda token: self._names[token[0]], piece.text)
        )

    def true_ids(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the ids in the original tokenizer, [S] to [S]."""
        return self._true_ids[ids]
