"""The number that an answer ends in, as GSM8K writes and scores it."""

import re
from decimal import Decimal

MARK = "####"
"""GSM8K ends its answers in a line like ``#### 1,234``."""

NUMBER = re.compile(r"-?\$?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\$?\.\d+")


def marked_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``; None where there is none.

    Source: Cobbe et al. 2021, grade-school-math/dataset.py, ``extract_answer``; more than its
    ``-?[0-9.,]+`` the last mark counts, a ``$`` may stand before the number, and 5.0 is 5.
    """
    marked = [after for part in text.split(MARK)[1:] if (after := part.strip())]
    found = NUMBER.search(_plain(marked[-1].splitlines()[0])) if marked else None
    return _value(found[0]) if found else None


def last_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, or else the last number of a text."""
    if (marked := marked_number(text)) is not None:
        return marked
    text = _plain(text)
    found: list[re.Match[str]] = list(NUMBER.finditer(text))
    return _value(_unjoined(found[-1], text)) if found else None


def _plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")  # which models write as well


def _unjoined(found: re.Match[str], text: str) -> str:
    """Return a number without a minus that stands between two numbers, as in 3-5."""
    joins = found[0].startswith("-") and text[: found.start()][-1:].isalnum()
    return found[0][1:] if joins else found[0]


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
