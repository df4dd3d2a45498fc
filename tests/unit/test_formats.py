"""Rows of every format, as data sets really write them, and how a format is told."""

import json

import pytest

from phi3_plugin.data.formats import (
    CALLS,
    FORMATS,
    SHAREGPT_ROLES,
    UNREAD_FIELDS,
    AnyCase,
    pick_format,
)
from phi3_plugin.data.thoughts import THOUGHT_FIELDS
from phi3_plugin.data.turns import NAMES_LISTED, Reads, Written, key_names, make_turn, short_repr
from phi3_plugin.data.unwanted import refuse_unwanted
from phi3_plugin.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = [("user", "u"), ("assistant", "a")]
TOOLS, TOOLS_TEXT = [{"name": "é"}], '[{"name": "\\u00e9"}]'
CALL = {"name": "f", "arguments": {"city": "Köln"}}
CALL_TEXT = '[{"name": "f", "arguments": {"city": "Köln"}}]'

ROWS = {
    "messages": {"messages": [USER, ASSISTANT], "prompt": "only a note beside messages"},
    "sharegpt": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    "conversation": {"conversation": [USER, ASSISTANT], "conversation_id": "x", "turn": 1},
    "openai_preference": {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [USER],
    },
    "dolly": {"instruction": "u", "context": "", "response": "a", "category": "qa"},
    "preference": {"prompt": "u", "chosen": "a", "rejected": "b"},
    "messages_preference": {"messages": [USER], "chosen": "a", "rejected": "b"},
    "sharegpt_preference": {
        "conversations": [{"from": "human", "value": "u"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "alpaca": {"instruction": "u", "output": "a"},
    "question_answer": {"question": "u", "answer": "a", "id": 3},
    "prompt_response": {"prompt": "u", "response": "a"},
    "prompt_completion": {"prompt": "u", "completion": "a"},
    "instruction_response": {"instruction": "u", "response": "a"},
    "query_response": {"query": "u", "response": "a"},
    "input_output": {"input": "u", "output": "a"},
    "text": {"text": "<|user|>u"},
}


def read(row, name=None, columns=None, **options):
    return pick_format(name, columns, [row], **options).read(row)


def spoken(turns):
    return [turn[:2] for turn in turns]


def messages(*listed, name="messages", tool_calls=None, thoughts=None, **row):
    key = "conversations" if name == "sharegpt" else "messages"
    return read({key: list(listed), **row}, name, tool_calls=tool_calls, thoughts=thoughts)


def refused(says, read, *args, **options):
    with pytest.raises(DataError, match=says):
        read(*args, **options)


# Which format rows have


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognized_and_named(name):
    row = ROWS[name]
    assert pick_format(None, None, [row] * 3) is FORMATS[name]
    if name != "text":
        expected = [("user", "u", False), ("assistant", "a", True)]
        assert [t[:3] for t in read(row)] == [t[:3] for t in read(row, name)] == expected


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ROWS["messages"] | {"prompt": "u", "prompt_id": "1"}, "messages"),
        (ROWS["messages"] | ROWS["question_answer"], "messages"),
        (ROWS["messages"] | ROWS["preference"], "messages"),
        (ROWS["sharegpt"] | ROWS["alpaca"] | ROWS["text"], "sharegpt"),
        (ROWS["alpaca"] | {"input": "", "text": "all of it again"}, "alpaca"),
        (ROWS["preference"] | {"question": None}, "preference"),
        ({"messages": None, "tools": None} | ROWS["question_answer"], "question_answer"),
        ({"context": None, "input": None} | ROWS["prompt_response"], "prompt_response"),
        ({"instruction": None} | ROWS["input_output"], "input_output"),
    ],
)
def test_which_format_goes_before_others(row, name):
    for rows in ([row], [row] * 10):
        assert pick_format(None, None, rows) is FORMATS[name]


def test_alpaca_rows_with_and_without_input_are_one_format():
    rows = [{"instruction": "u", "output": "a"}, {"instruction": "u", "input": "i", "output": "a"}]
    for ordered in (rows, rows[::-1]):
        assert pick_format(None, None, ordered) is FORMATS["alpaca"]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("alpaca", "context"),
        ("question_answer", "image"),
        ("prompt_response", "system_prompt"),
        ("prompt_completion", "tools"),
        ("instruction_response", "input"),
    ],
)
def test_a_column_of_the_prompt_is_not_dropped_silently(name, extra):
    row = ROWS[name] | {extra: "x"}
    with pytest.raises(DataError, match=rf"the format of the rows .* {extra}\. Known") as error:
        pick_format(None, None, [row])
    assert extra in str(error.value).splitlines()[-1]
    refused(rf"there is a '{extra}' too, .*dataset\.columns", read, row, name)
    for blank in ("", None, [], "[]"):
        assert read(ROWS[name] | {extra: blank}, name) == read(ROWS[name])


def test_columns_can_be_named():
    row = {"hint": "s", "ask": "u", "reply": "a"}
    columns = {"assistant": "reply", "user": "ask", "system": "hint"}
    assert spoken(read(row, columns=columns)) == [("system", "s"), *PAIR]


@pytest.mark.parametrize("row", [{"note": "t"}, {"instruction": "i", "input": "x"}, {"q": 1}, {}])
def test_unrecognized_rows(row):
    with pytest.raises(DataError) as error:
        pick_format(None, None, [row])
    assert f"their keys are: {', '.join(row)}." in str(error.value)
    for known in (
        "\n  sharegpt (conversations: [{from, value}])\n",
        "\n  question_answer (question, answer)\n",
        "\n  alpaca (instruction, output and perhaps input and system)\n",
    ):
        assert known in str(error.value)
    assert "dataset.columns" in str(error.value)


def test_rows_that_differ_are_not_recognized():
    with pytest.raises(DataError, match="keys are: question, answer, id, prompt, response"):
        pick_format(None, None, [ROWS["question_answer"], ROWS["prompt_response"]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("messages", "sharegpt"),
        ("question_answer", "prompt_response"),
        ("preference", "prompt_response"),
    ],
)
def test_rows_that_fit_twice(one, other):
    row = ROWS[one] | ROWS[other]
    refused(rf"several formats: {one}, {other}\. Choose one with", pick_format, None, None, [row])
    assert spoken(read(row, one)) == spoken(read(row, other))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": None}, "messages is null, expected a list"),
        ({"question": "x", "answer": None}, "the assistant content is null"),
        ({"question": None, "answer": None}, "the user content is null"),
    ],
)
def test_nulls_are_named_where_nothing_else_fits(row, says):
    refused(says, read, row)


# Rows of columns


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
    assert spoken(read(row, "alpaca")) == [("user", text), ("assistant", "5")]


def test_alpaca_with_a_system_message():
    row = ROWS["alpaca"] | {"system": "s"}
    assert read(row)[0][:3] == ("system", "s", False)
    for blank in ("", None):
        assert len(read(row | {"system": blank})) == 2


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("question_answer", {"question": "x", "answer": "\udc80"}, "not valid Unicode"),
        ("question_answer", {"question": "x", "answer": ["y"]}, "the assistant content is list"),
        ("question_answer", {"question": "x"}, "there is no 'answer'; the keys are: question"),
        ("alpaca", ROWS["alpaca"] | {"input": 3}, "input is int, expected a string"),
        ("alpaca", ROWS["alpaca"] | {"input": "\udc80"}, "not valid Unicode"),
        (
            "alpaca",
            ROWS["alpaca"] | {"system": [1]},
            "the system content is list, expected a string",
        ),
        ("alpaca", ROWS["alpaca"] | {"instruction": None}, "the user content is null"),
        ("text", {"text": None}, "the text content is null, expected a string"),
        ("text", {"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_bad_rows_of_columns(name, row, says):
    refused(says, read, row, name)


@pytest.mark.parametrize("name", ["system", "system_prompt", "tools"])
def test_text_beside_a_part_of_the_prompt(name):
    row = {"text": "<|system|>s<|user|>u"}
    for held in ("", None, [], "[]", "s", " s\n"):
        assert read(row | {name: held}, "text") == Written(row["text"], None)
    for lost in ("other", ["s"]):
        says = f"there is a '{name}' too, .* write it in the text"
        refused(says, read, row | {name: lost}, "text")
    assert read(row | {"input": "i", "context": "c"}, "text").text == row["text"]
    refused("there is a 'image' too", read, row | {"image": "s"}, "text")


# Rows of messages


@pytest.mark.parametrize("theirs", SHAREGPT_ROLES)
def test_sharegpt_roles(theirs):
    listed = [{"from": theirs, "value": "x"}, {"from": "gpt", "value": "y"}]
    turns = messages(*listed, name="sharegpt")
    assert turns[0][:2] == (SHAREGPT_ROLES[theirs], "x")
    assert turns[1][:5] == ("assistant", "y", True, None, None)


def test_the_other_keys():
    theirs, ours = {"from": "gpt", "value": "x"}, {"role": "assistant", "content": "x"}
    for name in ("messages", "sharegpt"):
        for message in (theirs, ours, theirs | {"role": None, "content": None}):
            assert messages(message, name=name)[0][:3] == ("assistant", "x", True)
    assert messages({"role": "human", "content": "x"}, name="sharegpt")[0].role == "user"
    assert messages({"role": "tool", "content": "42"})[0][:3] == ("tool", "42", False)


def test_fields_without_effect():
    blank = {"tool_calls": None, "weight": None, "function_call": None, "images": []}
    assert messages(USER | {"id": 1, "name": "Bob", "timestamp": 3} | blank) == messages(USER)


@pytest.mark.parametrize("name", UNREAD_FIELDS)
def test_fields_that_would_be_lost(name):
    refused(f"a message has {name}, which nothing reads; ", messages, USER | {name: {"a": 1}})


@pytest.mark.parametrize("name", THOUGHT_FIELDS)
def test_a_thought_is_written_in_front_of_the_answer(name):
    listed = [USER, ASSISTANT | {name: " t\n"}]
    (_, said) = messages(*listed, thoughts="<t>{}</t>")
    assert (said.content, said.thought) == ("<t> t\n</t>a", None)
    (_, said) = messages(USER, ASSISTANT | {name: "t", "tool_calls": [CALL]}, **WRITTEN)
    assert said.content == f"<t>t</t>a<c>{CALL_TEXT}</c>"
    refused("a message has a thought, and .* set dataset.thoughts, as in", messages, *listed)


WRITTEN = {"thoughts": "<t>{}</t>", "tool_calls": "<c>{}</c>"}


@pytest.mark.parametrize("fields", [{"reasoning": " "}, {"thinking": None, "reasoning": ""}])
def test_a_thought_that_is_blank_is_none(fields):
    assert messages(USER, ASSISTANT | fields) == messages(USER, ASSISTANT)


@pytest.mark.parametrize("read_name", ["reasoning_content", "thinking"])
def test_a_thought_that_the_template_reads_is_apart(read_name):
    row = {"messages": [USER, ASSISTANT | {"reasoning": "t", "name": "n"}]}
    reads = Reads(frozenset({read_name, "role", "name"}))
    said = read(row, reads=reads)[1]
    assert (said.content, said.thought, said.fields) == ("a", "t", '{"name": "n"}')
    assert read(row, reads=reads, thoughts="<t>{}</t>")[1].content == "<t>t</t>a"  # as was asked


def test_the_same_thought_under_several_names():
    details = {"reasoning_details": [{"text": "t"}]}
    fields = {"reasoning": "t", "reasoning_content": "t", **details}
    assert messages(ASSISTANT | fields, thoughts="{} ")[0].content == "t a"
    for more, says in (
        (details, "reasoning_details, which nothing reads; write it as reasoning_content"),
        ({"reasoning": "t", "thinking": "u"}, "reasoning and thinking, which differ; remove one"),
        ({"thinking": ["t"]}, "thinking is list, expected a string"),
        ({"reasoning": "\ud800"}, "the thought of the assistant message is not valid Unicode"),
    ):
        refused(says, messages, ASSISTANT | more, thoughts="{}")


def test_a_column_of_thoughts():
    row = {"Q": "u", "CoT": "t", "A": "a", "id": 1, "label": True}
    columns = {"user": "Q", "assistant": "A", "thought": "CoT"}
    format = pick_format(None, columns, [row], thoughts="<t>{}</t>")
    assert format.fits(row) and not format.fits({"Q": "u", "A": "a"})
    assert spoken(format.read(row)) == [("user", "u"), ("assistant", "<t>t</t>a")]
    assert spoken(format.read(row | {"CoT": None})) == PAIR
    assert format.unread(row) == ["id", "label"]
    refuse_unwanted(row, format, None)
    apart = pick_format(None, columns, [row], reads=Reads(frozenset({"thinking"})))
    assert apart.read(row)[1].thought == "t"
    asked = {"assistant": "A", "thought": "CoT"}
    format = pick_format(None, asked, [row], prompt="Say {Q}", thoughts="{} ")
    assert spoken(format.read(row)) == [("user", "Say u"), ("assistant", "t a")]
    assert str(format) == "Q, A, CoT"
    refused("set dataset.thoughts", read, row, None, columns)


def test_thoughts_that_belong_nowhere():
    refused("the user message has a thought", messages, USER | {"thinking": "t"}, thoughts="{}")
    twice = {"content": "\n<think>t</think>a", "reasoning": "t"}
    refused(
        "has its thought in a field, and <think> in", messages, ASSISTANT | twice, thoughts="{}"
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"weight": True}, True),
        ({"train": False}, False),
        ({"train": True, "weight": 1}, True),
        ({"train": None}, None),
        ({"train": 1}, True),
        ({"loss": False}, False),
        ({"trainable": False}, False),
        ({"training": True}, True),
        ({"loss_mask": 0}, False),
        ({"masked": True}, False),
        ({"masked": False, "loss": True}, True),
    ],
)
def test_weight_and_train(fields, expected):
    assert messages(USER | fields)[0].wanted is expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": -0.5}, r"weight is -0\.5, expected 0 or 1, false or true, or a number from"),
        ({"weight": "1"}, "weight is '1', expected 0 or 1"),
        ({"weight": float("nan")}, "weight is nan, expected 0 or 1"),
        ({"loss": 0.5}, r"loss is 0\.5, expected 0 or 1, false or true"),
        ({"masked": True, "train": True}, "train is True and masked is True: remove one"),
        ({"train": True, "weight": 0}, "weight is 0 and train is True: remove one"),
    ],
)
def test_bad_weight_and_train(fields, says):
    refused(says, messages, USER | fields)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert messages({"role": "user", "content": parts})[0].content == "a b"


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
    says = f"the user content is list, .*; one part is {form}"
    refused(says, messages, {"role": "user", "content": parts})


@pytest.mark.parametrize(
    ("tools", "text"),
    [(TOOLS, TOOLS_TEXT), ({"name": "f"}, '{"name": "f"}'), ("f(x)", "f(x)"), ("", "")],
)
def test_tools_of_a_message_are_text_or_become_json(tools, text):
    assert messages(SYSTEM | {"tools": tools})[0].tools == text


def test_tools_of_a_row():
    assert messages(USER, tools=TOOLS)[0][:4] == ("system", "", False, TOOLS_TEXT)
    turns = messages(USER, SYSTEM, SYSTEM, tools=TOOLS_TEXT)
    assert [turn.tools for turn in turns] == [None, TOOLS_TEXT, None]
    for none in (None, [], "", "[]"):
        assert messages(USER, tools=none) == messages(USER)
    human = {"from": "human", "value": "u"}
    assert messages(human, name="sharegpt", tools=TOOLS)[0].tools == TOOLS_TEXT


def test_system_message_of_a_row():
    for name in ("system", "system_prompt"):
        assert spoken(messages(USER, **{name: "s"})) == [("system", "s"), ("user", "u")]
        assert messages(SYSTEM, USER, **{name: "s"}) == messages(SYSTEM, USER)
        assert messages(USER, **{name: ""}) == messages(USER)
        refused("a column for the system message", messages, SYSTEM, USER, **{name: "other"})
    refused("a column for the system message", messages, USER, system="a", system_prompt="b")
    assert messages(USER, system="s", tools="f")[0][:4] == ("system", "s", False, "f")


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "1", "type": "function", "function": CALL},
        {"function": CALL | {"arguments": '{"city": "K\\u00f6ln"}'}},
        CALL | {"function": None},
    ],
)
def test_calls_of_tools_are_written(call):
    message = {"role": "assistant", "tool_calls": [call], "weight": 1}
    for content, before in (({}, ""), ({"content": None}, ""), ({"content": "Wait. "}, "Wait. ")):
        (turn,) = messages(message | content, tool_calls="\\<{}>")
        assert turn[:5] == ("assistant", f"{before}\\<{CALL_TEXT}>", True, None, True)
    refused("is not the assistant's", messages, message | {"role": "user"}, tool_calls="{}")
    refused(r"set dataset\.tool_calls", messages, message)
    assert pick_format(None, None, [ROWS["alpaca"]], tool_calls="{}") == FORMATS["alpaca"]


def test_calls_of_tools_in_sharegpt():
    for value in ('{"name": "f", "arguments": {}}', '[{"name": "f", "arguments": {}}]'):
        message = {"from": CALLS, "value": value}
        (turn,) = messages(message, name="sharegpt", tool_calls="<{}>")
        assert turn[:2] == ("assistant", '<[{"name": "f", "arguments": {}}]>')
    refused("nothing says how to write them", messages, message, name="sharegpt")
    broken = {"from": CALLS, "value": "f()"}
    refused("is broken JSON", messages, broken, name="sharegpt", tool_calls="<{}>")


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ({"name": "f"}, "tool_calls is dict, expected a list"),
        (["f"], "a tool call has no name"),
        ([{"name": 1}], "a tool call has no name"),
        ([{"name": "f"}], "arguments of a tool call is null, expected an object"),
        ([{"name": "f", "arguments": "{"}], "arguments of a tool call is broken JSON"),
        ([{"name": "f", "arguments": '{"a": 1, "a": 2}'}], "broken JSON: 'a' is there twice"),
        ([{"name": "f", "arguments": '{"a": NaN}'}], "cannot be written as JSON"),
        ([{"name": "f", "arguments": {"a": float("nan")}}], "tool_calls cannot be written as JSON"),
        ([{"name": "f", "arguments": "[" * 10**5}], "arguments of a tool call is broken JSON"),
        ([{"name": "f", "arguments": {"a": {1}}}], "tool_calls cannot be written as JSON"),
    ],
)
def test_broken_calls(calls, says):
    refused(says, messages, {"role": "assistant", "tool_calls": calls}, tool_calls="{}")
    message = {"role": "assistant", "content": 3, "tool_calls": [CALL]}
    refused("the content beside tool_calls is int", messages, message, tool_calls="{}")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "there is no 'messages'; the keys are: $"),
        ({"messages": "hi"}, "messages is str, expected a list"),
        ({"messages": "[]"}, "messages is empty"),
        ({"messages": "[{'role': 'user'}]"}, "messages is broken JSON: .* property name"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "a message is str, expected an object"),
        ({"messages": [{"role": "user"}]}, "there is no 'content'; the keys are: role"),
        ({"messages": [{"content": "x"}]}, "there is no 'role'; the keys are: content"),
        ({"messages": [{"role": "user", "content": []}]}, "the user content is list"),
        ({"messages": [{"role": "a b", "content": "x"}]}, "unknown role 'a b', expected a word"),
        ({"messages": [{"role": [], "content": "x"}]}, r"unknown role \[\]"),
        ({"messages": [{"role": None, "content": "x"}]}, "unknown role None"),
        ({"messages": [SYSTEM | {"tools": 3}]}, "tools of the system message is int, expected"),
        ({"messages": [SYSTEM | {"tools": [{1}]}]}, "tools cannot be written as JSON"),
        ({"messages": [{"from": "alien", "value": "x"}]}, "role 'alien', expected one of: human"),
        ({"messages": [USER], "images": ["x"]}, "there is a 'images' too, .* remove it"),
        ({"messages": [USER], "tools": 3}, "tools of the system message is int"),
        ({"messages": [USER], "system": 3}, "the system content is int"),
        ({"messages": [SYSTEM | {"tools": "f"}], "tools": "g"}, "a system message that has tools"),
    ],
)
def test_bad_rows_of_messages(row, says):
    refused(says, FORMATS["messages"].read, row)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (("tool <|end|>", "x"), r"unknown role 'tool <\|end\|>', expected a word such as system"),
        ((None, "x"), "unknown role None"),
        (("user", None), "the user content is null, expected a string"),
        (("user", "\ud83d"), "not valid Unicode"),
        (("system", "a", None, ["f"]), "tools of the system message is list"),
    ],
)
def test_bad_turns(message, says):
    refused(says, make_turn, *message)


# Rows of a better and a worse answer

MORE = [USER, ASSISTANT, USER, ASSISTANT]
PROMPT = "\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant:"


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
def test_preferences(row, turns):
    assert spoken(FORMATS["preference"].read({"rejected": "b", **row})) == turns


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "a"}, "chosen has no prompt before it; the keys are: rejected, chosen"),
        ({"chosen": [ASSISTANT], "prompt": ""}, "chosen has no prompt before it"),
        ({"chosen": "a", "prompt": "u", "input": "i"}, "the prompt may be any of: prompt, input"),
        ({"chosen": None, "prompt": "u"}, "there is no chosen answer"),
        ({"chosen": [], "prompt": "u"}, "there is no chosen answer"),
        ({"chosen": 1, "prompt": "u"}, "chosen is int, expected a text or a list of messages"),
        ({"chosen": "a", "prompt": 3}, "the user content is int"),
        ({"prompt": "u"}, "there is no chosen answer"),
        ({"prompt": "u", "chosen": "a", "image": "x.png"}, "there is a 'image' too"),
        ({"prompt": "u", "chosen": "a", "context": "c"}, "there is a 'context' too, which this"),
        ({"prompt": "u", "chosen": MORE, "history": ["h"]}, "there is a 'history' too, .*columns"),
    ],
)
def test_bad_preferences(row, says):
    refused(says, FORMATS["preference"].read, {"rejected": "b", **row})


def test_instruction_and_input_of_a_pair_are_those_of_alpaca():
    row = {"instruction": "i", "input": "more", "chosen": "a", "rejected": "b"}
    assert spoken(read(row)) == [("user", "i\n Input: more"), ("assistant", "a")]
    assert spoken(read({**row, "input": ""})) == [("user", "i"), ("assistant", "a")]


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("rejected", "chosen")])
def test_a_side_that_no_row_has_is_named(sides):
    found, lacking = sides
    refused(f"There is a '{found}' and no '{lacking}'", read, {"prompt": "u", found: "a"})


def test_values_and_keys_can_always_be_shown():
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert len(short_repr(nested)) < 50
    assert len(short_repr("x" * 10**6)) < 50
    short_repr({"\ud800": "\ud800"}).encode()
    assert key_names({"a": 1, "\ud800": 2}) == "a, \\ud800"
    assert key_names(map(str, range(99))).count(",") == NAMES_LISTED


# Shapes of everyday


def test_messages_written_as_json_text():
    assert spoken(read({"messages": json.dumps([USER, ASSISTANT])})) == PAIR


def test_pairs_within_a_conversation():
    row = {"conversation": [{"input": "u", "output": "a"}, {"input": "v", "output": "b"}]}
    assert spoken(read(row)) == [*PAIR, ("user", "v"), ("assistant", "b")]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompts_and_answers_of_messages(answer):
    before = [USER, ASSISTANT, USER]
    row = {"prompt": before, answer: [ASSISTANT], "tools": TOOLS, "id": 1}
    turns = read(row)
    assert spoken(turns) == [("system", ""), *PAIR * 2]
    # What the assistant said within the prompt is no answer to be learned
    assert [turn.wanted for turn in turns] == [None, None, False, None, None]
    assert spoken(read({"prompt": "u", answer: [ASSISTANT]})) == PAIR
    assert spoken(read({"prompt": [USER], answer: "a"})) == PAIR
    refused("there is a 'context' too", read, row | {"context": "c"})


def test_dolly_with_and_without_context():
    rows = [ROWS["dolly"], ROWS["dolly"] | {"context": "Ann did it."}]
    format = pick_format(None, None, rows)
    assert [spoken(format.read(row)) for row in rows] == [
        PAIR,
        [("user", "u\n\nAnn did it."), ("assistant", "a")],
    ]


def test_openai_preference_with_tools_and_answers_before():
    asked = {"messages": [USER, ASSISTANT, USER], "tools": TOOLS, "parallel_tool_calls": True}
    turns = read(ROWS["openai_preference"] | {"input": asked})
    assert turns[0].tools == TOOLS_TEXT
    assert [turn.wanted for turn in turns[1:]] == [None, False, None, None]


@pytest.mark.parametrize("name", ["Question", " QUESTION ", "question"])
def test_capitals_in_the_names_of_columns(name):
    row = {name: "u", "Answer": "a", "Id": 3}
    assert spoken(read(row)) == spoken(read(row, "question_answer")) == PAIR
    refused("there is a 'context' too", read, row | {"Context": "c"}, "question_answer")
    assert spoken(read({"Messages": [USER, ASSISTANT]})) == PAIR
    refused("their keys are: Foo, Bar", read, {"Foo": 1, "Bar": 2})


def test_columns_that_differ_in_capitals_alone():
    row = {"question": "u", "answer": "a", "Answer": "b"}
    assert spoken(read(row)) == PAIR
    refused("differ only in capitals", AnyCase(FORMATS["question_answer"]).read, row)


def test_roles_in_capitals():
    listed = [{"role": "User", "content": "u"}, {"role": " ASSISTANT", "content": "a"}]
    assert spoken(messages(*listed)) == PAIR
    assert spoken(messages({"from": "Human", "value": "u"}, {"from": "GPT", "value": "a"})) == PAIR


@pytest.mark.parametrize(
    ("role", "means"), [("human", "user"), ("gpt", "assistant"), ("Bot", "assistant")]
)
def test_roles_that_no_template_writes(role, means):
    says = rf"unknown role '{role}', expected one of: system, user, .*roles=\{{{role}: {means}\}}"
    row = {"messages": [{"role": role, "content": "u"}]}
    refused(says, read, row)
    assert pick_format(None, None, [row], roles={role: "user"}).read(row)[0].role == "user"


def test_roles_may_be_told():
    row = {"messages": [{"role": "customer", "content": "u"}, {"role": "agent", "content": "a"}]}
    format = pick_format(None, None, [row], roles={"customer": "user", "agent": "assistant"})
    assert spoken(format.read(row)) == PAIR


# What is not read


@pytest.mark.parametrize(
    "name",
    [
        *(
            "choices",
            "passage",
            "schema",
            "documents",
            "db_schema",
            "RetrievedDocuments",
            "options",
        ),
        *("candidate_answers", "sql_context", "premise", "create table", "Facts", "story"),
    ],
)
def test_columns_that_look_like_a_part_of_the_prompt(name):
    for row in (ROWS["question_answer"], ROWS["alpaca"], ROWS["dolly"], ROWS["preference"]):
        format = pick_format(None, None, [row])
        if isinstance(format, FORMATS["preference"].__class__) and name == "story":
            continue
        for value in ("x", ["x", "y"], [{"text": "x"}]):
            says = (
                f"there is a '{name}' too, which looks like a part of the prompt .*dataset.prompt"
            )
            refused(says, format.unread, row | {name: value})
        for value in ("", None, [], "[]", 3, True):
            format.unread(row | {name: value})


@pytest.mark.parametrize("row", [ROWS["messages"], ROWS["sharegpt"], ROWS["conversation"]])
def test_material_beside_a_list_of_messages(row):
    column = next(iter(row))
    format = pick_format(None, None, [row])
    more = row | {"documents": [{"text": "x"}]}
    refused(rf"'documents' too, .*dataset.columns=\{{messages: {column}\}}", format.unread, more)
    told = pick_format(None, {"messages": column}, [more])
    assert told.unread(more)[-1] == "documents"
    assert spoken(told.read(more)) == PAIR
    notes = {"question": "q", "context": "c", "document_id": "7", "title": "t"}
    assert {*notes} <= {*format.unread(row | notes)}


def test_columns_beside_messages_may_be_told():
    row = {"dialog": [USER, ASSISTANT], "hint": "s", "offers": TOOLS, "documents": ["x"]}
    columns = {"messages": "dialog", "system": "hint", "tools": "offers"}
    turns = read(row, columns=columns)
    assert spoken(turns) == [("system", "s"), *PAIR]
    assert turns[0].tools == TOOLS_TEXT


@pytest.mark.parametrize("names", [("A", "B"), ("opa", "opb"), ("option1", "option2")])
def test_choices_in_columns_of_their_own(names):
    row = ROWS["question_answer"] | dict.fromkeys(names, "x")
    refused(f"there is a '{names[0]}' too", FORMATS["question_answer"].unread, row)
    row = ROWS["question_answer"] | {"A": "a single letter is no choice", "n": 0}
    assert FORMATS["question_answer"].unread(row) == ["id", "A", "n"]


def test_what_is_not_read_is_told():
    row = ROWS["question_answer"] | {"source": "x", "score": 3, "blank": "", "document_id": "d"}
    assert pick_format(None, None, [row]).unread(row) == ["id", "source", "score", "document_id"]
    columns = {"user": "id", "assistant": "answer"}
    unread = ["question", "source", "score", "document_id"]
    assert pick_format(None, columns, [row]).unread(row) == unread
    text = {"text": "x", "passage": "part of the text"}
    assert FORMATS["text"].unread(text) == ["passage"]


@pytest.mark.parametrize(
    ("value", "written"),
    [("c", "c"), (["x", "y"], "x\ny"), (3, "3"), ({"é": [1]}, '{"é": [1]}'), (None, "")],
)
def test_a_prompt_that_the_user_writes(value, written):
    row = {"instruction": "i", "choices": value, "output": "a", "hint": "s"}
    format = pick_format(None, None, [row], prompt="Do {instruction}: {{x}}\n\n{choices}")
    expected = [("user", f"Do i: {{x}}\n\n{written}".strip()), ("assistant", "a")]
    assert spoken(format.read(row)) == expected
    assert format.unread(row | {"passage": "p"}) == ["hint", "passage"]
    columns = {"assistant": "output", "system": "hint"}
    format = pick_format(None, columns, [row], prompt="{instruction}")
    assert spoken(format.read(row)) == [("system", "s"), ("user", "i"), ("assistant", "a")]
    assert spoken(format.read(row | {"hint": ""})) == [("user", "i"), ("assistant", "a")]
    refused("there is no 'output'", format.read, {"instruction": "i"})


def test_the_answer_to_a_prompt_that_the_user_writes():
    for row in ({"q": "u"}, {"q": "u", "answer": "a", "output": "b"}):
        refused("dataset.columns={assistant: …}", pick_format, None, None, [row], prompt="{q}")


def test_an_empty_system_column_is_none():
    columns = {"user": "u", "assistant": "a", "system": "s"}
    for blank in ("", None):
        assert spoken(read({"u": "u", "a": "a", "s": blank}, columns=columns)) == PAIR


# Answers that are not to be learned


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label": False}, 'label is False: the answer is not to be learned; .*filter="label"'),
        ({"label": 0}, "label is 0: the answer is not"),
        ({"Label": "False"}, r"Label is 'False': .*filter=\"Label.lower\(\) is eq\('true'\)\""),
        ({"kto_tag": False}, "kto_tag is False"),
        ({"desirable": "no"}, "desirable is 'no'"),
        ({"rating": 1}, r"there is a 'rating', and nothing says .*filter, as in \"rating is ge"),
        ({"score": "4.5"}, "there is a 'score'"),
        ({"feedback": "negative"}, r"there is a 'feedback', .* \"feedback is ne\('negative'\)\""),
        ({"helpfulness": 0}, "there is a 'helpfulness'"),
    ],
)
def test_unwanted_answers(fields, says):
    for name in ("prompt_completion", "messages", "conversation", "alpaca"):
        row = ROWS[name] | fields
        format = pick_format(None, None, [row])
        refused(says, refuse_unwanted, row, format, None)
        refused(says, refuse_unwanted, row, format, "lang is eq('en')")


@pytest.mark.parametrize(
    ("fields", "filter"),
    [
        ({"label": True}, None),
        ({"label": 1}, None),
        ({"label": "true"}, None),
        ({"label": None, "rating": None, "score": ""}, None),
        ({"label": 0}, "label is defined"),
        ({"rating": 5}, "rating is ge(4)"),
        ({"labels": False, "rating_id": 3}, None),
    ],
)
def test_wanted_answers(fields, filter):
    row = ROWS["prompt_completion"] | fields
    refuse_unwanted(row, pick_format(None, None, [row]), filter)


def test_labels_that_are_no_verdict():
    row = {"review": "u", "label": "bad", "rating": 1}
    refuse_unwanted(
        row, pick_format(None, {"user": "review", "assistant": "label"}, [row]), "rating"
    )
    for name in ("preference", "openai_preference"):
        row = ROWS[name] | {"label": False, "rating": 1}
        refuse_unwanted(row, FORMATS[name], None)
