"""Prompts from every source, and what is said about those that cannot be answered."""

import io
import json
import sys
from pathlib import Path

import pytest

from phi3_plugin import prompts
from phi3_plugin.errors import DataError
from tests.commands import generate as run
from tests.recipes.prompted import ROWS, keys, of_file, read, write


@pytest.fixture
def here(cwd, monkeypatch):
    """A folder with a checkpoint, in which paths are short."""
    monkeypatch.chdir(cwd)
    write("prompts.jsonl", ROWS)
    return cwd


@pytest.mark.parametrize("data", ["Add: one\r\nAdd: two\r\n\r\n", "\ufeffAdd: one\nAdd: two"])
@pytest.mark.parametrize("source", ["a.txt", "-", "without_suffix"])
def test_text_is_a_prompt_a_line(here, monkeypatch, capsys, data, source):
    if source == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    else:
        Path(source).write_bytes(data.encode())
    assert run(keys(prompts=source, max_new_tokens=1)) == 0
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["prompt"] for row in rows] == ["Add: one", "Add: two"]


def test_standard_input_may_be_json_lines(here, monkeypatch):
    data = '\n{"prompt": "Add: one", "id": 7}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert run(keys(prompts="-", output="out.jsonl")) == 0
    assert read("out.jsonl")[0]["id"] == 7


def test_messages_are_asked_without_the_reference(here):
    user, reference = {"role": "user", "content": "Add: one"}, {"role": "assistant", "content": "x"}
    system = {"role": "system", "content": "two"}
    write(
        "prompts.jsonl",
        [
            {"messages": [user]},
            {"messages": [user, reference]},
            {"messages": [system, user]},
            {"conversations": None, "prompt": [user]},
        ],
    )
    run(of_file())
    bare, referenced, with_system, listed = read("out.jsonl")
    assert referenced["messages"] == [user, reference]
    assert bare["answer"] == referenced["answer"] == listed["answer"]
    assert with_system["prompt_tokens"] > bare["prompt_tokens"]
    run(keys(prompts="prompts.jsonl", output="other.jsonl", system="two"))
    given = [row["prompt_tokens"] for row in read("other.jsonl")]
    assert given == [with_system["prompt_tokens"]] * 4  # its own one, or the one for all


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": " "}], "line 2: the prompt is empty"),
        ([{"prompt": "one " * 600}], r"line 1: \d\d\d tokens, but the model has 512 positions"),
        ([{"prompts": "a"}], "line 1: there is neither .*; did you mean 'prompt' by 'prompts'?"),
        ([{"prompt": "a", "messages": []}], "line 1: there are prompt and messages"),
        ([["a"]], "line 1: list, expected an object"),
        ([{"prompt": 3}], "line 1: prompt is int, expected a text"),
        ([{"messages": []}], "line 1: messages is empty"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "line 1: nothing is said"),
        ([{"messages": [{"role": "user"}]}], "line 1: .*content"),
        ([{"prompt": "\ud800"}], "line 1: .*half a surrogate pair"),
        ([{"prompt": ""}] * 20, r"\.\.\. and 10 more\."),
        ([], "prompts.jsonl holds no prompts"),
    ],
)
def test_bad_rows_are_listed_before_a_model_is_loaded(here, monkeypatch, rows, message):
    monkeypatch.delattr(prompts, "load")
    write("prompts.jsonl", rows)
    with pytest.raises(DataError, match=message):
        run(of_file())
    assert not list(here.glob("out*"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: broken JSON"),
        (b'{"prompt": "a"}\n\n{"prompt": "\xe9"}\n', r"is not UTF-8 \(line 3\)"),
        ("a".encode("utf-16"), r"is not UTF-8 \(line 1\)"),
        (b"", "holds no prompts"),
    ],
)
def test_broken_files_are_told(here, data, message):
    Path("prompts.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        run(of_file())


def test_an_empty_line_between_prompts_is_told(here):
    Path("a.txt").write_text("one\n\ntwo\n")
    with pytest.raises(DataError, match="line 2: the prompt is empty"):
        run(keys(prompts="a.txt"))
