"""Answers that are not to be learned: the row itself calls them bad, or rates them."""

import re
from collections.abc import Mapping
from typing import Any

from phi3_plugin.data.formats import (
    AnyCase,
    Columns,
    Format,
    NamedColumns,
    OpenAIPreference,
    PreferencePair,
    PromptText,
    ThoughtColumn,
)
from phi3_plugin.data.turns import short_repr
from phi3_plugin.errors import DataError

APPROVALS = (
    *("label", "kto_tag", "desirable", "is_desirable", "preferred", "is_preferred", "accepted"),
    *("is_accepted", "thumbs_up", "is_good", "liked"),
)
"""Columns that say whether an answer is wanted, as in data for KTO."""

RATINGS = (
    *("rating", "score", "thumbs", "stars", "reward", "feedback", "quality", "helpfulness"),
    *("correctness", "overall_score"),
)
"""Columns that say how good an answer is."""

SAYS_NO = (
    *("false", "no", "0", "-1", "bad", "undesirable", "rejected", "thumbs_down", "down"),
    *("negative", "dislike", "disliked"),
)


def refuse_unwanted(row: Mapping[str, Any], format: Format, filter: str | None) -> None:
    """Refuse an answer that the row itself calls a bad one, or whose rating nobody looked at.

    Args:
        row: As it was read.
        format: How it is read; in pairs of answers the better one is known.
        filter: Decides about the ratings that it names.

    Raises:
        DataError: The answer is not to be learned, or it is not said whether.
    """
    wrapped = AnyCase | NamedColumns | ThoughtColumn
    inner = format.format if isinstance(format, wrapped) else format
    naming = format if isinstance(format, NamedColumns) else inner
    names = naming.names if isinstance(naming, NamedColumns | Columns | PromptText) else {}
    label = names.get("label")
    if isinstance(inner, PreferencePair | OpenAIPreference):
        return
    for name, value in row.items():
        plain = "label" if name == label else name.strip().lower()
        if plain not in APPROVALS and plain not in RATINGS:
            continue
        if name != label and name in names.values():
            continue
        is_named = filter is not None and re.search(rf"\b{re.escape(name)}\b", filter)
        says_no = value is False or (isinstance(value, str) and value.strip().lower() in SAYS_NO)
        if plain in APPROVALS and (says_no or (value in (0, -1) and not is_named)):
            test = f"{name}.lower() is eq('true')" if isinstance(value, str) else name
            raise DataError(
                f"{name} is {short_repr(value)}: the answer is not to be learned; leave such rows "
                f'out, as with dataset.filter="{test}"'
            )
        if plain in RATINGS and not is_named and _is_rating(value):
            test = "ne" if isinstance(value, str) else "ge"
            raise DataError(
                f"there is a {name!r}, and nothing says which answers are good enough to be "
                f'learned; set dataset.filter, as in "{name} is {test}({short_repr(value)})", or '
                f'"{name} is defined" for all'
            )


def _is_rating(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*-?\d+([.,]\d+)?\s*", value)) or value.lower() in SAYS_NO
    return isinstance(value, int | float)
