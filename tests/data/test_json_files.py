"""Odd JSON: what is read, what is an error of one row, and what ends the file."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_plugin.data.sources import elements, is_spread, lines
from phi3_plugin.errors import DataError

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "1" * 5000

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def listed(text):
    return list(elements(text))


@given(values=st.lists(JSON, max_size=5), indent=st.none() | st.integers(0, 2), ascii=st.booleans())
def test_lists_are_what_json_reads(values, indent, ascii):
    assert listed(json.dumps(values, indent=indent, ensure_ascii=ascii)) == values


@given(text=st.text(alphabet='[]{},:"\\u0 1-.e\ntrufalsn', max_size=25))
def test_broken_lists_are_refused(text):
    """What Python reads is read; what it does not is an error."""
    text = f"[{text}"
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = listed(text)
    except json.JSONDecodeError:
        found = None
    assert found == expected or any(isinstance(value, DataError) for value in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", r"Expecting ',': line 1 "),
        ('[{"a": 1},\n\n{"a" 1}]', r"Expecting ':' delimiter: line 3 "),
        ('[{"a": 1}\n{"a": 1}]', r"Expecting ',': line 2 "),
        ("[1] 2", "Extra data after the list"),
        ("[1,]", r"Expecting value|Illegal trailing comma"),
        ('["a', "Unterminated string"),
        ("[", "Expecting value"),
        (f"[{DEEP}]", "nested too deeply"),
        (f'[{{"a": {{"b": 1, "b": 2}}, "c": {DEEP}}}]', "nested too deeply"),
        ('["a\nb"]', "Invalid control character"),
    ],
)
def test_where_a_list_is_broken(text, says):
    with pytest.raises(json.JSONDecodeError, match=says):
        listed(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{{"a": {DIGITS}}}', "broken JSON: Exceeds the limit"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "broken JSON: the key 'a' is there twice"),
        ('{"a": 1, "a": 1}', "broken JSON: the key 'a' is there twice"),
    ],
)
def test_what_json_allows_and_we_do_not_is_one_rows_error(text, says):
    found = [*listed(f"[1, {text}, 2]"), *(value for _, value in lines(["1", text, "2"]))]
    assert found[0::3] == [1, 1]
    assert found[2::3] == [2, 2]
    assert all(isinstance(value, DataError) and says in str(value) for value in found[1::3])


@pytest.mark.parametrize("line", [DEEP, '{"a": ' + DEEP + "}", '{"a"', "{'a': 1}", "\ufeff{}", "]"])
def test_a_broken_line_is_one_rows_error(line):
    (_, first), (_, error), (_, last) = lines(["1", line, "2"])
    assert (first, last) == (1, 2)
    assert isinstance(error, DataError)
    assert str(error).startswith("broken JSON: ")


def test_what_python_reads_though_json_has_it_not():
    (_, values) = next(lines(['[NaN, -Infinity, 1e999, "\\ud800"]']))
    assert str(values) == "[nan, -inf, inf, '\\ud800']"


def test_lines_are_those_of_the_stream():
    text = '1\r\n\n  \t\r2\r"a\u2028b\u0085"\n'
    found = list(lines(io.StringIO(text, newline=None)))
    assert found == [(1, 1), (4, 2), (5, "a\u2028b\u0085")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n "a": 1\n}\n', True),
        ('{\n "a": 1\n}\n{\n "a": 1\n}', True),
        ('{"a": {\n}, "a": 1}', True),
        ('{"a": 1}\n{\n}\n', False),
        ('{"a": "\\n"}\n\n', False),
        ('{"a": \n[1]\nnull', False),
        ("{\n", False),
        ("{", False),
        ("", False),
        ("{" + f'"a":\n{DEEP}' + "}", False),
    ],
)
def test_a_value_over_several_lines(text, expected):
    assert is_spread(text) is expected
