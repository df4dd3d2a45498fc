"""The plain words of Microsoft's inference notebook."""

import pytest

from phi3_plugin.data.formats import FORMATS
from phi3_plugin.errors import DataError

NOTEBOOK = {"system": "system\n", "human": "\nuser\n", "gpt": "\nassistant\n"}


def read(*messages):
    row = {"conversations": [{"from": who, "value": what} for who, what in messages]}
    return FORMATS["sharegpt_plain"].read(row)


@pytest.mark.parametrize(
    "messages",
    [
        [("system", "s"), ("human", "u"), ("gpt", "a"), ("human", "v\n"), ("gpt", "")],
        [("gpt", "é中")],
        [("human", "assistant\n"), ("gpt", " assistant\n ")],
    ],
)
def test_text_is_the_notebooks(messages):
    written = read(*messages)
    assert written.text == "".join(f"{NOTEBOOK[who]} {what}\n" for who, what in messages)
    assert written.eos
    said = [written.text[start:end] for start, end in written.said]
    assert said == [f" {what}" for who, what in messages if who == "gpt"]
    places = [place for span in written.said for place in span]
    assert places == sorted(places)


def test_what_has_no_plain_word():
    with pytest.raises(DataError, match="no plain word for the role 'tool'"):
        read(("observation", "x"))
    row = {"conversations": [{"from": "gpt", "value": "x", "weight": 0}]}
    with pytest.raises(DataError, match="tools, weight or train, which this format drops"):
        FORMATS["sharegpt_plain"].read(row)
