"""Tokens that are added to a checkpoint's vocabulary: which may be, their ids, their files."""

import filecmp
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from phi3_plugin.config import read_json_object
from phi3_plugin.errors import ConfigError, TokenizerError
from phi3_plugin.options import Kind

TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
"""How an added token treats the text beside it; both tokenizer files say so of each."""

Entry = Mapping[str, Any]
"""An added token as tokenizer.json has it: ``id``, ``content`` and `TOKEN_FLAGS`."""


def _is_token(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("content"), str)
        and all(type(value[name]) is bool for name in TOKEN_FLAGS if name in value)
        and {*value} <= {"id", "content", *TOKEN_FLAGS}
    )


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_token, value))


ManyTokens = Annotated[
    Sequence[str | Entry],
    Kind("a list of texts, as in ['<call>', '</call>'], in quotes", _are_tokens),
]
"""Texts; or objects of a text and flags, as transformers' ``AddedToken``."""


class NewToken(NamedTuple):
    """A token that was added."""

    entry: Entry
    pieces: list[int]
    """The tokens that its text was before."""


def add_tokens(backend: Tokenizer, tokens: Sequence[str | Entry]) -> dict[int, NewToken]:
    """Add tokens as transformers' ``tokenizer.add_tokens`` does, and return them by id.

    The ids follow the last one that the tokenizer has.

    Args:
        backend: That of a checkpoint, changed in place.
        tokens: See `ManyTokens`.

    Raises:
        ConfigError: Some cannot be added; each is told.
    """
    wanted = [{"content": token} if isinstance(token, str) else dict(token) for token in tokens]
    texts = [str(token["content"]) for token in wanted]
    # Those with an id are from a tokenizer's file, and have been accepted
    asked = [text for text, token in zip(texts, wanted, strict=True) if "id" not in token]
    if problems := list(dict.fromkeys(_problems(backend, asked))):
        raise ConfigError("\n".join(f"tokenizer.add_tokens: {problem}" for problem in problems))
    pieces = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    added = dict[int, NewToken]()
    for token, text, ids in zip(wanted, texts, pieces, strict=True):
        flags = {name: token[name] for name in TOKEN_FLAGS if name in token}
        add = backend.add_special_tokens if flags.pop("special", False) else backend.add_tokens
        add([AddedToken(text, **flags)])
        (number,) = (i for i, t in backend.get_added_tokens_decoder().items() if t.content == text)
        if token.get("id", number) != number:
            raise ConfigError(
                f"tokenizer.add_tokens: {text!r} gets the id {number} here, but had {token['id']}: "
                "it was added to the tokenizer of another checkpoint. Give that one's base."
            )
        added[number] = NewToken(_entry(number, backend), ids)
    return added


def pieces_of(tokens: Mapping[int, NewToken]) -> dict[int, list[int]]:
    """Return by id the tokens that the text of each was before."""
    return {number: token.pieces for number, token in tokens.items()}


def asked_as(entry: Entry) -> str | dict[str, Any]:
    """Return how ``tokenizer.add_tokens`` asks for a token: its text, and what flags it has."""
    usual = dict.fromkeys(TOKEN_FLAGS, False) | {"normalized": True}
    flags = {
        name: entry[name] for name in TOKEN_FLAGS if entry.get(name, usual[name]) != usual[name]
    }
    return {"content": entry["content"], **flags} if flags else str(entry["content"])


def _entry(number: int, backend: Tokenizer) -> Entry:
    token = backend.get_added_tokens_decoder()[number]
    return {
        "id": number,
        "content": token.content,
        **{n: getattr(token, n) for n in TOKEN_FLAGS},
    }


def _problems(backend: Tokenizer, texts: Sequence[str]) -> Iterator[str]:
    known = [token.content for token in backend.get_added_tokens_decoder().values()]
    for text in texts:
        if not text.strip():
            yield f"{text!r} is {'only white space' if text else 'empty'}. Remove it."
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            yield f"{text!r} holds half a character. Remove it."
            continue
        if texts.count(text) > 1:
            yield f"{text!r} is there {texts.count(text)} times. Keep one."
        ids = backend.encode(text, add_special_tokens=False).ids
        number = ids[0] if len(ids) == 1 else backend.token_to_id(text)
        if number is not None:
            yield f"{text!r} is one token already, {number}. Remove it: it needs no new row."
            continue
        if not ids:
            yield f"{text!r} is no text to this tokenizer. Remove it."
        for other in dict.fromkeys([*known, *texts]):
            if other.strip() and other != text and (text in other or other in text):
                longer, shorter = (other, text) if text in other else (text, other)
                yield (
                    f"{shorter!r} is contained in {longer!r}, so that one would be read in the "
                    "place of the other. Choose texts that are not parts of each other."
                )


# The files of a tokenizer: in a folder that serves they have the tokens as well


def write_added_tokens(folder: Path, entries: Sequence[Entry]) -> None:
    """Give the tokenizer in a folder, a copy of the base's, the tokens that were added.

    Args:
        folder: Has tokenizer.json and, as published, tokenizer_config.json and added_tokens.json.
        entries: Of the tokens.
    """
    if not entries:
        return
    _rewrite(folder / "tokenizer.json", lambda keys: keys["added_tokens"].extend(entries))
    flags = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
    if "added_tokens_decoder" in read_json_object(folder / "tokenizer_config.json", TokenizerError):
        _rewrite(
            folder / "tokenizer_config.json",
            lambda keys: keys["added_tokens_decoder"].update(flags),
        )
    if (older := folder / "added_tokens.json").is_file():
        _rewrite(older, lambda keys: keys.update({e["content"]: e["id"] for e in entries}))


def _rewrite(file: Path, change: Any) -> None:
    keys = read_json_object(file, TokenizerError)
    change(keys)
    file.write_text(json.dumps(keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokens_beyond(folder: Path, base: Path) -> list[Entry]:
    """Return the added tokens that the tokenizer in a folder has and that of a base has not.

    Args:
        folder: Of an adapter or a model; may be without a tokenizer.
        base: Of the base model; may be without one.

    Raises:
        TokenizerError: A tokenizer.json is damaged.
    """
    files = folder / "tokenizer.json", base / "tokenizer.json"
    if not all(file.is_file() for file in files) or filecmp.cmp(*files, shallow=False):
        return []
    theirs, known = (
        read_json_object(file, TokenizerError).get("added_tokens") or [] for file in files
    )
    for entry in theirs:
        if not _is_token(entry) or isinstance(entry, str) or type(entry.get("id")) is not int:
            raise TokenizerError(f"{files[0]}: added_tokens holds what is no token: {entry!r}.")
    texts = {entry.get("content") for entry in known if isinstance(entry, Mapping)}
    beyond = [entry for entry in theirs if entry["content"] not in texts]
    return sorted(beyond, key=lambda entry: int(entry["id"]))
