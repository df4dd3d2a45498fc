"""What a message holds beside who speaks."""

import pytest

from phi3_plugin.data.formats import LOST, check_layout, check_lost, said, shown, wanted, with_calls
from phi3_plugin.errors import ConfigError, DataError

CALL = {"name": "f", "arguments": {"city": "Köln"}}
WRITTEN = '[{"name": "f", "arguments": {"city": "Köln"}}]'


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({}, None),
        ({"weight": None, "train": None}, None),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"weight": True}, True),
        ({"train": False}, False),
        ({"train": True, "weight": 1}, True),
    ],
)
def test_wanted(message, expected):
    assert wanted(message) is expected


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"weight": 0.5}, r"weight is 0\.5, expected 0 or 1"),
        ({"weight": "1"}, "weight is '1', expected 0 or 1"),
        ({"weight": float("nan")}, "weight is nan, expected 0 or 1"),
        ({"train": 1}, "train is 1, expected true or false"),
        ({"train": True, "weight": 0}, "weight is 0 and train is True: remove one"),
    ],
)
def test_not_wanted_so(message, says):
    with pytest.raises(DataError, match=says):
        wanted(message)


@pytest.mark.parametrize("name", LOST)
def test_fields_that_would_be_lost(name):
    with pytest.raises(DataError, match=f"a message has {name}, which nothing reads; "):
        check_lost({"role": "user", name: {"a": 1}})
    for blank in (None, "", [], {}):
        check_lost({name: blank, "id": 1, "name": "Bob", "timestamp": 3})


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert said("user", parts) == "a b"
    assert said("user", "text") == "text"


@pytest.mark.parametrize(
    ("parts", "form"),
    [
        (["a"], "'a'"),
        ([{"type": "image_url", "image_url": {}}], "'image_url'"),
        ([{"type": "text", "text": "a"}, {"text": "b"}], "None"),
        ([{"type": "text", "text": None}], "'text'"),
    ],
)
def test_other_parts(parts, form):
    with pytest.raises(DataError, match=f"the user content is list, .*; one part is {form}"):
        said("user", parts)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "1", "type": "function", "function": CALL},
        {"function": CALL | {"arguments": '{"city": "K\\u00f6ln"}'}},
        CALL | {"function": None},
    ],
)
def test_calls_are_written(call):
    assert with_calls(None, [call], "<{}>") == f"<{WRITTEN}>"
    assert with_calls("Wait. ", [call], "\\{}") == f"Wait. \\{WRITTEN}"


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ({"name": "f"}, "tool_calls is dict, expected a list"),
        (["f"], "a tool call has no name"),
        ([{"name": 1}], "a tool call has no name"),
        ([{"name": "f"}], "arguments of a tool call is null, expected an object"),
        ([{"name": "f", "arguments": "{"}], "arguments of a tool call is broken JSON"),
        ([{"name": "f", "arguments": "[" * 10**5}], "arguments of a tool call is broken JSON"),
        ([{"name": "f", "arguments": {"a": {1}}}], "tool_calls cannot be written as JSON"),
    ],
)
def test_broken_calls(calls, says):
    with pytest.raises(DataError, match=says):
        with_calls(None, calls, "{}")


def test_calls_that_nothing_writes():
    with pytest.raises(DataError, match=r"nothing says how to write them; set dataset\.tool_calls"):
        with_calls(None, [CALL], None)
    with pytest.raises(DataError, match="the content beside tool_calls is int"):
        with_calls(3, [CALL], "{}")


@pytest.mark.parametrize("layout", ["", "calls", "{}{}", 3, ["{}"]])
def test_layouts_that_cannot_be_filled(layout):
    with pytest.raises(ConfigError, match=r"dataset\.tool_calls: .* must be a text with one {}"):
        check_layout(layout)


def test_values_can_always_be_shown():
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert len(shown(nested)) < 50
    assert len(shown("x" * 10**6)) < 50
    shown({"\ud800": "\ud800"}).encode()
