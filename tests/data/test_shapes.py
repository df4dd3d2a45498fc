"""Rows that keep a conversation in columns."""

import pytest

from phi3_plugin.data.formats import FORMATS, NAMES_LISTED, Text, Written, key_names, pair
from phi3_plugin.errors import DataError

ALPACA = FORMATS["alpaca"]


def said(turns):
    return [turn[:3] for turn in turns]


@pytest.mark.parametrize(
    ("instruction", "extra", "text"),
    [
        ("Add.", "2, 3", "Add.\n Input: 2, 3"),
        (" Add.\n", " ", " Add.\n\n Input:  "),
        ("Add.", "", "Add."),
        ("Add.", None, "Add."),
        ("", "2", "\n Input: 2"),
    ],
)
def test_alpaca_text(instruction, extra, text):
    row = {"instruction": instruction, "input": extra, "output": "5", "id": 1}
    assert said(ALPACA.read(row)) == [("user", text, False), ("assistant", "5", True)]


def test_alpaca_with_a_system_message():
    row = {"instruction": "u", "output": "a", "system": "s"}
    assert said(ALPACA.read(row))[0] == ("system", "s", False)
    for blank in ("", None):
        assert len(ALPACA.read(row | {"system": blank})) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "x", "answer": None}, "the assistant content is null"),
        ({"question": "x", "answer": "\udc80"}, "not valid Unicode"),
        ({"question": "x", "answer": ["y"]}, "the assistant content is list"),
        ({"question": "x"}, "there is no 'answer'; the keys are: question"),
    ],
)
def test_bad_pairs(row, says):
    with pytest.raises(DataError, match=says):
        pair("question", "answer").read(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "x", "output": "y", "input": 3}, "input is int, expected a string"),
        ({"instruction": "x", "output": "y", "input": "\udc80"}, "not valid Unicode"),
        ({"instruction": "x", "output": "y", "system": [1]}, "system is list, expected a string"),
        ({"instruction": None, "output": "y", "input": "z"}, "the user content is null"),
    ],
)
def test_bad_alpaca(row, says):
    with pytest.raises(DataError, match=says):
        ALPACA.read(row)


def test_text():
    assert Text("text").read({"text": "<|user|>u"}) == Written("<|user|>u", None)
    with pytest.raises(DataError, match="the text content is null, expected a string"):
        Text("text").read({"text": None})
    with pytest.raises(DataError, match="not valid Unicode"):
        Text("text").read({"text": "\ud800"})


@pytest.mark.parametrize("name", ["system", "system_prompt", "tools"])
def test_text_beside_a_part_of_the_prompt(name):
    row = {"text": "<|system|>s<|user|>u"}
    for held in ("", None, [], "[]", "s", " s\n"):
        assert Text("text").read(row | {name: held}).text == row["text"]
    for lost in ("other", ["s"]):
        with pytest.raises(DataError, match=f"there is a '{name}' too, .* write it in the text"):
            Text("text").read(row | {name: lost})
    assert Text("text").read(row | {"input": "i", "context": "c"}).text == row["text"]
    with pytest.raises(DataError, match="there is a 'image' too"):
        Text("text").read(row | {"image": "s"})


def test_no_tools_written_as_json():
    row = {"question": "x", "answer": "y", "tools": "[]"}
    assert len(FORMATS["question_answer"].read(row)) == 2


def test_keys_can_always_be_shown():
    assert key_names({"a": 1, "\ud800": 2}) == "a, \\ud800"
    assert key_names(map(str, range(99))).count(",") == NAMES_LISTED
