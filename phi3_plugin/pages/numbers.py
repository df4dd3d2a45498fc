"""How numbers are spelled, in pages and terminals: in one place, so that like looks like like."""

import math

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""In place of a number that there is not."""

HUGE = 1e12
"""From here on powers of ten are shorter."""


def number(value: float, digits: int = 0, *, signed: bool = False) -> str:
    """Write a number with a fixed precision, thousands set apart and a true minus.

    Args:
        value: What is not finite is a dash.
        digits: After the point; the same for all that stands in one row.
        signed: Whether a plus is written too.
    """
    if not math.isfinite(value):
        return NONE
    sign = "+" if signed else ""
    if abs(value) >= HUGE:
        text = f"{value:{sign}.2e}"
    else:
        value = round(value, digits) + 0.0  # there is no -0.00
        text = f"{value:{sign},.{digits}f}"
    return text.replace("-", MINUS)


def rounded(value: float, digits: int = 4) -> str:
    """Write a number with so many significant digits, for what differs by orders of magnitude.

    Zeros at the end are left out, and what is not finite is a dash.
    """
    if not math.isfinite(value) or abs(value) >= HUGE:
        return number(value)
    if 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}g}".replace("-", MINUS)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = number(value, places)
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """Write a share; what is not nothing, or not all, does not look like it."""
    if share <= 0 or share >= 1:
        return f"{100 * share:.0f} %"
    if share < 0.0005:
        return "<0.1 %"
    if share > 0.9995:
        return ">99.9 %"
    return f"{100 * share:.{0 if 0.0995 <= share < 0.995 else 1}f} %"


def count(many: int, one: str) -> str:
    """Write how many there are of something."""
    return f"{many:,} {one if many == 1 else one + 's'}"
