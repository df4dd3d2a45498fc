"""Read a published Phi-3 ``config.json`` strictly.

Every key is either used, required to have the one value we implement, or known to
have no influence on training. Anything else is refused: a key that is skipped
silently is a model that is computed wrongly.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_plugin.errors import ConfigError, MissingFileError
from phi3_plugin.positions import Rope, read_rope

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Positive whole numbers that every file must state."""

USED = {
    *SIZES,
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
}

REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("phi3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "attention_dropout": (0.0,),
    "embd_pdrop": (0.0,),
    "resid_pdrop": (0.0,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
"""Keys that may be absent, and the values we compute."""

IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys that do not change what a forward or backward pass computes."""


@dataclass(frozen=True)
class Phi3Config:
    """The sizes and constants of one Phi-3 checkpoint, under Hugging Face's names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None
    """A query sees this many keys, itself included; None is plain causal attention."""
    tie_word_embeddings: bool = False
    """Whether the head computes with the embedding's weights and has none of its own."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused ``qkv_proj``: all query heads, then key heads, then value heads."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


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
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(keys).__name__}.")
    return parse_config(keys, str(file))


def checkpoint_folder(checkpoint_dir: str | Path | None) -> Path:
    """Return the checkpoint folder as a path.

    Raises:
        ConfigError: It is None, which is how the YAMLs say that the user must set it.
        MissingFileError: There is no such folder.
    """
    if checkpoint_dir is None:
        raise ConfigError(
            "checkpoint_dir is not set. Set it in the YAML or add "
            "checkpoint_dir=/path/to/Phi-3-mini-4k-instruct to the command."
        )
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise MissingFileError(
            f"checkpoint_dir: {folder} is not a folder. Download a checkpoint with "
            f"'tune download microsoft/Phi-3-mini-4k-instruct --output-dir {folder} "
            '--ignore-patterns ""\' or correct the path.'
        )
    return folder


def parse_config(keys: dict[str, Any], source: str = "config.json") -> Phi3Config:
    """Check the content of a config.json and keep what is used.

    Args:
        keys: The file's content.
        source: How error messages name the file.

    Raises:
        ConfigError: Any key is missing, unknown or not supported; all are listed.
    """
    if keys.get("model_type") != "phi3":
        raise ConfigError(
            f"{source}: model_type is {keys.get('model_type')!r}, expected 'phi3'. "
            "Only Phi-3 checkpoints can be used here."
        )
    values = {
        **keys,
        "num_key_value_heads": keys.get("num_key_value_heads") or keys.get("num_attention_heads"),
        "tie_word_embeddings": keys.get("tie_word_embeddings", False),
    }
    problems = _unknown(keys) + _unsupported(keys)
    wrong = _wrong_sizes(values)
    if not wrong:
        head_dim = values["hidden_size"] // values["num_attention_heads"]
        values["rope"], wrong = read_rope(keys, head_dim)
    if problems := problems + wrong:
        raise ConfigError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    fields: dict[str, Any] = {name: values.get(name) for name in Phi3Config.__annotations__}
    return Phi3Config(**fields)


def _unknown(keys: dict[str, Any]) -> list[str]:
    known = USED | IRRELEVANT | REQUIRED_VALUES.keys()
    return [
        f"{key}: {keys[key]!r} is an unknown key, so what it changes would be ignored. "
        "Remove it if it is harmless."
        for key in keys
        if key not in known
    ]


def _unsupported(keys: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {_short(keys[key])} is not supported yet; only {values[0]!r} is."
        for key, values in REQUIRED_VALUES.items()
        if key in keys and keys[key] not in values
    ]


def _wrong_sizes(values: dict[str, Any]) -> list[str]:
    whole = (*SIZES, "num_key_value_heads")
    problems = [
        f"{key}: {values.get(key)!r} must be a whole number above 0."
        for key in whole
        if not _is_whole(values.get(key))
    ]
    epsilon = values.get("rms_norm_eps")
    if not isinstance(epsilon, int | float) or epsilon <= 0:
        problems.append(f"rms_norm_eps: {epsilon!r} must be a number above 0.")
    if type(values["tie_word_embeddings"]) is not bool:
        problems.append(f"tie_word_embeddings: {values['tie_word_embeddings']!r} must be a bool.")
    window = values.get("sliding_window")
    if window is not None and not _is_whole(window):
        problems.append(f"sliding_window: {window!r} must be a whole number above 0, or null.")
    return problems or _indivisible(values)


def _indivisible(values: dict[str, Any]) -> list[str]:
    pairs = (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    )
    return [
        f"{above}: {values[above]} must be a multiple of {below} ({values[below]})."
        for above, below in pairs
        if values[above] % values[below]
    ]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
