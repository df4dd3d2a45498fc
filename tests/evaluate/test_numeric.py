from decimal import Decimal

import pytest

from phi3_plugin.evaluate import last_number, marked_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("####1234.50\n", "1234.5"),
        ("#### $5", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 10 apples", "10"),
        ("#### 1\nno:\r\n#### 2\r\n", "2"),
        ("#### .5", "0.5"),
        ("#### 18.", "18"),
        ("#### about\n", None),
        ("#### 1 #### 2", "2"),
        ("#### 1 ####\n", "1"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("72", None),
        ("", None),
    ],
)
def test_marked(text, number):
    assert marked_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 4 and then 5", "4"),
        ("It is 4, not 5.", "5"),
        ("The answer is $1,234.00.", "1234"),
        ("2 + 3 = 5%", "5"),
        ("from 3-5", "5"),
        ("it is -5", "-5"),
        ("x=-7", "-7"),
        ("x = \N{MINUS SIGN}7", "-7"),
        ("#### 5 #### none", "5"),
        ("in 1,23", "23"),
        ("1,2345", "2345"),
        ("nothing", None),
        ("#### none", None),
    ],
)
def test_last(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_very_long_text_takes_no_time():
    assert last_number("1," * 200_000 + "7" * 4000) is not None
