"""Whatever a row or a file holds, it is read or refused with a reason; nothing else happens."""

import copy
import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_plugin.data.formats import FORMATS, pick_format
from phi3_plugin.data.order import group_of
from phi3_plugin.data.rows import SUFFIXES, Row, file_rows
from phi3_plugin.data.turns import Turn, Written
from phi3_plugin.errors import DataError
from tests.assets import assets_dir
from tests.chosen import examples

WORDS = (
    *("messages", "conversations", "prompt", "response", "chosen", "rejected", "instruction"),
    *("input", "output", "text", "system", "tools", "question", "answer", "role", "content"),
    *("from", "value", "weight", "train", "tool_calls", "function", "name", "arguments", "type"),
    *("user", "assistant", "human", "gpt", "function_call", "tool", "images", "image_url"),
    *("", "\ud800", "[]", "{}", "\n\nHuman:", "\n\nHuman: a\n\nAssistant: b", '{"a": [}', "\0"),
)

WORD = st.sampled_from(WORDS) | st.text(max_size=3)

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 0.0, 1.0])

JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=6,
)

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}

MESSAGES = [
    {"role": "system", "content": "s", "tools": [{"name": "f"}]},
    {"role": "user", "content": [{"type": "text", "text": "u"}], "weight": 0},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "train": True},
    {"from": "gpt", "value": "a", "weight": 1, "function_call": None},
    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
]

ROWS = (
    {"messages": MESSAGES[:3], "tools": None, "system": None},
    {"messages": MESSAGES[1:], "tools": [{"name": "f"}], "system": "s", "images": None},
    {"conversations": MESSAGES, "system_prompt": ""},
    {"conversations": MESSAGES[3:4]},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[2:], "rejected": [], "system": "", "tools": "[]"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": None},
    {"instruction": "i", "input": "j", "output": "o", "system": "s", "context": None},
    {"question": "q", "answer": "a", "history": []},
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "completion": "a", "text": "t"},
    {"instruction": "q", "response": "a"},
    {"query": "q", "response": "a"},
    {"input": "q", "output": "a"},
    {"text": "t"},
)

MANY = examples(150)


def places(value):
    """Return every dictionary and list in a value, with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, found in list(inner):
        yield value, key
        if isinstance(found, dict | list):
            yield from places(found)


@st.composite
def rows(draw):
    """A row of a format in which a few places hold something else, or have another name."""
    row = copy.deepcopy(draw(st.sampled_from(ROWS)))
    for _ in range(draw(st.integers(0, 2))):
        holder, key = draw(st.sampled_from(list(places(row)) or [(row, "x")]))
        if isinstance(holder, dict) and draw(st.booleans()):
            value = holder.pop(key, None)
            holder[draw(WORD)] = value
        else:
            holder[key] = draw(JSON)
    return row


def check(chat):
    if isinstance(chat, Written):
        chat.text.encode()
        flat = [place for span in chat.said or () for place in span]
        assert flat == sorted(flat)
        assert not flat or (flat[0] >= 0 and flat[-1] <= len(chat.text))
        return
    assert chat
    for turn in chat:
        assert isinstance(turn, Turn)
        assert turn.wanted in (None, True, False)
        "".join([turn.role, turn.content, turn.tools or ""]).encode()


def refused_or_read(read):
    try:
        check(chat := read())
    except DataError as error:
        assert str(error).strip()
        assert len(str(error)) < 3000
        str(error).encode()
        return None
    return chat


@pytest.mark.parametrize("tool_calls", [None, "<{}>"])
@MANY
@given(row=rows())
def test_rows_of_every_format(tool_calls, row):
    for name in FORMATS:
        format = pick_format(name, None, [row], tool_calls=tool_calls)
        chat = refused_or_read(lambda format=format: format.read(row))
        if chat is not None:
            assert 0 <= group_of(row, chat, None) < 2**64
    refused_or_read(lambda: pick_format(None, None, [row, ROWS[0]]).read(row))
    refused_or_read(lambda: pick_format(None, None, [row]).read(row))
    columns = {"user": next(iter(row), "x"), "assistant": "output"}
    refused_or_read(lambda: pick_format(None, columns, [row]).read(row))


@MANY
@given(row=st.dictionaries(WORD, JSON, max_size=4))
def test_rows_of_no_format(row):
    for format in FORMATS.values():
        refused_or_read(lambda format=format: format.read(row))
    refused_or_read(lambda: pick_format(None, None, [row]).read(row))
    for key in row:
        try:
            assert 0 <= group_of(row, [], key) < 2**64
        except DataError:
            continue


def deepest():
    for depth in range(2000, 0, -5):
        try:
            return json.loads("[" * depth + "]" * depth)
        except RecursionError:
            continue


def test_rows_nested_as_deep_as_json_is_read():
    deep = deepest()
    for row in ROWS:
        row = copy.deepcopy(row)
        for holder, key in places(row):
            usual, holder[key] = holder[key], deep
            refused_or_read(lambda row=row: pick_format(None, None, [row]).read(row))
            holder[key] = usual


def contents(suffix):
    """Return files of one kind that are whole, to be damaged."""
    if suffix == ".csv":
        return b'question,answer\r\n"a ""b"", c",d\r\n\r\ne,"f\ng"\r\n' * 3
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, {"text": "é\u2028"}]]
    return ("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]").encode()


def damaged(content, seed):
    chance = random.Random(seed)
    content = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content) + 1)
        new = bytes(
            chance.choice(b'[]{},:"\\\n\r\0\xff\xef0e-') for _ in range(chance.randint(0, 2))
        )
        content[at : at + chance.choice([0, 1, 30])] = new
    return bytes(content)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("packed", ["no", "before", "after"])
@MANY
@given(seed=st.integers(0, 2**32))
def test_damaged_files(tmp_path_factory, suffix, packed, seed):
    whole = contents(suffix)
    content = {
        "no": lambda: damaged(whole, seed),
        "before": lambda: gzip.compress(damaged(whole, seed), mtime=0),
        "after": lambda: damaged(gzip.compress(whole, mtime=0), seed),
    }[packed]()
    file = tmp_path_factory.getbasetemp() / f"damaged{suffix}{'' if packed == 'no' else '.gz'}"
    file.write_bytes(content)
    read_all(file)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s not in (".parquet", ".arrow")])
@MANY
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_files_of_anything(tmp_path_factory, suffix, content):
    file = tmp_path_factory.getbasetemp() / f"anything{suffix}"
    file.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    read_all(file)


def read_all(file):
    try:
        for row in file_rows(file):
            assert isinstance(row, Row)
            assert row.where.startswith(str(file))
            assert isinstance(row.value, dict | DataError)
            str(row.value).encode("utf-8", "surrogatepass")
    except DataError as error:
        assert str(file) in str(error)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "count", "format"),
    [
        ("fastchat_dummy_conversation.json", 500, "sharegpt"),
        ("gsm8k_train.jsonl", 7473, "question_answer"),
        ("gsm8k_test.jsonl", 1319, "question_answer"),
        ("mbpp_alpaca.jsonl", 974, "alpaca"),
        ("oasst_en_100_messages.jsonl", 564, "messages"),
        ("self_instruct_alpaca.jsonl", 427, "alpaca"),
    ],
)
def test_real_data_is_recognized_and_read(name, count, format):
    folder = assets_dir()
    if folder is None:
        pytest.skip("the real data is not here: set PHI3_ASSETS")
    rows = [row.value for row in file_rows(folder / "data" / name)]
    assert len(rows) == count
    picked = pick_format(None, None, rows[:10])
    assert picked is FORMATS[format]
    for row in rows:
        check(chat := picked.read(row))
        assert chat[-1].role in ("assistant", "user")
        assert any(turn.trained for turn in chat)
