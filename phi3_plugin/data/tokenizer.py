"""From text to ids, and which of them are trained on: a tokenizer with the ids of Hugging Face."""

import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from torchtune.utils import log_rank_zero

from phi3_plugin.config import checkpoint_folder
from phi3_plugin.data.formats import Turn, check_choice, check_length, make_turn
from phi3_plugin.data.template import NOW, ChatTemplate, Piece, Rendered, token_pattern
from phi3_plugin.errors import ConfigError, DataError, MissingFileError, TokenizerError

logger = logging.getLogger(__name__)

# Shapes: N conversations, S tokens of one, T of all


def phi3_tokenizer(
    path: str | Path | None,
    max_seq_len: int | None = None,
    *,
    pad: str = "model",
    special_in_text: str = "parse",
    dropped: str = "error",
) -> "Phi3Tokenizer":
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


class Tokens(NamedTuple):
    """One tokenized conversation."""

    ids: NDArray[np.int32]
    """[S]"""
    trained: NDArray[np.bool_]
    """[S]; True where the loss counts the prediction of this token."""

    def first(self, count: int | None) -> "Tokens":
        """Return the first tokens; None is all."""
        return Tokens(self.ids[:count], self.trained[:count])


class TokenizedChats(NamedTuple):
    """Tokenized conversations, one after the other."""

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]"""
    lengths: NDArray[np.int64]
    """[N]"""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each conversation begins, [N]."""
        starts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return starts

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Tokens of each conversation that are trained on, [N]."""
        counts, ends = np.concatenate([[0], np.cumsum(self.trained)]), np.cumsum(self.lengths)
        labelled: NDArray[np.int64] = counts[ends] - counts[ends - self.lengths]
        return labelled

    def select(self, kept: NDArray[np.bool_]) -> "TokenizedChats":
        """Return some of the conversations; ``kept`` is [N]."""
        tokens = np.repeat(kept, self.lengths)
        return TokenizedChats(self.ids[tokens], self.trained[tokens], self.lengths[kept])

    def split(self) -> list[Tokens]:
        """Return the conversations one by one."""
        ends, lengths = np.cumsum(self.lengths).tolist(), self.lengths.tolist()
        places = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        return [Tokens(self.ids[place], self.trained[place]) for place in places]

    @classmethod
    def join(cls, chats: Sequence[Tokens]) -> "TokenizedChats":
        """Put tokenized conversations one after the other."""
        ids = np.concatenate([np.zeros(0, np.int32), *(chat.ids for chat in chats)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(chat.trained for chat in chats)])
        return cls(ids, trained, np.array([len(chat.ids) for chat in chats], dtype=np.int64))


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
        vocabulary: "Vocabulary",
        max_seq_len: int | None = None,
        *,
        pad: str = "model",
        special_in_text: str = "parse",
        dropped: str = "error",
    ) -> None:
        """Wrap the files of a checkpoint; see :func:`phi3_tokenizer`."""
        check_choice("tokenizer.pad", pad, ("model", "unk"))
        check_choice("tokenizer.special_in_text", special_in_text, ("parse", "text"))
        check_choice("tokenizer.dropped", dropped, ("error", "warn"))
        check_length("tokenizer.max_seq_len", max_seq_len)
        self.max_seq_len = max_seq_len
        self.backend, self.template = vocabulary.backend, vocabulary.template
        self.stop_tokens = vocabulary.stop_tokens
        self.special_in_text = special_in_text
        self._may_drop = dropped == "warn"
        self._disguise = Disguise(self.backend) if special_in_text == "text" else None
        ids: dict[str, int] = self.backend.get_vocab()
        self.vocab_size = len(ids)
        added = self.backend.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: i for i, token in added if token.special}
        named = {name: ids[text] for name, text in self.template.special_tokens.items()}
        self.bos_id, self.unk_id = named.get("bos_token"), named.get("unk_token")
        self.eos_id, self.eos_token = named["eos_token"], self.template.special_tokens["eos_token"]
        if pad == "unk" and self.unk_id is None:
            raise ConfigError(
                "tokenizer.pad: 'unk' needs a token that tokenizer_config.json does not name. Use "
                "'model'."
            )
        self.pad_id = named["unk_token"] if pad == "unk" else named.get("pad_token", self.eos_id)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode plain text; special tokens written in it become their ids, whatever messages do.

        Raises:
            TokenizerError: A beginning-of-text token is asked for and the files name none.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos: tokenizer_config.json names no bos_token.")
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn ids back into text."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write a conversation as the chat template does.

        Raises:
            DataError: The template fails on it, changes what it says or, unless ``dropped``
                is "warn", leaves a message out.
            TokenizerError: The chat template cannot be followed.
        """
        rendered = self.template.render(turns, add_generation_prompt=add_generation_prompt)
        if rendered.dropped and not self._may_drop:
            raise DataError(
                f"the chat template leaves out {', '.join(dict.fromkeys(rendered.dropped))}; to "
                "go on without, set tokenizer.dropped to warn"
            )
        return rendered

    def encode_chats(self, chats: Sequence[Rendered]) -> TokenizedChats:
        """Encode rendered conversations, each whole and as one text, on all cores.

        A token belongs to the piece it starts in: one that begins with the header's newline is the
        template's, and one that ends what is said may swallow the newline after it.
        """
        pieces = [chat.pieces for chat in chats]
        backend = self.backend
        if self._disguise is not None:
            backend = self._disguise.backend
            pieces = [list(map(self._disguise.hide, chat)) for chat in pieces]
        texts = ["".join([piece.text for piece in chat]) for chat in pieces]
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, total)
        if self._disguise is not None:
            ids = self._disguise.true_ids(ids)
        spans = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
        starts = np.fromiter(spans, np.int64, 2 * total)[::2]
        # All texts, as if they stood one after the other
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        starts += np.repeat(np.cumsum(sizes) - sizes, lengths)
        ends = np.cumsum([len(piece.text) for chat in pieces for piece in chat])
        counts = np.array([piece.trained for chat in pieces for piece in chat], dtype=np.bool_)
        batch = TokenizedChats(ids, counts[np.searchsorted(ends, starts, side="right")], lengths)
        # Nothing comes before the first, from which it could be predicted
        batch.trained[batch.starts[lengths > 0]] = False
        return batch

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
        limit = None if ask else self.max_seq_len
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
        template = self.template
        parts: list[Any] = [self.backend.to_str(), template.source, dict(template.special_tokens)]
        parts += [str(NOW)] if "strftime_now" in template.source else []
        parts += [self._may_drop, self.special_in_text]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
    the tokens, and what they do to the text beside them, are the same.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """Copy the tokenizer."""
        secret = secrets.token_hex(8)  # nobody's text holds it
        added = backend.get_added_tokens_decoder()
        self._names = {token.content: f"{secret}-{i}-" for i, token in added.items()}
        self._tokens = token_pattern(self._names)
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._names[token["content"]]
        self.backend = Tokenizer.from_str(json.dumps(content))
        # Those that were in the model's own vocabulary are new to it and move the others
        ids = self.backend.get_vocab()
        self._true_ids = np.arange(max(ids.values()) + 1, dtype=np.int32)
        for i, token in added.items():
            self._true_ids[ids[self._names[token.content]]] = i

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


# The tokenizer files of a checkpoint folder; those we cannot follow exactly are refused

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Special tokens that tokenizer_config.json gives a name."""

TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class Vocabulary(NamedTuple):
    """What the files of one checkpoint say about text and tokens."""

    backend: Tokenizer
    template: ChatTemplate
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
    backend = _read_backend(_existing(folder / "tokenizer.json"))
    settings = _read_json(folder / "tokenizer_config.json")
    _check_size(backend, folder)
    _check_agreement(backend, settings, folder)
    # Older files write a special token as an object with its flags
    listed = {name: settings.get(name) for name in TOKEN_NAMES}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in listed.items()}
    names = {name: text for name, text in texts.items() if isinstance(text, str)}
    unknown = [f"{n}: {text!r}" for n, text in names.items() if backend.token_to_id(text) is None]
    if unknown or "eos_token" not in names:
        problem = f"{', '.join(unknown)} is not in tokenizer.json" if unknown else "no eos_token"
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: {problem}. Use the two files of one revision."
        )
    # A named token is an added one for Hugging Face, whatever tokenizer.json says
    backend.add_special_tokens(sorted(set(names.values()) - _added(backend).keys()))
    template = ChatTemplate(*_read_template(folder, settings), names, frozenset(_added(backend)))
    template.check()
    ends = (names["eos_token"], template.turn_end)
    return Vocabulary(backend, template, _read_stop_tokens(backend, ends, folder))


def _read_backend(file: Path) -> Tokenizer:
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not {type(content).__name__}.")
    return content


def _read_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    beside, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if beside.is_file():
        return _read_text(beside), str(beside)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
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
    """Where the two files differ, Hugging Face silently follows tokenizer_config.json."""
    tokens, differing = _added(backend), list[str]()
    for entry in (settings.get("added_tokens_decoder") or {}).values():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str):
            raise TokenizerError(
                f"{folder}/tokenizer_config.json: an entry of added_tokens_decoder has no content. "
                "Download the file again."
            )
        token = tokens.get(content)
        if token is None or any(
            entry.get(f, getattr(token, f)) != getattr(token, f) for f in TOKEN_FLAGS
        ):
            differing.append(content)
    if differing:
        raise TokenizerError(
            f"{folder}: tokenizer.json and tokenizer_config.json disagree about "
            f"{', '.join(differing)}. Use the two files of one revision."
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
