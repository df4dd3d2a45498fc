"""How a ``config.json`` says that positions are encoded: rotary frequencies and LongRoPE.

Older files have ``rope_theta`` and ``rope_scaling``, those that transformers 5 saves one
``rope_parameters``; both come out alike here.

Source: transformers 5.23, ``Phi3Config`` and ``modeling_rope_utils``; Ding et al. 2024, LongRoPE.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLAIN = "default"
LONG = ("longrope", "su", "yarn")
"""Names of the one scaling that Phi-3 has; the last two are those of April 2024."""

ORIGINAL = 4096
"""What transformers takes for ``original_max_position_embeddings`` where a file has none."""

KNOWN = {
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


def read_rope(keys: Mapping[str, Any], head_dim: int) -> tuple[Rope | None, list[str]]:
    """Read what a config.json says of positions.

    Args:
        keys: The file's content; its sizes are right.
        head_dim: Width of one head.

    Returns:
        The rotary positions, or None and what is wrong, a line each.
    """
    rope, name = _section(keys)
    problems = [f"{name}.{key}: {rope[key]!r} is an unknown key." for key in {*rope} - KNOWN]
    theta = rope.get("rope_theta", keys.get("rope_theta"))
    if not _is_positive(theta):
        problems.append(f"rope_theta: {theta!r} must be a number above 0.")
    share = rope.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if not _is_positive(share) or share > 1:
        return None, [*problems, f"partial_rotary_factor: {share!r} must be above 0, at most 1."]
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        problems.append(f"partial_rotary_factor: {share!r} of {head_dim} is not an even number.")
    kind = rope.get("rope_type", rope.get("type", PLAIN))
    if kind not in (PLAIN, *LONG):
        problems.append(f"{name}.type: {kind!r} is not supported; only 'longrope' is.")
    if kind in LONG:
        problems += _wrong_scaling(rope, keys, name, rotary_dim // 2)
    if problems:
        return None, problems
    return Rope(float(theta), rotary_dim, _scaling(rope, keys) if kind in LONG else None), []


def _section(keys: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    # transformers prefers rope_scaling where a file has both
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(keys.get(name), dict) and keys[name]:
            return keys[name], name
    return {}, "rope_scaling"


def _wrong_scaling(
    rope: Mapping[str, Any], keys: Mapping[str, Any], name: str, pairs: int
) -> list[str]:
    problems = []
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != pairs:
            found = len(factors) if isinstance(factors, list) else factors
            problems.append(f"{name}.{key}: {found!r} factors, expected {pairs}, one for each "
                            "pair of rotated dimensions.")  # fmt: skip
        elif not all(map(_is_positive, factors)):
            problems.append(f"{name}.{key}: every factor must be a number above 0.")
    original = keys.get("original_max_position_embeddings", ORIGINAL)
    if type(original) is not int or original < 2:
        problems.append(f"original_max_position_embeddings: {original!r} must be at least 2.")
    inner = rope.get("original_max_position_embeddings", original)
    if inner != original:
        problems.append(
            f"{name}.original_max_position_embeddings: {inner!r} differs from {original!r} at the "
            "top of the file, which transformers follows. Make them equal."
        )
    problems += [
        f"{name}.{key}: {rope[key]!r} must be a number above 0."
        for key in ("factor", "attention_factor")
        if rope.get(key) is not None and not _is_positive(rope[key])
    ]
    return problems


def _scaling(rope: Mapping[str, Any], keys: Mapping[str, Any]) -> LongRoPE:
    original = keys.get("original_max_position_embeddings", ORIGINAL)
    stretch = rope.get("factor") or keys["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        more = math.log(stretch) / math.log(original) if stretch > 1 else 0.0
        attention = math.sqrt(1 + more)
    short, long = (tuple(map(float, rope[key])) for key in ("short_factor", "long_factor"))
    return LongRoPE(short, long, original, attention)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
