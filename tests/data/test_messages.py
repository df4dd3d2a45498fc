"""Rows that list messages, as data sets really write them."""

import pytest

from phi3_plugin.data.formats import CALLS, FORMATS, SPEAKERS, MessageList
from phi3_plugin.errors import DataError

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "u"}
TOOLS = [{"name": "é"}]


def read(messages, name="messages", **row):
    key = "conversations" if name == "sharegpt" else "messages"
    return FORMATS[name].read({key: messages, **row})


@pytest.mark.parametrize("theirs", SPEAKERS)
def test_sharegpt_roles(theirs):
    turns = read([{"from": theirs, "value": "x"}, {"from": "gpt", "value": "y"}], "sharegpt")
    assert turns[0][:2] == (SPEAKERS[theirs], "x")
    assert turns[1] == ("assistant", "y", True, None, None)


def test_the_other_keys():
    theirs, ours = {"from": "gpt", "value": "x"}, {"role": "assistant", "content": "x"}
    for name in ("messages", "sharegpt"):
        for message in (theirs, ours, theirs | {"role": None, "content": None}):
            assert read([message], name)[0][:3] == ("assistant", "x", True)
    assert read([{"role": "human", "content": "x"}], "sharegpt")[0].role == "user"


def test_messages_take_every_role():
    assert read([{"role": "tool", "content": "42"}])[0][:3] == ("tool", "42", False)


def test_fields_without_effect():
    message = USER | {
        "id": 1,
        "name": "Bob",
        "tool_calls": None,
        "weight": None,
        "function_call": None,
    }
    assert read([message]) == read([USER])


def test_weight_and_train():
    turns = read([USER | {"weight": 0}, USER | {"train": True}, USER])
    assert [turn.wanted for turn in turns] == [False, True, None]


def test_parts():
    assert read([{"role": "user", "content": [{"type": "text", "text": "a"}]}])[0].content == "a"


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (TOOLS, '[{"name": "\\u00e9"}]'),
        ({"name": "f"}, '{"name": "f"}'),
        ("f(x)", "f(x)"),
        ("", ""),
        (None, None),
    ],
)
def test_tools_of_a_message_are_text_or_become_json(tools, text):
    assert read([SYSTEM | {"tools": tools}])[0].tools == text


def test_tools_of_a_row():
    text = '[{"name": "\\u00e9"}]'
    assert read([USER], tools=TOOLS)[0][:4] == ("system", "", False, text)
    turns = read([USER, SYSTEM, SYSTEM], tools=text)
    assert [turn.tools for turn in turns] == [None, text, None]
    for none in (None, [], "", "[]"):
        assert read([USER], tools=none) == read([USER])
    assert read([{"from": "human", "value": "u"}], "sharegpt", tools=TOOLS)[0].tools == text


def test_system_message_of_a_row():
    for name in ("system", "system_prompt"):
        assert [turn[:2] for turn in read([USER], **{name: "s"})] == [
            ("system", "s"),
            ("user", "u"),
        ]
        assert read([SYSTEM, USER], **{name: "s"}) == read([SYSTEM, USER])
        assert read([USER], **{name: ""}) == read([USER])
        with pytest.raises(DataError, match="a column for the system message and another"):
            read([SYSTEM, USER], **{name: "other"})
    with pytest.raises(DataError, match="a column for the system message and another"):
        read([USER], system="a", system_prompt="b")
    assert read([USER], system="s", tools="f")[0][:4] == ("system", "s", False, "f")


def test_calls_of_tools():
    format = MessageList("messages", "role", tool_calls="<|tool_call|>{}<|/tool_call|>")
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    written = '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>'
    for content, text in ((None, written), ("", written), ("Wait.", f"Wait.{written}")):
        message = {"role": "assistant", "content": content, "tool_calls": calls, "weight": 1}
        assert format.read({"messages": [message]}) == [("assistant", text, True, None, True)]
    message = {"role": "assistant", "tool_calls": calls}
    assert format.read({"messages": [message]})[0].content == written
    with pytest.raises(DataError, match="a message has tool_calls and is not the assistant's"):
        format.read({"messages": [message | {"role": "user"}]})


def test_calls_of_tools_in_sharegpt():
    format = MessageList("conversations", "from", mapped=True, tool_calls="<{}>")
    for value in ('{"name": "f", "arguments": {}}', '[{"name": "f", "arguments": {}}]'):
        row = {"conversations": [{"from": CALLS, "value": value}]}
        assert format.read(row)[0][:2] == ("assistant", '<[{"name": "f", "arguments": {}}]>')
    with pytest.raises(DataError, match="function_call is broken JSON"):
        format.read({"conversations": [{"from": CALLS, "value": "f()"}]})
    with pytest.raises(DataError, match="nothing says how to write them"):
        FORMATS["sharegpt"].read(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "there is no 'messages'; the keys are: $"),
        ({"messages": None}, "messages is null, expected a list"),
        ({"messages": "[]"}, "messages is str, expected a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "a message is str, expected an object"),
        ({"messages": [{"role": "user"}]}, "there is no 'content'; the keys are: role"),
        ({"messages": [{"content": "x"}]}, "there is no 'role'; the keys are: content"),
        ({"messages": [{"role": "user", "content": None}]}, "the user content is null"),
        ({"messages": [{"role": "user", "content": []}]}, "the user content is list"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the user content is list"),
        ({"messages": [{"role": "a b", "content": "x"}]}, "unknown role 'a b', expected a word"),
        ({"messages": [{"role": [], "content": "x"}]}, r"unknown role \[\]"),
        ({"messages": [{"role": None, "content": "x"}]}, "unknown role None"),
        ({"messages": [SYSTEM | {"tools": 3}]}, "tools of the system message is int, expected"),
        ({"messages": [SYSTEM | {"tools": [{1}]}]}, "tools cannot be written as JSON"),
        ({"messages": [USER | {"images": ["x"]}]}, "a message has images, which nothing reads"),
        (
            {"messages": [{"from": "alien", "value": "x"}]},
            "role 'alien', expected one of: human",
        ),
        ({"messages": [USER], "images": ["x"]}, "there is a column 'images', which nothing reads"),
        ({"messages": [USER], "tools": 3}, "tools of the system message is int"),
        ({"messages": [USER], "system": 3}, "the system content is int"),
        ({"messages": [SYSTEM | {"tools": "f"}], "tools": "g"}, "a system message that has tools"),
    ],
)
def test_bad_rows(row, says):
    with pytest.raises(DataError, match=says):
        FORMATS["messages"].read(row)
