"""At which tokens generation ends, read from a checkpoint's own files.

``<|end|>`` closes a turn, ``<|endoftext|>`` a conversation, and a model that writes the header
``<|assistant|>`` has begun another turn. Phi-3's are 32007, 32000 and 32001.
"""

import json
from pathlib import Path
from typing import Any

from phi3_plugin.errors import ConfigError

ENDS = ("<|end|>", "<|endoftext|>", "<|assistant|>", "<|im_end|>")
GENERATION = "generation_config.json"


def stop_tokens(checkpoint_dir: Path) -> dict[str, int]:
    """Return the tokens of a checkpoint that end generation, and their ids, in the ids' order.

    Raises:
        ConfigError: A tokenizer file is not valid JSON, or lists no tokens.
    """
    added, settings = _added_tokens(checkpoint_dir), read_json(_tokenizer_config(checkpoint_dir))
    eos = settings.get("eos_token")
    named = eos.get("content") if isinstance(eos, dict) else eos
    found = {token: number for token, number in added.items() if token in (*ENDS, named)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def generation_config(checkpoint_dir: Path) -> dict[str, Any]:
    """Return generation_config.json of a checkpoint, with all its stop ids if it has one or none.

    Raises:
        ConfigError: A file is not valid JSON, or a stop is not a number.
    """
    keys, config = (read_json(checkpoint_dir / name) for name in (GENERATION, "config.json"))
    ids = _as_list(keys.get("eos_token_id"))
    if len(ids) > 1:
        return keys
    more = {*_as_list(config.get("eos_token_id")), *stop_tokens(checkpoint_dir).values()}
    special = ("bos_token_id", "pad_token_id")
    known: dict[str, Any] = {name: config[name] for name in special if name in config}
    return {**known, **keys, "eos_token_id": [*ids, *sorted(more.difference(ids))]}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; one that is not there is empty.

    Raises:
        ConfigError: The file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(keys).__name__}.")
    return keys


def _added_tokens(folder: Path) -> dict[str, int]:
    decoder = read_json(_tokenizer_config(folder)).get("added_tokens_decoder") or {}
    listed = read_json(folder / "tokenizer.json").get("added_tokens") or []
    plain = read_json(folder / "added_tokens.json")
    try:
        return {
            **{token: int(number) for token, number in plain.items()},
            **{token["content"]: int(number) for number, token in decoder.items()},
            **{token["content"]: int(token["id"]) for token in listed},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: its files list added tokens in an unknown way: {error!r}. Download "
            "tokenizer.json, tokenizer_config.json and added_tokens.json again."
        ) from error


def _tokenizer_config(folder: Path) -> Path:
    return folder / "tokenizer_config.json"


def _as_list(ids: Any) -> list[int]:
    many = [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
    if wrong := [number for number in many if type(number) is not int]:
        raise ConfigError(f"eos_token_id: {wrong[0]!r} must be a whole number.")
    return many
