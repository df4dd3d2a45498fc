"""A checkpoint folder's config.json and generation_config.json, read strictly.

Every key of a config.json is either used, required to have the one value that we compute, or known
to have no influence on training. Anything else is refused: a key that is skipped in silence is a
model that is computed wrongly.

Source: transformers 5.23, ``Phi3Config`` and ``modeling_rope_utils``; Ding et al. 2024, LongRoPE.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from phi3_plugin import hub
from phi3_plugin.errors import ConfigError, MissingFileError, Phi3Error
from phi3_plugin.options import Count, Positive, Switch, is_positive, is_whole, mistakes, spelled


@dataclass(frozen=True)
class LongRoPE:
    """Two sets of divisors for the frequencies, and when each is used."""

    short_factor: tuple[float, ...]
    """One for each pair of rotated dimensions."""
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    """The long set is for batches with a position at or beyond this."""
    attention_factor: float
    """Multiplies cosines and sines of both sets."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one checkpoint."""

    theta: float
    rotary_dim: int
    """Dimensions of a head that rotate: the first so many."""
    scaling: LongRoPE | None = None


@dataclass(frozen=True)
class Phi3Config:
    """The sizes and constants of one Phi-3 checkpoint, under Hugging Face's names."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    vocab_size: Count
    max_position_embeddings: Count
    rms_norm_eps: Positive
    rope: Rope
    sliding_window: Count | None
    """A query sees this many keys, itself included; None is plain causal attention."""
    tie_word_embeddings: Switch = False
    """Whether the head computes with the embedding's weights and has none of its own."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused ``qkv_proj``: all query heads, then key heads, then value heads."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


# config.json.


def read_config(checkpoint_dir: str | Path | None) -> Phi3Config:
    """Read and check ``config.json`` of a checkpoint folder.

    Args:
        checkpoint_dir: Folder in Hugging Face layout.

    Returns:
        The sizes and constants of the model.

    Raises:
        ConfigError: The folder is not given, or the file has problems; all are listed.
        MissingFileError: There is no such folder or it has no config.json.
    """
    file = checkpoint_folder(checkpoint_dir) / "config.json"
    if not file.is_file():
        raise MissingFileError(
            f"checkpoint_dir: {file.parent} has no config.json. Give the folder of a Phi-3 "
            "checkpoint in Hugging Face layout (config.json, tokenizer files, *.safetensors)."
        )
    return parse_config(read_json_object(file), str(file))


def checkpoint_folder(checkpoint_dir: str | Path | None, *, weights: bool = True) -> Path:
    """Return the checkpoint folder as a path; a model of the Hub is downloaded.

    Args:
        checkpoint_dir: The folder, or the name of a model of the Hub.
        weights: False downloads configuration and tokenizer alone.

    Raises:
        ConfigError: It is None, which is how the YAMLs say that the user must set it.
        MissingFileError: There is no such folder, and no such model that can be downloaded.
    """
    if checkpoint_dir is None:
        raise ConfigError(
            "checkpoint_dir is not set. Set it in the YAML or add "
            "checkpoint_dir=/path/to/Phi-3-mini-4k-instruct to the command."
        )
    folder = Path(os.path.expanduser(checkpoint_dir))
    if folder.is_dir():
        hub.say_that_a_folder_has_the_name(str(checkpoint_dir))
        return folder
    if hub.is_repository(checkpoint_dir):
        return hub.checkpoint(str(checkpoint_dir), weights=weights)
    raise MissingFileError(
        f"checkpoint_dir: {folder} is not a folder. Download a checkpoint with "
        f"'phi3-tune download {hub.DEFAULT_BASE} --output {folder}', or correct the path; the "
        "name of a model of the Hub can stand in its place."
    )


JSON_BYTES = 64_000_000
"""More than any tokenizer has; what is read becomes an object of many times its size."""


JSON_DEPTH = 100
"""Objects and lists within each other at most; published files have six."""

JSON_DIGITS = 1000
"""Of a whole number at most. "No limit" is written with 31 in published tokenizer_config.json."""


def read_json_object(
    file: Path, error: type[Phi3Error] = ConfigError, *, unique: bool = False
) -> dict[str, Any]:
    """Read the JSON object of a file that a stranger may have written.

    Every JSON file of a checkpoint, an adapter or a run is read here.

    Args:
        file: Must be there.
        error: What is raised.
        unique: Whether an object that has a key twice is no valid JSON.

    Raises:
        Phi3Error: It holds something else, or is too large or too deep to be read.
    """
    try:
        if (size := file.stat().st_size) > JSON_BYTES:
            raise error(f"{file} has {size} bytes: that is no configuration.")
        keys = strict_json(file.read_text(encoding="utf-8"), unique=unique)
    except OSError as problem:
        raise error(f"{file} cannot be read: {problem.strerror or problem}.") from problem
    except ValueError as problem:
        if isinstance(problem, Phi3Error):
            raise
        raise error(f"{file} is not valid JSON: {problem}. Download or copy it again.") from problem
    if not isinstance(keys, dict):
        raise error(f"{file} must hold a JSON object, not {type(keys).__name__}.")
    return keys


def strict_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Parse JSON that a stranger wrote; what comes back can be printed, compared and walked.

    Raises:
        ValueError: It is none, is nested deeper than `JSON_DEPTH`, has a number of more than
            `JSON_DIGITS` or, where they must be unique, a key twice. NaN is left to those who know
            the key.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys if unique else None,
            parse_int=_whole_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(JSON_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {JSON_DEPTH} deep")


def _whole_number(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON of which no key is there twice, since only the last would count.

    Raises:
        ValueError: One is.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:120]!r} is there twice")
    return unique


SIZES = [field.name for field in fields(Phi3Config) if field.name != "rope"]

USED = {
    *SIZES,
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}

REQUIRED_VALUES = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
"""Keys that may be absent, and the value we compute."""

IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys that do not change what a forward or backward pass computes."""


OTHER_MODELS = {
    "phi": "Phi-1, 1.5 and 2",
    "phi3small": "Phi-3-small",
    "phi3_v": "Phi-3-vision and Phi-3.5-vision",
    "phimoe": "Phi-3.5-MoE",
    "phi4flash": "Phi-4-mini-flash-reasoning, whose layers are Mamba's and differential attention",
    "phi4mm": "Phi-4-multimodal",
    "phi4_multimodal": "Phi-4-multimodal",
}
"""Models with Phi in their names that are built in another way, by their ``model_type``."""


def parse_config(keys: dict[str, Any], source: str = "config.json") -> Phi3Config:
    """Check the content of a config.json and keep what is used.

    Args:
        keys: The file's content.
        source: How error messages name the file.

    Raises:
        ConfigError: Any key is missing, unknown or not supported; all are listed.
    """
    kind = keys.get("model_type")
    if kind != "phi3":
        other = OTHER_MODELS.get(kind) if isinstance(kind, str) else None
        raise ConfigError(
            f"{source}: model_type is {kind!r}{f' ({other})' if other else ''}, expected 'phi3'. "
            "Only checkpoints that are built as Phi-3 is can be used here: Phi-3-mini and medium, "
            "Phi-3.5-mini, Phi-4, Phi-4-mini, and what was made of them, such as Phi-4-reasoning "
            "and Phi-4-mini-reasoning."
        )
    sizes: dict[str, Any] = {name: keys.get(name) for name in SIZES}
    sizes["num_key_value_heads"] = keys.get("num_key_value_heads") or keys.get(
        "num_attention_heads"
    )
    sizes["tie_word_embeddings"] = keys.get("tie_word_embeddings", False)
    problems, wrong_sizes = [*_wrong_keys(keys)], [*_wrong_sizes(sizes)]
    problems += wrong_sizes
    if not wrong_sizes:
        head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
        rope = _read_rope(keys, head_dim, problems)
    if problems:
        raise ConfigError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    return Phi3Config(rope=rope, **sizes)


def _wrong_keys(keys: Mapping[str, Any]) -> Iterator[str]:
    known = USED | IRRELEVANT | REQUIRED_VALUES.keys()
    for key, value in keys.items():
        if key not in known:
            yield (
                f"{key}: {value!r} is an unknown key, so what it changes would be ignored. "
                "Remove it if it is harmless."
            )
    for key, value in REQUIRED_VALUES.items():
        if key in keys and keys[key] != value:
            yield f"{key}: {spelled(keys[key])} is not supported yet; only {value!r} is."


LARGEST_SIZES = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 10,
    "num_hidden_layers": 1 << 10,
    "max_position_embeddings": 1 << 21,
    "original_max_position_embeddings": 1 << 21,
    "vocab_size": 1 << 23,
}
"""At least eight times what any published Phi-3 has. Memory is taken for what config.json says, and
no weight tells how many positions there are."""


def _wrong_sizes(sizes: Mapping[str, Any]) -> Iterator[str]:
    hints = get_type_hints(Phi3Config, include_extras=True)
    for key, value in sizes.items():
        yield from mistakes(key, value, hints[key])
        if key in LARGEST_SIZES and is_whole(value, least=LARGEST_SIZES[key] + 1):
            yield f"{key}: {_shortened(value)} must be at most {LARGEST_SIZES[key]}."
    for above, below in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        counts = sizes[above], sizes[below]
        if all(is_whole(count, least=1) for count in counts) and counts[0] % counts[1]:
            yield f"{above}: {counts[0]} must be a multiple of {below} ({counts[1]})."


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"a number of {len(text)} digits"


# Rotary positions. Older files have ``rope_theta`` and ``rope_scaling``, those that transformers 5
# saves one ``rope_parameters``; both come out alike.

ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "factor",
    "attention_factor",
}

LONG = ("longrope", "su", "yarn")
"""Names of the one scaling that Phi-3 has; the last two are those of April 2024."""

ORIGINAL = 4096
"""What transformers takes for ``original_max_position_embeddings`` where a file has none."""


def _read_rope(keys: Mapping[str, Any], head_dim: int, problems: list[str]) -> Rope:
    """Read what a config.json says of positions.

    Args:
        keys: The file's content; its sizes are right.
        head_dim: Width of one head.
        problems: Is told what is wrong, a line each; what is returned is of no use then.
    """
    # transformers prefers rope_scaling where a file has both
    names = ("rope_scaling", "rope_parameters")
    problems += [
        f"{name}: {keys[name]!r} must be an object or null."
        for name in names
        if not isinstance(keys.get(name), dict | None)
    ]
    filled = [name for name in names if isinstance(keys.get(name), dict) and keys[name]]
    name = filled[0] if filled else names[0]
    rope: dict[str, Any] = keys[name] if filled else {}
    problems += [f"{name}.{key}: {rope[key]!r} is an unknown key." for key in {*rope} - ROPE_KEYS]
    theta: Any = rope.get("rope_theta", keys.get("rope_theta"))
    if not is_positive(theta):
        problems.append(f"rope_theta: {theta!r} must be a number above 0.")
        theta = 1.0
    share = rope.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if not is_positive(share) or share > 1:
        problems.append(f"partial_rotary_factor: {share!r} must be above 0, at most 1.")
        share = 1.0
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        problems.append(f"partial_rotary_factor: {share!r} of {head_dim} is not an even number.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *LONG):
        problems.append(f"{name}.type: {kind!r} is not supported; only 'longrope' is.")
    if kind in LONG:
        problems += _wrong_scaling(rope, keys, name, rotary_dim // 2)
    if problems or kind not in LONG:
        return Rope(float(theta), rotary_dim)

    original = keys.get("original_max_position_embeddings", ORIGINAL)
    stretch = rope.get("factor") or keys["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        more = math.log(stretch) / math.log(original) if stretch > 1 else 0.0
        attention = math.sqrt(1 + more)
    short, long = (tuple(map(float, rope[key])) for key in ("short_factor", "long_factor"))
    return Rope(float(theta), rotary_dim, LongRoPE(short, long, original, attention))


def _wrong_scaling(
    rope: Mapping[str, Any], keys: Mapping[str, Any], name: str, pairs: int
) -> Iterator[str]:
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != pairs:
            count = len(factors) if isinstance(factors, list) else factors
            yield (
                f"{name}.{key}: {count!r} factors, expected {pairs}, one for each pair of rotated "
                "dimensions."
            )
        elif not all(map(is_positive, factors)):
            yield f"{name}.{key}: every factor must be a number above 0."
    original = keys.get("original_max_position_embeddings", ORIGINAL)
    if not is_whole(original, least=2):
        yield f"original_max_position_embeddings: {original!r} must be at least 2."
    elif original > (most := LARGEST_SIZES["original_max_position_embeddings"]):
        yield f"original_max_position_embeddings: {_shortened(original)} must be at most {most}."
    inner = rope.get("original_max_position_embeddings", original)
    if inner != original:
        yield (
            f"{name}.original_max_position_embeddings: {inner!r} differs from {original!r} at the "
            "top of the file, which transformers follows. Make them equal."
        )
    for key in ("factor", "attention_factor"):
        if rope.get(key) is not None and not is_positive(rope[key]):
            yield f"{name}.{key}: {rope[key]!r} must be a number above 0."


# At which tokens generation ends, read from a checkpoint's own files.

ENDS = ("<|end|>", "<|endoftext|>", "<|assistant|>", "<|im_end|>")
"""They close a turn, a conversation, or begin another turn. Phi-3's are 32007, 32000 and 32001."""

GENERATION = "generation_config.json"


def generation_config(checkpoint_dir: Path) -> dict[str, Any]:
    """Return generation_config.json of a checkpoint, with all its stop ids if it has one or none.

    Raises:
        ConfigError: A file is not valid JSON, or a stop is not a number.
    """
    keys, config = (read_json(checkpoint_dir / name) for name in (GENERATION, "config.json"))
    ids = _stop_ids(keys)
    if len(ids) > 1:
        return keys
    more = {*_stop_ids(config), *stop_tokens(checkpoint_dir).values()}
    named = ("bos_token_id", "pad_token_id")
    special: dict[str, Any] = {key: config[key] for key in named if key in config}
    return {**special, **keys, "eos_token_id": [*ids, *sorted(more.difference(ids))]}


def stop_tokens(checkpoint_dir: Path) -> dict[str, int]:
    """Return the tokens of a checkpoint that end generation, and their ids, in the ids' order.

    Raises:
        ConfigError: A tokenizer file is not valid JSON, or lists no tokens.
    """
    tokenizer_config = read_json(checkpoint_dir / "tokenizer_config.json")
    plain = read_json(checkpoint_dir / "added_tokens.json")
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    listed = read_json(checkpoint_dir / "tokenizer.json").get("added_tokens") or []
    try:
        added = {
            **{token: int(number) for token, number in plain.items()},
            **{token["content"]: int(number) for number, token in decoder.items()},
            **{token["content"]: int(token["id"]) for token in listed},
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{checkpoint_dir}: its files list added tokens in an unknown way: {error!r}. Download "
            "tokenizer.json, tokenizer_config.json and added_tokens.json again."
        ) from error
    eos = tokenizer_config.get("eos_token")
    ends = (*ENDS, eos.get("content") if isinstance(eos, dict) else eos)
    return {
        token: number
        for token, number in sorted(added.items(), key=lambda item: item[1])
        if token in ends
    }


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; one that is not there is empty.

    Raises:
        ConfigError: The file holds something else.
    """
    return read_json_object(file) if file.is_file() else {}


def _stop_ids(keys: Mapping[str, Any]) -> list[int]:
    ids = keys.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if wrong := [number for number in ids if type(number) is not int]:
        raise ConfigError(f"eos_token_id: {wrong[0]!r} must be a whole number.")
    return [*ids]
