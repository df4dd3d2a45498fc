"""Every Phi-3 checkpoint, small: the published config.json with nothing but sizes changed.

A head keeps its width and rotary factors, and a key/value head its number of query heads.
"""

import json

import pytest

from tests.assets import assets_dir
from tests.chosen import EVERYTHING
from tests.oracles import MEDIUM_4K, MINI_4K

FILES = {
    "mini-4k": "phi3-mini-4k-instruct",
    "mini-128k": "phi3-mini-128k-instruct",
    "3.5-mini": "phi3.5-mini-instruct",
    "medium-4k": "phi3-medium-4k-instruct",
    "phi-4-mini": "phi4-mini-instruct",
}
"""Whose config.json is at hand."""

_FACTORS = [1.0 + 0.37 * i for i in range(64)]

FIGURES = {
    "mini-128k-april": {
        **MINI_4K,
        "max_position_embeddings": 131072,
        "sliding_window": 262144,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.05] * 48,
            "long_factor": _FACTORS[:48],
        },
    },
    "medium-128k": {
        **MEDIUM_4K,
        "max_position_embeddings": 131072,
        "sliding_window": 131072,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.02] * 64,
            "long_factor": _FACTORS,
        },
    },
    "phi-4": {
        **MEDIUM_4K,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "pad_token_id": 100349,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "vocab_size": 100352,
    },
}
"""Of which only figures are known; the factors, which are not, are made up."""

FIGURES["phi-4-reasoning"] = {
    **FIGURES["phi-4"],
    "max_position_embeddings": 32768,
    "original_max_position_embeddings": 32768,
    "rope_theta": 500000,
}
"""And -plus; source: Lightning-AI/litgpt, litgpt/config.py, which cites their config.json."""

VARIANTS = [*FILES, *FIGURES]

LONG = ["mini-128k", "3.5-mini", "phi-4-mini", "mini-128k-april", "medium-128k"]
"""With LongRoPE, which turns at 4096 positions."""

ALIKE = ("mini-128k-april", "medium-128k")
"""Like 3.5-mini and phi-4-mini but for their numbers."""


def published(variant: str) -> dict:
    """Return the content of config.json, without the keys that name files."""
    if variant in FIGURES:
        return FIGURES[variant]
    if assets_dir() is None:
        pytest.skip("the published config.json files are not here")
    keys = json.loads((assets_dir() / "models" / FILES[variant] / "config.json").read_text())
    named = {"_name_or_path", "auto_map", "transformers_version"}
    return {key: value for key, value in keys.items() if key not in named}


def sizes(variant: str) -> dict:
    """Return sizes that a test can afford."""
    keys = published(variant)
    width = keys["hidden_size"] // keys["num_attention_heads"]
    group = keys["num_attention_heads"] // keys["num_key_value_heads"]
    heads = max(group, 2)
    return {
        "hidden_size": heads * width,
        "intermediate_size": 256,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "num_hidden_layers": 2,
        "vocab_size": 160,
        "bos_token_id": 1,
        "eos_token_id": 150,
        "pad_token_id": 150,
    }


def lengths(variant: str) -> list[int]:
    """Return lengths on both sides of every threshold that a test can reach.

    On its near side the nearest, and under ``make test-all`` one more. Of `ALIKE` ``make test``
    takes the far side alone.
    """
    keys = published(variant)
    around = (-1, 0, 1) if EVERYTHING else (1,) if variant in ALIKE else (0, 1)
    edges = [keys["sliding_window"], keys["original_max_position_embeddings"]]
    reached = {edge + d for edge in edges if edge and edge <= 4096 for d in around}
    return [1, 17, *sorted(n for n in reached if n <= keys["max_position_embeddings"])]
