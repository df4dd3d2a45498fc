import pytest

from phi3_plugin.data.formats import FORMATS, pick_format
from phi3_plugin.errors import ConfigError, DataError

ROWS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "weight": 1},
        ],
        "prompt": "not a pair without its answer",
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "question_answer": {"question": "u", "answer": "a", "id": 3},
    "prompt_response": {"prompt": "u", "response": "a"},
    "prompt_completion": {"prompt": "u", "completion": "a"},
    "alpaca": {"instruction": "u", "output": "a"},
    "instruction_response": {"instruction": "u", "response": "a"},
}


TOOLS = {"role": "system", "content": "s"}


def read(row, name=None, columns=None):
    return [turn[:3] for turn in pick_format(name, columns, [row]).read(row)]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognized_and_named(name):
    row = ROWS[name]
    assert pick_format(None, None, [row] * 3) is FORMATS[name]
    expected = [("user", "u", False), ("assistant", "a", True)]
    if name in ("messages", "sharegpt"):
        expected.insert(0, ("system", "s", False))
    assert read(row) == read(row, name) == expected


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
    assert read(row) == read(row, "alpaca") == [("user", text, False), ("assistant", "5", True)]


def test_alpaca_rows_with_and_without_input_are_one_format():
    rows = [{"instruction": "u", "output": "a"}, {"instruction": "u", "input": "i", "output": "a"}]
    for ordered in (rows, rows[::-1]):
        assert pick_format(None, None, ordered) is FORMATS["alpaca"]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("alpaca", "context"),
        ("question_answer", "context"),
        ("prompt_response", "system"),
        ("instruction_response", "input"),
    ],
)
def test_a_column_of_the_prompt_is_not_dropped_silently(name, extra):
    with pytest.raises(DataError, match=rf"the format of the rows .* {extra}\. Known"):
        pick_format(None, None, [ROWS[name] | {extra: "x"}])
    with pytest.raises(DataError, match=rf"there is a '{extra}' too, .*dataset\.columns"):
        read(ROWS[name] | {extra: "x"}, name)
    assert read(ROWS[name] | {extra: ""}, name) == read(ROWS[name])


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ([{"name": "é"}], '[{"name": "\\u00e9"}]'),
        ({"name": "f"}, '{"name": "f"}'),
        ("f(x)", "f(x)"),
        ("", ""),
        (None, None),
    ],
)
def test_tools_are_text_or_become_json(tools, text):
    row = {"messages": [TOOLS | {"tools": tools, "tool_calls": None}]}
    assert FORMATS["messages"].read(row)[0].tools == text


def test_messages_take_every_role():
    row = {"messages": [{"role": "tool", "content": "42"}]}
    assert read(row) == [("tool", "42", False)]


@pytest.mark.parametrize("theirs", ["user", "assistant", "chatgpt", "gpt", "human", "system"])
def test_sharegpt_roles(theirs):
    ours = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}.get(theirs, theirs)
    said = [{"from": theirs, "value": "x"}, {"from": "gpt", "value": "y"}]
    assert read({"conversations": said})[0][0] == ours


def test_columns_can_be_named():
    row = {"hint": "s", "ask": "u", "reply": "a"}
    columns = {"assistant": "reply", "user": "ask", "system": "hint"}
    assert [turn[:2] for turn in read(row, columns=columns)] == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize("columns", [{}, {"user": "q"}, {"user": "q", "assistant": 3}, ["q", "a"]])
def test_bad_columns(columns):
    with pytest.raises(ConfigError, match=r"dataset\.columns: .* must name one column for user"):
        pick_format(None, columns, [{"q": "", "a": ""}])


def test_unknown_role_in_columns():
    columns = {"user": "q", "assistant": "a", "tool": "t"}
    with pytest.raises(ConfigError, match=r"dataset\.columns"):
        pick_format(None, columns, [{"q": "", "a": ""}])


def test_format_and_columns():
    with pytest.raises(ConfigError, match="are both set"):
        pick_format("messages", {"user": "q", "assistant": "a"}, [{}])


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"dataset\.format: 'chatml' is unknown.*\n  messages \("):
        pick_format("chatml", None, [{}])


@pytest.mark.parametrize(
    "row", [{"text": "t"}, {"instruction": "i", "input": "x"}, {"question": "q"}, {}]
)
def test_unrecognized_rows(row):
    with pytest.raises(DataError) as error:
        pick_format(None, None, [row])
    assert f"their keys are: {', '.join(row)}." in str(error.value)
    for known in (
        "sharegpt (conversations: [{from, value}])",
        "question_answer (question, answer, without system or context or input)",
        "alpaca (instruction, output and perhaps input, without system or context)",
    ):
        assert known in str(error.value)
    assert "dataset.columns" in str(error.value)


def test_rows_that_differ_are_not_recognized():
    with pytest.raises(DataError, match="keys are: question, answer, id, prompt, response"):
        pick_format(None, None, [ROWS["question_answer"], ROWS["prompt_response"]])


def test_rows_that_fit_twice():
    row = ROWS["messages"] | ROWS["question_answer"]
    with pytest.raises(DataError, match=r"several formats: messages, question_answer\. Choose"):
        pick_format(None, None, [row])
    assert len(read(row, "question_answer")) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": None}, "messages is null, expected a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "a message is str, expected an object"),
        ({"messages": [{"role": "user"}]}, "there is no 'content'; the keys are: role"),
        ({"messages": [{"role": "user", "content": None}]}, "the user content is null"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the user content is list"),
        ({"messages": [{"role": "a b", "content": "x"}]}, "unknown role 'a b', expected a word"),
        ({"messages": [TOOLS | {"tools": 3}]}, "tools of the system message is int, expected"),
        ({"messages": [TOOLS | {"tool_calls": [{}]}]}, "a message has tool_calls"),
        ({"messages": [{"role": [], "content": "x"}]}, r"unknown role \[\]"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "'bing', expected one of: human, us"),
        ({"question": "x", "answer": None}, "the assistant content is null"),
        ({"question": "x", "answer": "\udc80"}, "not valid Unicode"),
        ({"instruction": "x", "output": "y", "input": 3}, "input is int, expected a string"),
        ({"instruction": "x", "output": "y", "input": "\udc80"}, "not valid Unicode"),
        ({"instruction": None, "output": "y", "input": "z"}, "the user content is null"),
    ],
)
def test_bad_rows(row, says):
    with pytest.raises(DataError, match=says):
        read(row)


def test_row_without_the_column():
    with pytest.raises(DataError, match="there is no 'answer'; the keys are: question"):
        FORMATS["question_answer"].read({"question": "x"})
