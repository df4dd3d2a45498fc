"""Of a better and a worse answer the better one is read, in all the ways such rows are written."""

import pytest

from phi3_plugin.data.formats import FORMATS
from phi3_plugin.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
MORE = [USER, ASSISTANT, USER, ASSISTANT]
PAIR = [("user", "u"), ("assistant", "a")]
PROMPT = "\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant:"


def read(**row):
    return [turn[:2] for turn in FORMATS["preference"].read({"rejected": "b", **row})]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "u", "chosen": "a"}, PAIR),
        ({"question": "u", "chosen": "a", "system": "s"}, [("system", "s"), *PAIR]),
        ({"prompt": [USER], "chosen": "a"}, PAIR),
        ({"prompt": "u", "chosen": [ASSISTANT]}, PAIR),
        ({"prompt": [USER], "chosen": [ASSISTANT]}, PAIR),
        ({"prompt": "u", "chosen": [USER, ASSISTANT]}, PAIR),
        ({"prompt": "a summary", "chosen": MORE}, PAIR * 2),
        ({"prompt": None, "chosen": MORE}, PAIR * 2),
        ({"chosen": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, PAIR),
        ({"chosen": f"{PROMPT} a"}, PAIR * 2),
        ({"prompt": PROMPT, "chosen": " a"}, PAIR * 2),
        ({"prompt": PROMPT, "chosen": f"{PROMPT} a"}, PAIR * 2),
        ({"prompt": "\n\nHuman: u", "chosen": "a"}, PAIR),
        ({"prompt": "u", "chosen": "a", "context": "", "history": []}, PAIR),
    ],
)
def test_shapes(row, turns):
    assert read(**row) == turns


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "a"}, "chosen has no prompt before it; the keys are: rejected, chosen"),
        ({"chosen": [ASSISTANT], "prompt": ""}, "chosen has no prompt before it"),
        ({"chosen": "a", "prompt": "u", "input": "i"}, "the prompt may be any of: prompt, input"),
        ({"chosen": None, "prompt": "u"}, "chosen is null, expected a text or a list of messages"),
        ({"chosen": [], "prompt": "u"}, "chosen is empty"),
        ({"chosen": "a", "prompt": 3}, "the user content is int"),
        ({"chosen": "a", "prompt": {"a": 1}}, "the user content is dict"),
        ({"prompt": "u"}, "chosen is null"),
        ({"prompt": "u", "chosen": "a", "image": "x.png"}, "there is a column 'image'"),
        ({"prompt": "u", "chosen": "a", "context": "c"}, "there is a 'context' too, which this"),
        ({"prompt": "u", "chosen": MORE, "history": ["h"]}, "there is a 'history' too, .*columns"),
    ],
)
def test_bad_rows(row, says):
    with pytest.raises(DataError, match=says):
        read(**row)
