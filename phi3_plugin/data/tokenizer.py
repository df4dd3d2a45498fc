"""Phi-3's tokenizer for torchtune, with the ids of Hugging Face."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from torchtune.utils import log_rank_zero

from phi3_plugin.data.encoder import SPECIAL_IN_TEXT, Batch, Encoder, Tokens
from phi3_plugin.data.layout import Rendered
from phi3_plugin.data.options import check_choice, check_length
from phi3_plugin.data.sandbox import NOW
from phi3_plugin.data.template import ChatTemplate
from phi3_plugin.data.turns import Turn, Written, make_turn
from phi3_plugin.data.vocabulary import Vocabulary, read_vocabulary
from phi3_plugin.errors import ConfigError, DataError, TokenizerError

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


def _text(message: Message) -> str:
    others = {part["type"] for part in message.content} - {"text"}
    if others:
        raise DataError(f"a message holds {', '.join(sorted(others))}, expected text only")
    return "".join(part["content"] for part in message.content)
