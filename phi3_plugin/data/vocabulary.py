"""The tokenizer files of a checkpoint folder; those we cannot follow exactly are refused."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from phi3_plugin.config import GENERATION, checkpoint_folder, read_json_object
from phi3_plugin.data.added_tokens import TOKEN_FLAGS, Entry, NewToken, add_tokens
from phi3_plugin.data.template import ChatTemplate
from phi3_plugin.errors import MissingFileError, TokenizerError

EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")
"""Where tokenizer_config.json lists special tokens; those that have a name end in ``_token``."""

PROBE = "A text, 1 + 1 = 2.\n"
"""Encoded once: some files are read well and fail at the first text."""


class Vocabulary(NamedTuple):
    """What the files of one checkpoint say about text and tokens."""

    file: Path
    """tokenizer.json"""
    backend: Tokenizer
    template: ChatTemplate
    stop_tokens: list[int]
    new_tokens: dict[int, NewToken]
    """Those that the files have not, by id."""
    text_start: list[int]
    """What tokenizer.json puts in front of a text that is no chat."""


def read_vocabulary(
    checkpoint_dir: str | Path | None, add: Sequence[str | Entry] = ()
) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json, the chat template and the stop ids.

    Args:
        checkpoint_dir: Folder in Hugging Face layout. generation_config.json is optional.
        add: More tokens; the template knows nothing of them.

    Raises:
        ConfigError: The folder is not given, or some of the tokens cannot be added.
        MissingFileError: The folder or one of its files is not there.
        TokenizerError: A file is broken, or of a generation that is not supported.
    """
    folder = checkpoint_folder(checkpoint_dir)
    backend, text_start = _read_backend(_existing(folder / "tokenizer.json"))
    settings = _read_json(folder / "tokenizer_config.json")
    _check_size(backend, folder)
    _check_agreement(backend, settings, folder)
    names = _special_tokens(backend, settings, folder)
    template = ChatTemplate(*_read_template(folder, settings), names, frozenset(_added(backend)))
    template.check()
    ends = (names["eos_token"], template.turn_end)
    file = folder / "tokenizer.json"
    stops = _read_stop_tokens(backend, ends, folder)
    return Vocabulary(file, backend, template, stops, add_tokens(backend, add), text_start)


def first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Say of which token two vocabularies have another text, if there is one.

    Args:
        ours: Ids by text, of a student.
        theirs: Of its teacher.
    """
    one, other = ({i: text for text, i in ids.items()} for ids in (ours, theirs))
    differing = [i for i in {*one, *other} if one.get(i) != other.get(i)]
    if not differing:
        return None
    first = min(differing)
    here, there = (repr(texts[first]) if first in texts else "none" for texts in (one, other))
    return f"token {first} is {here} for the student and {there} for the teacher"


def _read_backend(file: Path) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer without what it adds to a text, and what it would put in front."""
    with naming(file):
        backend = Tokenizer.from_file(str(file))
    # A file may carry the settings of whoever saved it; Hugging Face resets them as well.
    backend.no_truncation()
    backend.no_padding()
    with naming(file):
        probe = backend.encode(PROBE)
    start = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]
    # It adds no token to a chat, and may move the borders of tokens past the spaces in them
    backend.post_processor = None
    with naming(file):
        backend.encode(PROBE, add_special_tokens=False)
    return backend, start


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name the file in what `tokenizers` raises, also where its Rust code panics.

    A panic is no `Exception` in Python: nothing else would catch it.

    Raises:
        TokenizerError: It raised something.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise TokenizerError(
            f"{file} cannot be used: {reason}. Download it again from the model's page."
        ) from error


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


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(_existing(file), TokenizerError)


def _special_tokens(
    backend: Tokenizer, settings: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Make the special tokens that tokenizer_config.json has added ones, as Hugging Face does.

    Returns:
        The texts of those that have a name.
    """
    file = folder / "tokenizer_config.json"
    if "added_tokens_decoder" not in settings:  # files of older versions then say it as well
        for name in ("special_tokens_map.json", "added_tokens.json"):
            beside = folder / name
            if beside.is_file():
                content = _read_json(beside)
                more = {"extra_special_tokens": [*content]} if name[0] == "a" else content
                _special_tokens_of(more, beside, backend)
    names = _special_tokens_of(settings, file, backend)
    if "eos_token" not in names:
        raise TokenizerError(f"{file}: no eos_token. Use the two files of one revision.")
    return names


def _special_tokens_of(
    settings: Mapping[str, Any], file: Path, backend: Tokenizer
) -> dict[str, str]:
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    listed = list[Any]()
    for key in EXTRA_TOKENS:
        extra = settings.get(key) or []
        if isinstance(extra, dict):
            named |= extra
        elif isinstance(extra, list):
            listed += extra
        else:
            raise TokenizerError(f"{file}: {key} must be a list or an object of tokens.")
    texts = {name: text for name, token in named.items() if (text := _text_of(token))}
    tokens = {_text_of(token): token for token in [*named.values(), *listed]}
    unknown = [text for text in tokens if text and backend.token_to_id(text) is None]
    if unknown:
        names = [name for name, text in texts.items() if text == unknown[0]]
        raise TokenizerError(
            f"{file}: {names[0] if names else 'a special token'}: {unknown[0]!r} is not in "
            "tokenizer.json. Use the two files of one revision; if the token was added here, "
            "write both anew with transformers' AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)."
        )
    # Whatever tokenizer.json says
    for text in sorted(text for text in tokens if text and text not in _added(backend)):
        flags = tokens[text] if isinstance(tokens[text], dict) else {}
        given = {name: flags[name] for name in TOKEN_FLAGS[1:] if isinstance(flags.get(name), bool)}
        backend.add_special_tokens([AddedToken(text, **{"normalized": False, **given})])
    return texts


def _text_of(token: Any) -> str | None:
    # Older files write a special token as an object with its flags
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the Jinja text of the chat template, and the file it stands in."""
    beside = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8"), str(beside)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{beside} is not UTF-8 text: {error}. Download it again."
            ) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        template = named[-1] if named else None
    if not isinstance(template, str):
        raise TokenizerError(
            f"{config} has no chat_template and there is no {beside.name} beside it. Base models "
            "have none; use an instruct checkpoint, or download its tokenizer_config.json again."
        )
    return template, str(config)


def _check_size(backend: Tokenizer, folder: Path) -> None:
    rows = _read_json(folder / "config.json").get("vocab_size")
    tokens = max(backend.get_vocab().values(), default=-1) + 1
    if not tokens:
        raise TokenizerError(f"{folder / 'tokenizer.json'} has no tokens. Download it again.")
    if type(rows) is not int or tokens > rows:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'} has {tokens} tokens, more than vocab_size: {rows} in "
            "config.json, so some have no embedding. Use the two files of one checkpoint; to add "
            "tokens, give the model rows for them with transformers: "
            f"model.resize_token_embeddings({tokens}) and model.save_pretrained(folder), and the "
            "same with the tokenizer."
        )


def _check_agreement(backend: Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Where the two files differ, Hugging Face silently follows tokenizer_config.json."""
    tokens = _added(backend)
    differing = list[str]()
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(
            f"{folder}/tokenizer_config.json: added_tokens_decoder must be an object of ids and "
            "tokens. Download the file again."
        )
    for entry in decoder.values():
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
    file = folder / GENERATION
    ids = backend.get_vocab()
    listed = _read_json(file).get("eos_token_id") if file.is_file() else None
    if listed is None:
        return [ids[text] for text in dict.fromkeys(ends) if text is not None]
    stops = listed if isinstance(listed, list) else [listed]
    known = set(ids.values())
    if not stops or not all(type(i) is int and i in known for i in stops):
        raise TokenizerError(f"{file}: eos_token_id: {listed!r} must be ids of the tokenizer.")
    return stops
