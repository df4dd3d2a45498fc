"""Which combinations and how many examples `make test` runs; `make test-all` runs them all."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

EVERYTHING = os.environ.get("PHI3_COLD") == "1"
"""Whether this is `make test-all`."""


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


def examples(number: int) -> settings:
    """Return the settings of hypothesis for that many examples, of which `make test` tries a third.

    They are other ones in each run.
    """
    number = number if EVERYTHING else number // 3
    health = list(HealthCheck)
    return settings(max_examples=number, deadline=None, suppress_health_check=health)


def _name(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return "-".join(part.stem if isinstance(part, Path) else str(part) for part in parts)
