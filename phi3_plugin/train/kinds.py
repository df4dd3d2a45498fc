"""What a setting may be: each kind of value, in words and as a test.

An annotation carries its kind, so that :class:`phi3_plugin.train.settings.Settings` reads as types
and is checked as rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import eq
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

REAL = (int, float)  # the types themselves: to isinstance, True is an int


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_component(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("_component_"), str)


def _is_resume(value: Any) -> bool:
    return isinstance(value, str) and (value in ("auto", "never") or Path(value).is_dir())


TEXT = Kind("text; put quotes around a number", lambda v: isinstance(v, str))
Text = Annotated[str, TEXT]
Folder = Annotated[Path, TEXT]
Texts = Annotated[list[str], Kind("a list of texts, as in ['one', 'two']", _is_texts)]
Resume = Annotated[str, Kind("auto, never or a checkpoint folder that exists", _is_resume)]
Count = Annotated[int, Kind("a whole number above 0", lambda v: type(v) is int and v > 0)]
Seed = Annotated[int, Kind("a whole number from 0 on", lambda v: type(v) is int and v >= 0)]
Positive = Annotated[float, Kind("a number above 0", lambda v: type(v) in REAL and 0 < v < inf)]
Share = Annotated[float, Kind("at least 0 and below 1", lambda v: type(v) in REAL and 0 <= v < 1)]
Switch = Annotated[bool, Kind("True or False", lambda v: type(v) is bool)]
Section = Annotated[dict[str, Any], Kind("a section", lambda v: isinstance(v, dict))]
Component = Annotated[dict[str, Any], Kind("a section with _component_", _is_component)]


def kinds_of(hint: Any) -> list[Kind]:
    """Return the kinds of value that an annotation allows."""
    if get_origin(hint) is Annotated:
        return [kind for kind in hint.__metadata__ if isinstance(kind, Kind)]
    if get_origin(hint) is Literal:
        return [Kind(word, partial(eq, word)) for word in get_args(hint)]
    if hint is NoneType:
        return [Kind("null", lambda value: value is None)]
    return [kind for part in get_args(hint) for kind in kinds_of(part)]
