"""What becomes of conversations that are longer than ``max_seq_len``.

right   the end is cut off
left    the oldest exchanges go, whole, and the system prompt stays. Where the last exchange alone
        is still too long, its question loses its start; where the answer is, its end is cut off
drop    the conversation goes
"""

import json
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from torchtune.utils import log_rank_zero

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.data.formats import (
    Chat,
    Turn,
    Written,
    check_choice,
    check_length,
    check_switch,
    make_turn,
)
from phi3_plugin.data.template import (
    NOW,
    ChatTemplate,
    Disguise,
    Marker,
    Marks,
    Piece,
    Rendered,
    Script,
    without_normalizer,
)
from phi3_plugin.errors import ConfigError, DataError, MissingFileError, TokenizerError

# From rendered conversations to ids, and which of them are trained on.

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


# Read the tokenizer files of a checkpoint folder, and refuse those we cannot follow exactly.

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Special tokens that tokenizer_config.json gives a name."""

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Vocabulary:
    """What the files of one checkpoint say about text and tokens."""

    backend: Tokenizer
    template: ChatTemplate
    names: Mapping[str, str]
    """``bos_token``, ``eos_token``, … to the token's text."""
    stop_tokens: list[int]


def read_vocabulary(checkpoint_dir: str | Path | None) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json, the chat template and the stop ids.

    Args:
        checkpoint_dir: Folder in Hugging Face layout. generation_config.json is optional.

    Raises:
        ConfigError: The folder is not given.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or of a generation that is not supported.
    """
    folder = checkpoint_folder(checkpoint_dir)
    backend = _read_backend(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    _check_size(backend, folder)
    _check_agreement(backend, settings, folder)
    names = {name: text for name in NAMES if (text := _token_text(settings.get(name))) is not None}
    _check_names(names, backend, folder)
    # A named token is an added one for Hugging Face, whatever tokenizer.json says
    backend.add_special_tokens(sorted(set(names.values()) - _added(backend).keys()))
    template = ChatTemplate(*_read_template(folder, settings), names, frozenset(_added(backend)))
    template.check()
    stops = _read_stop_tokens(backend, (names["eos_token"], template.turn_end), folder)
    return Vocabulary(backend, template, names, stops)


def _read_backend(folder: Path) -> Tokenizer:
    file = _existing(folder / "tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing narrower
        raise TokenizerError(
            f"{file} cannot be read: {error}. Download it again from the model's page."
        ) from error
    # A file may carry the settings of whoever saved it; Hugging Face resets them as well.
    backend.no_truncation()
    backend.no_padding()
    # It adds no token to a chat, and may move the borders of tokens past the spaces in them
    backend.post_processor = None
    return backend


def _added(backend: Tokenizer) -> dict[str, AddedToken]:
    return {token.content: token for token in backend.get_added_tokens_decoder().values()}


def _existing(file: Path) -> Path:
    if file.is_file():
        return file
    hint = ""
    if file.name == "tokenizer.json" and (file.parent / "tokenizer.model").is_file():
        hint = " (only tokenizer.model, which does not say how special tokens treat whitespace)"
    raise MissingFileError(
        f"{file.parent} has no {file.name}{hint}. Download the checkpoint's tokenizer.json, "
        "tokenizer_config.json and config.json into this folder."
    )


def _read_text(file: Path) -> str:
    try:
        return _existing(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 text: {error}. Download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not {type(content).__name__}.")
    return content


def _token_text(token: Any) -> str | None:
    # Older files write a special token as an object with its flags
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    beside, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if beside.is_file():
        return _read_text(beside), str(beside)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise TokenizerError(
            f"{config} has no chat_template and there is no {beside.name} beside it. Base models "
            "have none; use an instruct checkpoint, or download its tokenizer_config.json again."
        )
    return template, str(config)


def _check_size(backend: Tokenizer, folder: Path) -> None:
    rows = _read_json(folder / "config.json").get("vocab_size")
    tokens = max(backend.get_vocab().values()) + 1
    if not isinstance(rows, int) or tokens > rows:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'} has {tokens} tokens, more than vocab_size: {rows} in "
            "config.json, so some have no embedding. Use the two files of one checkpoint."
        )


def _check_agreement(backend: Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    # Where the two files differ, Hugging Face silently follows tokenizer_config.json
    tokens = _added(backend)
    listed = settings.get("added_tokens_decoder") or {}
    if not all(
        isinstance(e, Mapping) and isinstance(e.get("content"), str) for e in listed.values()
    ):
        raise TokenizerError(
            f"{folder}/tokenizer_config.json: an entry of added_tokens_decoder has no content. "
            "Download the file again."
        )
    differing = [
        entry["content"]
        for entry in listed.values()
        if entry["content"] not in tokens
        or any(
            flag in entry and entry[flag] != value
            for flag, value in _flags(tokens[entry["content"]]).items()
        )
    ]
    if differing:
        raise TokenizerError(
            f"{folder}: tokenizer.json and tokenizer_config.json disagree about "
            f"{', '.join(differing)}. Use the two files of one revision."
        )


def _flags(token: AddedToken) -> dict[str, bool]:
    return {flag: getattr(token, flag) for flag in FLAGS}


def _check_names(names: Mapping[str, str], backend: Tokenizer, folder: Path) -> None:
    unknown = [f"{n}: {text!r}" for n, text in names.items() if backend.token_to_id(text) is None]
    if "eos_token" not in names or unknown:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: "
            + (f"{', '.join(unknown)} is not in tokenizer.json" if unknown else "no eos_token")
            + ". Use the two files of one revision."
        )


def _read_stop_tokens(backend: Tokenizer, ends: Sequence[str | None], folder: Path) -> list[int]:
    file, ids = folder / "generation_config.json", backend.get_vocab()
    listed = _read_json(file).get("eos_token_id") if file.is_file() else None
    if listed is None:
        return [ids[text] for text in dict.fromkeys(ends) if text is not None]
    stops = listed if isinstance(listed, list) else [listed]
    known = set(ids.values())
    if not stops or not all(type(i) is int and i in known for i in stops):
        raise TokenizerError(f"{file}: eos_token_id: {listed!r} must be ids of the tokenizer.")
    return stops


# Phi-3's tokenizer for torchtune, with the ids of Hugging Face.

PADS = ("model", "unk")
DROPPED = ("error", "warn")

logger = logging.getLogger(__name__)


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

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_seq_len: int | None = None,
        *,
        pad: str = "model",
        special_in_text: str = "parse",
        dropped: str = "error",
    ) -> None:
        """Wrap the files of a checkpoint; see :func:`phi3_tokenizer`."""
        check_choice("tokenizer.pad", pad, PADS)
        check_choice("tokenizer.special_in_text", special_in_text, SPECIAL_IN_TEXT)
        check_choice("tokenizer.dropped", dropped, DROPPED)
        check_length("tokenizer.max_seq_len", max_seq_len)
        self.max_seq_len = max_seq_len
        self._backend = vocabulary.backend
        self._template = vocabulary.template
        self.stop_tokens = vocabulary.stop_tokens
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        ids: dict[str, int] = self._backend.get_vocab()
        self.vocab_size = len(ids)
        named = {name: ids[text] for name, text in vocabulary.names.items()}
        self.bos_id, self.unk_id = named.get("bos_token"), named.get("unk_token")
        self.eos_id, self._eos = named["eos_token"], vocabulary.names["eos_token"]
        self.pad_id = _pad_id(pad, named)
        self._encoder = Encoder(self._backend, special_in_text)
        self._may_drop, self.special_in_text = dropped == "warn", special_in_text

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
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

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
        ask = add_generation_prompt
        rendered = [self.render(chat, add_generation_prompt=ask) for chat in chats]
        warn_of_dropped(Counter(name for chat in rendered for name in chat.dropped))
        tokens, limit = self.encode_chats(rendered).split(), None if ask else self.max_seq_len
        return [chat.first(limit) for chat in tokens]

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write a conversation as the chat template does.

        Raises:
            DataError: The template fails on it, changes what it says or, unless ``dropped``
                is "warn", leaves a message out.
            TokenizerError: The chat template cannot be followed.
        """
        rendered = self._template.render(turns, add_generation_prompt=add_generation_prompt)
        if rendered.dropped and not self._may_drop:
            raise DataError(
                f"the chat template leaves out {', '.join(dict.fromkeys(rendered.dropped))}; to "
                "go on without, set tokenizer.dropped to warn"
            )
        return rendered

    @property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template."""
        return self._template

    def closed(self, written: Written) -> Written:
        """Put the end-of-text token at the end of a text that does not end in it."""
        has_it = written.text.rstrip().endswith(self._eos)
        return written if has_it else written._replace(text=written.text + self._eos)

    def ended(self, chat: Rendered, *, trained: bool) -> Rendered:
        """Put the end-of-text token at the end of a conversation that does not end in it."""
        return chat._replace(layout=chat.layout.ended(self._eos, trained=trained))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a conversation becomes."""
        template = self._template
        parts: list[Any] = [self._backend.to_str(), template.source, dict(template.special_tokens)]
        parts += [str(NOW)] if "strftime_now" in template.source else []
        parts += [self._may_drop, self.special_in_text]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode_chats(self, chats: Sequence[Rendered]) -> Batch:
        """Encode rendered conversations, each whole."""
        return self._encoder.encode(chats)

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
        if (
            inference
            and messages
            and messages[-1].role == "assistant"
            and not _message_text(messages[-1])
        ):
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
    dropped: str = "error",
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
        dropped: What a message is that the template leaves out, as many do with the system
            message. "error", or "warn": go on without, and log how many there were. An empty
            message that is left out is neither.

    Raises:
        ConfigError: The path is not given, or an option has a value that it cannot have.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or the chat template cannot be followed.
    """
    return Phi3Tokenizer(
        read_vocabulary(path),
        max_seq_len,
        pad=pad,
        special_in_text=special_in_text,
        dropped=dropped,
    )


def warn_of_dropped(counted: Mapping[str, int]) -> None:
    """Log one line about what the template left out, if it did."""
    if counted:
        listed = ", ".join(f"{name} ({count} times)" for name, count in counted.items())
        log_rank_zero(logger, f"the chat template leaves out {listed}", logging.WARNING)


def _pad_id(pad: str, named: Mapping[str, int]) -> int:
    if pad == "model":
        return named.get("pad_token", named["eos_token"])
    if "unk_token" not in named:
        raise ConfigError(
            "tokenizer.pad: 'unk' needs a token that tokenizer_config.json does not name. Use "
            "'model'."
        )
    return named["unk_token"]


def _message_text(message: Message) -> str:
    others = {part["type"] for part in message.content} - {"text"}
    if others:
        raise DataError(f"a message holds {', '.join(sorted(others))}, expected text only")
    return "".join(part["content"] for part in message.content)


# What of a conversation is trained on, and what is put in front of it and at its end.

TRAIN_ON = ("assistant", "last", "marked", "all")
"""Every assistant turn that does not say otherwise, the last assistant turn, the messages that ask
for it, or all tokens but the first."""

NOTHING = {
    "assistant": "no assistant turn that is trained on starts",
    "last": "the last assistant turn does not start",
    "marked": "no message that asks to be trained on starts",
    "all": "there is no second token",
}
"""Why a conversation that was cut trains nothing; the length it was cut to follows."""


@dataclass(frozen=True)
class Lesson:
    """Turns a conversation as it was read into one to learn from."""

    train_on: str = "assistant"
    """One of :data:`TRAIN_ON`."""
    system: Turn | None = None
    """Comes before conversations that have no system message."""
    add_eos: bool = False
    """Whether the end-of-text token follows where the template does not write it."""

    def render(self, chat: Chat, tokenizer: Phi3Tokenizer) -> Rendered:
        """Write a conversation as the template does, and mark what is trained on.

        Raises:
            DataError: There is nothing to train on, or the conversation cannot be rendered.
        """
        if isinstance(chat, Written):
            if self.system is not None:
                raise DataError(
                    "dataset.system_prompt cannot be put in front of a text that is written already"
                )
            return self._follow(tokenizer.closed(chat) if self.add_eos else chat, tokenizer)
        return self.write(self.prepare(chat), tokenizer)

    def write(self, turns: Sequence[Turn], tokenizer: Phi3Tokenizer) -> Rendered:
        """Write turns that are prepared already.

        Raises:
            DataError: They cannot be rendered.
        """
        rendered = tokenizer.render(turns)
        trained = self.train_on == "all"
        return tokenizer.ended(rendered, trained=trained) if self.add_eos else rendered

    def prepare(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Mark the turns that are trained on, and add the system message.

        Raises:
            DataError: There is nothing to train on.
        """
        chosen = self._chosen(turns)
        if self.train_on != "all" and not any(chosen):
            raise DataError(_nothing(self.train_on, turns))
        if [turn.trained for turn in turns] != chosen:
            turns = [
                Turn(turn.role, turn.content, trained, turn.tools)
                for turn, trained in zip(turns, chosen, strict=True)
            ]
        if self.system is None or any(turn.role == "system" for turn in turns):
            return turns
        return [self.system, *turns]

    def mark(self, batch: Batch) -> Batch:
        """Mark the tokens that are trained on, given those that the turns mark."""
        if self.train_on != "all":
            return batch
        trained = np.ones(len(batch.ids), dtype=np.bool_)
        # Nothing comes before the first, from which it could be predicted
        trained[_starts(batch)] = False
        return batch._replace(trained=trained)

    def passes_over(self, chat: Chat) -> bool:
        """Whether a message asks for something that this lesson does not do."""
        if isinstance(chat, Written) or self.train_on == "marked":
            return False
        asked = [turn for turn in chat if turn.wanted is not None]
        if self.train_on == "assistant":
            return any(turn.wanted and turn.role != "assistant" for turn in asked)
        return bool(asked)

    def _chosen(self, turns: Sequence[Turn]) -> list[bool]:
        if self.train_on == "marked":
            return [turn.wanted is True for turn in turns]
        if self.train_on == "last":
            answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
            return [i in answers[-1:] for i in range(len(turns))]
        return [turn.role == "assistant" and turn.wanted is not False for turn in turns]

    def _follow(self, chat: Written, tokenizer: Phi3Tokenizer) -> Rendered:
        if self.train_on == "all":
            return tokenizer.template.follow(chat, ())
        if self.train_on == "marked":
            raise DataError("a text has no messages that could ask to be trained on")
        said = chat.said if chat.said is not None else tokenizer.template.split(chat).said or ()
        if not said:
            raise DataError(_nothing(self.train_on, ()))
        return tokenizer.template.follow(chat, said[-1:] if self.train_on == "last" else said)


def make_lesson(train_on: str, system_prompt: str | None, add_eos: bool = False) -> Lesson:
    """Check the options of the data set.

    Raises:
        ConfigError: An option has a value that it cannot have.
    """
    check_choice("dataset.train_on", train_on, TRAIN_ON)
    check_switch("dataset.add_eos", add_eos)
    if system_prompt is None:
        return Lesson(train_on, None, add_eos)
    try:
        return Lesson(train_on, make_turn("system", system_prompt), add_eos)
    except DataError as error:
        raise ConfigError(f"dataset.system_prompt: {error}.") from error


def _nothing(train_on: str, turns: Sequence[Turn]) -> str:
    if train_on == "marked":
        return "no message has a weight of 1 or train: true, so nothing to train on"
    if any(turn.role == "assistant" for turn in turns):
        return "every assistant turn has a weight of 0 or train: false, so nothing to train on"
    return "there is no assistant turn, so nothing to train on"


def _starts(batch: Batch) -> NDArray[np.int64]:
    starts: NDArray[np.int64] = (np.cumsum(batch.lengths) - batch.lengths)[batch.lengths > 0]
    return starts


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
