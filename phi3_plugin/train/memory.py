"""Amounts of memory, as a YAML writes and a terminal shows them, and when memory goes back."""

import ctypes
import re
from contextlib import suppress
from math import isfinite
from typing import Annotated, Any

from phi3_plugin.train.kinds import Kind

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
GIB = 2**30


def bytes_of(amount: Any) -> int | None:
    """Return the bytes of an amount like ``16GiB``, ``12.5 GB`` or 8000000000; None if it is none.

    Args:
        amount: Of any type, as a YAML may hold it.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float, str)):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) *([a-z]*)", str(amount).strip().lower())
    unit = UNITS.get(found[2].upper()) if found else None
    size = float(found[1]) * unit if found and unit else 0
    return int(size) or None if isfinite(size) else None


def in_gib(size: float) -> str:
    """Return bytes in GiB, as ``14.2``; small amounts keep a digit that says something."""
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def give_memory_back() -> None:
    """Let the memory of a tensor on the CPU go back to the system with the tensor.

    The C library keeps what blocks of up to 32 MiB took, in pieces that the next step's do not
    fit: a step of Phi-3-mini's width takes a sixth more memory, and is one hundredth faster.

    Source: glibc's ``mallopt(3)``, M_MMAP_THRESHOLD; other C libraries have no such choice.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


Memory = Annotated[
    str | int | float, Kind("an amount of memory: 16GiB, 12GB or a number of bytes", bytes_of)
]
