"""Which combinations `make test` runs; `make test-all` runs the rest as well."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest


def some(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return the values of a parametrization, those that are not quick marked exhaustive.

    Args:
        values: Of one parameter, or tuples of several; files are named by their stem.
        quick: Which of them every run takes.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=_name(value),
            marks=() if (_name(value) in quick or value in quick) else pytest.mark.exhaustive,
        )
        for value in values
    ]


def _name(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return "-".join(part.stem if isinstance(part, Path) else str(part) for part in parts)
