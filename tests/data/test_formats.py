import pytest

from phi3_plugin.data.formats import FORMATS, pick_format
from phi3_plugin.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

ROWS = {
    "messages": {"messages": [USER, ASSISTANT], "prompt": "only a note beside messages"},
    "sharegpt": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    "preference": {"prompt": "u", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "u", "output": "a"},
    "question_answer": {"question": "u", "answer": "a", "id": 3},
    "prompt_response": {"prompt": "u", "response": "a"},
    "prompt_completion": {"prompt": "u", "completion": "a"},
    "instruction_response": {"instruction": "u", "response": "a"},
    "query_response": {"query": "u", "response": "a"},
    "input_output": {"input": "u", "output": "a"},
    "text": {"text": "<|user|>u"},
}


def read(row, name=None, columns=None):
    return [turn[:3] for turn in pick_format(name, columns, [row]).read(row)]


@pytest.mark.parametrize("name", ROWS)
def test_formats_are_recognized_and_named(name):
    row = ROWS[name]
    assert pick_format(None, None, [row] * 3) is FORMATS[name]
    if name != "text":
        expected = [("user", "u", False), ("assistant", "a", True)]
        assert read(row) == read(row, name) == expected


def test_every_format_has_a_row_here():
    assert FORMATS.keys() == ROWS.keys()


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
        ("alpaca", "history"),
        ("question_answer", "context"),
        ("question_answer", "image"),
        ("prompt_response", "system"),
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
    with pytest.raises(DataError, match=rf"there is a '{extra}' too, .*dataset\.columns"):
        read(row, name)
    for blank in ("", None, []):
        assert read(ROWS[name] | {extra: blank}, name) == read(ROWS[name])


def test_how_calls_of_tools_are_written_is_for_lists():
    calls = [{"name": "f", "arguments": {}}]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    format = pick_format(None, None, [row], tool_calls="<{}>")
    assert format.read(row)[1].content == '<[{"name": "f", "arguments": {}}]>'
    assert pick_format(None, None, [ROWS["alpaca"]], tool_calls="{}") == FORMATS["alpaca"]
    with pytest.raises(ConfigError, match=r"dataset\.tool_calls: 'x' must be a text with one {}"):
        pick_format(None, None, [row], tool_calls="x")


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
    with pytest.raises(DataError, match=rf"several formats: {one}, {other}\. Choose one with"):
        pick_format(None, None, [row])
    assert read(row, one) == read(row, other)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": None}, "messages is null, expected a list"),
        ({"question": "x", "answer": None}, "the assistant content is null"),
        ({"question": None, "answer": None}, "the user content is null"),
    ],
)
def test_nulls_are_named_where_nothing_else_fits(row, says):
    with pytest.raises(DataError, match=says):
        read(row)


def test_row_without_the_column():
    with pytest.raises(DataError, match="there is no 'answer'; the keys are: question"):
        FORMATS["question_answer"].read({"question": "x"})
