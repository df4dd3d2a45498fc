"""Tables whose rows share one shape: what was added to rows to give them that shape is left out."""

import pyarrow as pa
import pytest

from phi3_plugin.data.formats import MessageList
from phi3_plugin.data.sources import file_rows, without_added
from tests.data.test_files import write


def asked(**arguments):
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}


def offered(**properties):
    return [{"name": "f", "parameters": {"type": "object", "properties": properties}}]


NUMBER, TEXT = {"type": "number", "default": 0}, {"type": "string", "enum": ["x"]}
ROWS = [
    {"messages": [asked(deep=[{"b": 2}], a=1)], "tools": offered(a=NUMBER)},
    {"messages": [asked(deep=[{"c": 3}], b="x")], "tools": offered(b=TEXT)},
]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_arguments_and_tools_are_those_that_were_written(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix}", ROWS)
    assert pa.Table.from_pylist(ROWS).to_pylist() != ROWS
    assert [row.value for row in file_rows(file)] == ROWS
    format = MessageList("messages", "role", tool_calls="<{}>")
    assert [format.read(row.value)[-1].content for row in file_rows(file)] == [
        '<[{"name": "f", "arguments": {"deep": [{"b": 2}], "a": 1}}]>',
        '<[{"name": "f", "arguments": {"deep": [{"c": 3}], "b": "x"}}]>',
    ]


def test_json_keeps_its_nulls(tmp_path):
    row = {"messages": [asked(a=None)], "tools": offered(a=None)}
    assert [found.value for found in file_rows(write(tmp_path / "a.jsonl", [row]))] == [row]


def test_other_nulls_stay():
    row = {"tools": None, "content": {"a": None}, "messages": [{"content": None, "weight": None}]}
    assert without_added(row) == row
    assert without_added({"tools": [None, {"a": [None], "b": None}]}) == {
        "tools": [None, {"a": [None]}]
    }
