"""Rows of every kind of file: the place of each, and what broken ones say."""

import csv
import gzip
import io
import json
import lzma
import re
import time
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_plugin.data.formats import MessageList
from phi3_plugin.data.rows import SUFFIXES, elements, file_rows, lines, without_added
from phi3_plugin.errors import DataError
from tests.files import A, B, places, read, values, write, write_arrow, zstd


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [2, 1000])
def test_each_kind_of_file_holds_the_same(tmp_path, suffix, count):
    rows = [A, B] * (count // 2)
    file = write(tmp_path / f"rows{suffix}", rows)
    assert [row.value for row in file_rows(file)] == rows
    file = file.rename(tmp_path / f"ROWS{suffix.upper()}")
    assert [row.value for row in file_rows(file)] == values(tmp_path) == rows


def test_places(tmp_path):
    listed, numbered = ["[0]", "[1]"], [":1", ":2"]
    # A's answer spans two lines of the CSV file, whose header is line 1
    expected = {".json": listed, ".jsonl": numbered, ".ndjson": numbered, ".csv": [":2", ":4"]}
    expected |= {".tsv": [":2", ":4"], ".parquet": listed, ".arrow": listed}
    for suffix in SUFFIXES:
        file = write(tmp_path / f"a{suffix}", [A, B])
        ends = expected[re.sub(r"\.(gz|xz|zst)$", "", suffix)]
        assert [row.where for row in file_rows(file)] == [f"{file}{end}" for end in ends]


def test_folders_and_globs_mix_kinds(tmp_path):
    for suffix in SUFFIXES:
        write(tmp_path / f"rows{suffix}", [A])
    assert len(read(tmp_path)) == len(SUFFIXES)
    assert len(read(f"{tmp_path}/*.gz")) == len(read(f"{tmp_path}/*.zst")) == 5


def test_both_forms_of_arrow(tmp_path):
    file = write_arrow(tmp_path / "a.arrow", [A, B] * 200, pa.ipc.new_file)
    assert [row.value for row in file_rows(file)] == [A, B] * 200


@pytest.mark.parametrize("text", ['[{"a": 1},\n{"b": [\n]}]\n', '\n\r\n {"a": 1}\r{"b": []}'])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_list_is_told_from_lines_by_its_bracket(tmp_path, text, start):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(start + text.encode())
        assert values(tmp_path / name) == [{"a": 1}, {"b": []}]


def test_what_cannot_be_read_is_an_error_of_its_row(tmp_path):
    text = '[{"a": 1}, {"b": [{"a": 1, "a": 1}]}, {"a": 2}]'
    (tmp_path / "a.json").write_text(text)
    one, broken, other = file_rows(tmp_path / "a.json")
    assert (one.value, other.value) == ({"a": 1}, {"a": 2})
    assert broken.where == f"{tmp_path}/a.json[1]"
    assert str(broken.value) == "broken JSON: the key 'a' is there twice"
    (tmp_path / "b.jsonl").write_text('{"n": 1}\n{"n": \n[1]\nnull\n')
    found = read(tmp_path / "b.jsonl")
    assert places(found) == ["1", "2", "3", "4"]
    assert "broken JSON: Expecting value" in str(found[1].value)
    says = ["the row is list, expected an object", "the row is null, expected an object"]
    assert [str(row.value) for row in found[2:]] == says


def test_csv_as_spreadsheets_write_it(tmp_path):
    text = '\r\nquestion,answer,""\r\n"a ""b""",c,\r\n\r\n d ,e,f\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [(row.where.rsplit(":")[-1], row.value) for row in file_rows(tmp_path / "a.csv")] == [
        ("3", {"question": 'a "b"', "answer": "c", "": ""}),
        ("5", {"question": " d ", "answer": "e", "": "f"}),
    ]


def test_csv_cells_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    file = write(tmp_path / "a.csv", [A | {"answer": "x" * (limit + 1)}])
    assert len(values(file)[0]["answer"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_csv_row_of_another_length(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\nc\nd,e,f\n")
    assert [f"{row.where}: {row.value}" for row in read(tmp_path / "a.csv")[1:]] == [
        f"{tmp_path}/a.csv:3: the row has 1 cells, the header has 2",
        f"{tmp_path}/a.csv:4: the row has 3 cells, the header has 2",
    ]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PACKED = gzip.compress(b"{}" * 99, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b'q,a\nx,"y', r"a\.csv:2 is broken CSV: unexpected end of data\. "),
        ("a.csv", b'q,a\nx,"y"z\n', r"a\.csv:2 is broken CSV: .* expected after"),
        ("a.csv", b"q,a,q\n1,2,3\n", r"a\.csv: the header names q more than once"),
        ("a.csv", b"\xff\xfe", r"a\.csv is UTF-16 text\. Save it as UTF-8"),
        ("a.json", b'{\n"a": 1\n}\n', r"a\.json: .* over several lines\. Expected one list"),
        ("a.json", b'\n [{"a": 1},\n\n{"a" 1}]', r"a\.json is broken JSON: .* \(line 4\)\. Expec"),
        ("a.JSONL", b"[1, 2", r"a\.JSONL is broken JSON"),
        ("a.json", b"[" * 10**5, r"a\.json is broken JSON: nested too deeply \(line 1\)"),
        ("a.json", b"[]", r"a\.json has no rows"),
        ("a.jsonl", b"\n", r"a\.jsonl has no rows"),
        ("a.csv", b"q,a\n", r"a\.csv has no rows"),
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.parquet", b"", r"a\.parquet cannot be read as Parquet: .*\. Write it again"),
        ("a.parquet", b"PAR1 x PAR1", r"a\.parquet cannot be read as Parquet: "),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz is not a whole gzip file: "),
        ("a.jsonl.gz", PACKED[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", PACKED[:12] + b"\xff" * 20, "not a whole gzip file"),
        ("a.jsonl.xz", lzma.compress(b"{}" * 99)[:-9], "not a whole xz file"),
        ("a.jsonl.xz", b"{}", "not a whole xz file"),
        ("a.jsonl.zst", zstd(b"{}" * 99)[:-9], "not a whole zstd file"),
        ("a.csv.zst", b"{}", "not a whole zstd file"),
        ("a.jsonl", PACKED, r"a\.jsonl holds gzip data\. Rename it so that it ends in \.gz"),
        ("a.jsonl", zstd(b"{}"), r"a\.jsonl holds zstd data\. Rename .* \.zst"),
        ("a.json", lzma.compress(b"{}"), r"a\.json holds xz data"),
        ("a.csv", b"PAR1 x PAR1", r"a\.csv holds a Parquet table"),
        ("a.jsonl", "{}".encode("utf-16"), r"a\.jsonl is UTF-16 text"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), r"a\.jsonl is UTF-16 text"),
        ("a.parquet", LFS, r"a\.parquet is a pointer of Git LFS, .* git lfs pull"),
        ("a.jsonl.gz", LFS, r"a\.jsonl\.gz is a pointer of Git LFS"),
        ("a.json", b"\n<!DOCTYPE html><html>", r"a\.json is a web page"),
        ("a.csv", b"PK\x03\x04", r"a\.csv is a zip archive or a spreadsheet"),
        (
            "a.json",
            b'{"data": [{"a": 1, "a": 2}]}',
            r"a\.json: broken JSON: the key 'a' is there twice",
        ),
        ("a.arrow", b"", r"a\.arrow cannot be read as Arrow: .*\. Write it again"),
        ("a.arrow", b"ARROW1 x", r"a\.arrow cannot be read as Arrow: "),
        ("a.parquet.gz", b"", r"a\.parquet\.gz must end in \.json, .* or \.parquet\."),
        ("a.txt", b"a,b", r"a\.txt must end in \.json, .* or \.parquet"),
    ],
)
def test_broken_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


def test_tables_with_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["q", "q"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=rf"{name}: the header names q more than once"):
            read(tmp_path / name)


def test_a_damaged_parquet_page(tmp_path):
    file = write(tmp_path / "a.parquet", [A] * 50)
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(file)


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_cut_off(tmp_path, form):
    file = write_arrow(tmp_path / "a.arrow", [A] * 500, form)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        read(file)


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .*directory"):
        list(file_rows(tmp_path / "a.jsonl"))


LONG = json.dumps(A | {"answer": "x" * 1000})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", f"{LONG}\n" * 4000),
        ("a.jsonl.gz", f"{LONG}\n" * 4000),
        ("a.csv", "question,answer\n" + f'"{"x" * 500}",{"y" * 500}\n' * 4000),
    ],
)
def test_little_of_a_file_is_held(tmp_path, name, text):
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as out:
        out.write(text)
    tracemalloc.start()
    try:
        assert sum(1 for _ in file_rows(tmp_path / name)) == 4000
        assert tracemalloc.get_traced_memory()[1] < len(text) / 4
    finally:
        tracemalloc.stop()


def test_the_rows_before_damage_are_read(tmp_path):
    packed = gzip.compress(f"{LONG}\n".encode() * 4000, mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-9])
    rows = file_rows(tmp_path / "a.jsonl.gz")
    assert [next(rows).value for _ in range(100)] == [json.loads(LONG)] * 100
    with pytest.raises(DataError, match="not a whole gzip file"):
        list(rows)
    assert len(read(tmp_path / "a.jsonl.gz", max_samples=3)) == 3


# Odd JSON

DEEP = "[" * 100_000 + "]" * 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(JSON, max_size=5), indent=st.none() | st.integers(0, 2), ascii=st.booleans())
def test_lists_are_what_json_reads(rows, indent, ascii):
    assert list(elements(json.dumps(rows, indent=indent, ensure_ascii=ascii))) == rows


@given(text=st.text(alphabet='[]{},:"\\u0 1-.e\ntrufalsn', max_size=25))
def test_broken_lists_are_refused(text):
    """What Python reads is read; what it does not is an error."""
    text = f"[{text}"
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = list(elements(text))
    except json.JSONDecodeError:
        found = None
    assert found == expected or any(isinstance(value, DataError) for value in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", r"Expecting ',': line 1 "),
        ('[{"a": 1},\n\n{"a" 1}]', r"Expecting ':' delimiter: line 3 "),
        ('[{"a": 1}\n{"a": 1}]', r"Expecting ',': line 2 "),
        ("[1] 2", "Extra data after the list"),
        ("[1,]", r"Expecting value|Illegal trailing comma"),
        ('["a', "Unterminated string"),
        ("[", "Expecting value"),
        (f"[{DEEP}]", "nested too deeply"),
        (f'[{{"a": {{"b": 1, "b": 2}}, "c": {DEEP}}}]', "nested too deeply"),
        ('["a\nb"]', "Invalid control character"),
    ],
)
def test_where_a_list_is_broken(text, says):
    with pytest.raises(json.JSONDecodeError, match=says):
        list(elements(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{{"a": {"1" * 5000}}}', "broken JSON: Exceeds the limit"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "broken JSON: the key 'a' is there twice"),
    ],
)
def test_what_json_allows_and_we_do_not_is_one_rows_error(text, says):
    stream = io.StringIO(f"1\n{text}\n2")
    found = [*elements(f"[1, {text}, 2]"), *(value for _, value in lines(stream))]
    assert found[0::3] == [1, 1]
    assert found[2::3] == [2, 2]
    assert all(isinstance(value, DataError) and says in str(value) for value in found[1::3])


@pytest.mark.parametrize("line", [DEEP, '{"a": ' + DEEP + "}", '{"a"', "{'a': 1}", "\ufeff{}", "]"])
def test_a_broken_line_is_one_rows_error(line):
    (_, first), (_, error), (_, last) = lines(io.StringIO(f"1\n{line}\n2"))
    assert (first, last) == (1, 2)
    assert isinstance(error, DataError)
    assert str(error).startswith("broken JSON: ")


def test_what_python_reads_though_json_has_it_not():
    (_, found) = next(lines(io.StringIO('[NaN, -Infinity, 1e999, "\\ud800"]')))
    assert str(found) == "[nan, -inf, inf, '\\ud800']"


@pytest.mark.parametrize("end", ["\n", "\n{}\n", ""])
def test_a_line_that_could_fill_the_memory_is_not_held(end, monkeypatch):
    monkeypatch.setattr("phi3_plugin.data.rows.LONGEST_LINE", 50)
    long = json.dumps({"a": "x" * 500})
    (_, first), (number, error), *rest = lines(io.StringIO(f'{{"b": 1}}\n{long}{end}'))
    assert first == {"b": 1} and number == 2
    assert isinstance(error, DataError) and "more than 50 characters" in str(error)
    assert rest == ([(3, {})] if "{" in end else [])


def test_lines_are_those_of_the_stream():
    text = '1\r\n\n  \t\r2\r"a\u2028b\u0085"\n'
    found = list(lines(io.StringIO(text, newline=None)))
    assert found == [(1, 1), (4, 2), (5, "a\u2028b\u0085")]


@pytest.mark.parametrize(
    ("text", "spread"),
    [
        ('{\n "a": 1\n}\n', True),
        ('{\n "a": 1\n}\n{\n "a": 1\n}', True),
        ('{"a": {\n}, "a": 1}', True),
        ('{"a": 1}\n{\n}\n', False),
        ('{"a": "\\n"}\n\n', False),
        ('{"a": \n[1]\nnull', False),
        ("{\n", False),
        ("{" + f'"a":\n{DEEP}' + "}", False),
    ],
)
def test_an_object_over_several_lines(tmp_path, text, spread):
    (tmp_path / "a.json").write_text(text)
    try:
        list(file_rows(tmp_path / "a.json"))
    except DataError as error:
        assert "written over several lines" in str(error)
    else:
        assert not spread


# Bytes, separators and wrappers


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n{"a": "y"}\n'),
        ("a.csv", b"a\nx\n\xe9\ny\n"),
        ("a.json", b'[{"a": "x"}, {"a": "\xe9"}, {"a": "y"}]'),
    ],
)
def test_one_bad_byte_is_one_rows_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    first, bad, last = file_rows(tmp_path / name)
    assert (first.value, last.value) == ({"a": "x"}, {"a": "y"})
    assert isinstance(bad.value, DataError)
    assert "not UTF-8 text: byte 0xe9" in str(bad.value)
    str(bad.value).encode()


def test_half_a_surrogate_pair_of_json_is_no_bad_byte(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\udce9"}')
    assert values(tmp_path / "a.jsonl") == [{"a": "\udce9"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'q;a\n"x;1";y, z\n'),
        ("a.csv", "q\ta\nx;1\ty, z\n"),
        ("a.csv", "q|a\nx;1|y, z\n"),
        ("a.csv", 'sep=;\r\nq;a\r\n"x;1";y, z\r\n'),
        ("a.csv", 'sep=,\nq,a\nx;1,"y, z"\n'),
        ("a.tsv", "q\ta\nx;1\ty, z\n"),
        ("a.tsv", 'q,a\nx;1,"y, z"\n'),
    ],
)
def test_the_separator_is_the_headers(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert values(tmp_path / name) == [{"q": "x;1", "a": "y, z"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["data", "rows", "train"])
def test_an_object_that_lists_the_rows(tmp_path, indent, name):
    whole = {"version": "1.0", name: [A, B]}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=indent))
    assert [row.value for row in file_rows(tmp_path / "a.json")] == [A, B]


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "data"}]}],
        [{"data": ["q", "a"]}],
        [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}],
        [{"data": [{"a": 1}], "more": []}],
    ],
)
def test_rows_that_are_no_wrapper(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert values(tmp_path / "a.jsonl") == rows


# What tables add to rows to give them one shape


def asked(**arguments):
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}


def offered(**properties):
    return [{"name": "f", "parameters": {"type": "object", "properties": properties}}]


NUMBER, TEXT = {"type": "number", "default": 0}, {"type": "string", "enum": ["x"]}
CALLS = [
    {"messages": [asked(deep=[{"b": 2}], a=1)], "tools": offered(a=NUMBER)},
    {"messages": [asked(deep=[{"c": 3}], b="x")], "tools": offered(b=TEXT)},
]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_arguments_and_tools_are_those_that_were_written(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix}", CALLS)
    assert pa.Table.from_pylist(CALLS).to_pylist() != CALLS
    assert values(file) == CALLS
    format = MessageList("messages", "role", tool_calls="<{}>")
    assert [format.read(row)[-1].content for row in values(file)] == [
        '<[{"name": "f", "arguments": {"deep": [{"b": 2}], "a": 1}}]>',
        '<[{"name": "f", "arguments": {"deep": [{"c": 3}], "b": "x"}}]>',
    ]


def test_other_nulls_stay(tmp_path):
    row = {"messages": [asked(a=None)], "tools": offered(a=None)}
    assert values(write(tmp_path / "a.jsonl", [row])) == [row]
    row = {"tools": None, "content": {"a": None}, "messages": [{"content": None, "weight": None}]}
    assert without_added(row) == row
    assert without_added({"tools": [None, {"a": [None], "b": None}]}) == {
        "tools": [None, {"a": [None]}]
    }


MANY = 40_000


def test_a_key_that_is_there_twice_among_many_is_found_at_once(tmp_path):
    keys = ",".join(f'"k{i}": 1' for i in (*range(MANY), MANY - 1))
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{{{keys}}}\n')
    start = time.process_time()
    _, row = read(tmp_path / "a.jsonl")
    assert f"the key 'k{MANY - 1}' is there twice" in str(row.value)
    assert time.process_time() - start < 5  # half a minute where each is compared with each


def test_a_header_of_many_columns_is_read_at_once_and_its_error_is_short(tmp_path):
    names = [f"c{i}" for i in range(MANY)]
    start = time.process_time()
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("1" * MANY) + "\n")
    (row,) = read(tmp_path / "a.csv")
    assert len(row.value) == MANY
    (tmp_path / "b.csv").write_text(",".join(names + names) + "\n")
    with pytest.raises(DataError, match=r"names c0, .* and 39995 others more than once") as error:
        read(tmp_path / "b.csv")
    assert len(str(error.value)) < 300
    assert time.process_time() - start < 5


# Values of `datasets`' type Json


MIXED = [
    {"question": "2+2?", "answer": 4, "meta": {"a": None}},
    {"question": "capital?", "answer": "Paris", "meta": {"b": [1, "x"]}},
    {"question": "none?", "answer": None, "meta": None},
]
MIXED_CALLS = [
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}
    for call, tool in (
        ({"name": "f", "arguments": {"a": 1}}, {"name": "f", "parameters": {"x": {"type": "int"}}}),
        ({"name": "g", "arguments": {"b": "z"}}, {"name": "g", "parameters": {"y": 2.0}}),
    )
]
PARTS = [
    {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}]},
]


@pytest.mark.parametrize("rows", [MIXED, MIXED_CALLS, PARTS])
def test_the_type_json_means_what_the_json_file_says(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert "Json(" in str(data.features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "a.parquet") == values(tmp_path / "saved") == values(file) == rows


def test_a_damaged_value_of_the_type_json(tmp_path):
    for name, text in (("a", '{"a": 1, "a": 2}'), ("b", "{"), ("c", "[" * 10**5)):
        table = pa.table({"x": pa.array(["1", text]).cast(pa.json_())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        good, bad = read(tmp_path / f"{name}.parquet")
        assert good.value == {"x": 1}
        assert "broken JSON in the column 'x'" in str(bad.value)


def test_a_small_parquet_file_of_long_repeated_texts_takes_little_memory(tmp_path):
    text = pa.array(["a" * 20_000_000]).dictionary_encode()
    file = tmp_path / "a.parquet"
    table = pa.table({"question": text.take(pa.array([0] * 40)), "answer": ["b"] * 40})
    pq.write_table(table, file, compression="zstd")
    assert file.stat().st_size < 10_000
    del table
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    seen = 0
    for row in file_rows(file):
        assert len(row.value["question"]) == 20_000_000
        assert pa.total_allocated_bytes() - before < 200_000_000
        seen += 1
    assert seen == 40


def test_repeated_columns_within_others_are_read_as_before(tmp_path):
    words = [{"role": "user", "content": "x" * 10_000_000}, {"role": "assistant", "content": "é"}]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": words}] * 3), file, compression="zstd")
    assert [row.value for row in file_rows(file)] == [{"messages": words}] * 3


def test_a_column_that_is_stored_in_next_to_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_plugin.data.rows.LARGEST", 1_000_000)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["a" * 2_000_000]}), file, compression="zstd")
    with pytest.raises(DataError, match=r"a\.parquet: the column question takes 2\d+ bytes, which"):
        list(file_rows(file))
