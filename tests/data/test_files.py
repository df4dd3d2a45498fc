"""Every kind of local file, the place of each row in it, and what a broken file says."""

import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3_plugin.data.sources import SUFFIXES, file_rows, read_sources
from phi3_plugin.errors import DataError

A, B = {"question": "007", "answer": "x, y\r\n\u2028z"}, {"question": "é", "answer": ""}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(file, rows):
    """Write rows as the file's suffix says."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    if file.suffix == ".arrow":
        return write_arrow(file, rows)
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt", encoding="utf-8", newline="") as out:
        if ".csv" in file.name:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif ".jsonl" in file.name:
            out.write("\n".join(map(json.dumps, rows)))
        else:
            out.write(json.dumps(rows))
    return file


def write_arrow(file, rows, form=pa.ipc.new_stream):
    """The stream form is what `datasets` writes."""
    table = pa.Table.from_pylist(rows)
    with form(file, table.schema) as out:
        out.write_table(table, max_chunksize=100)
    return file


def found(file):
    return list(file_rows(file))


def read(source):
    (only,) = read_sources(source)
    return list(only.rows())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [2, 1000])
def test_each_kind_of_file_holds_the_same(tmp_path, suffix, count):
    rows = [A, B] * (count // 2)
    file = write(tmp_path / f"rows{suffix}", rows)
    assert [row.value for row in found(file)] == rows


def test_places(tmp_path):
    where = {s: [r.where for r in found(write(tmp_path / f"a{s}", [A, B]))] for s in SUFFIXES}
    listed, lines = [f"a{{}}[{i}]" for i in (0, 1)], [f"a{{}}:{n}" for n in (1, 2)]
    # A's answer spans two lines of the CSV file, whose header is line 1
    expected = {".json": listed, ".jsonl": lines, ".csv": ["a{}:2", "a{}:4"]}
    expected |= {".parquet": listed, ".arrow": listed}
    for suffix, places in where.items():
        kind = expected[suffix.removesuffix(".gz")]
        assert places == [f"{tmp_path}/{place.format(suffix)}" for place in kind]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_hold_messages(tmp_path, suffix):
    rows = [{"messages": MESSAGES, "id": 1}] * 2
    assert [row.value for row in found(write(tmp_path / f"a{suffix}", rows))] == rows


def test_folders_and_globs_mix_kinds(tmp_path):
    for suffix in SUFFIXES:
        write(tmp_path / f"rows{suffix}", [A])
    (tmp_path / "notes.txt").write_text("no data")
    assert len(read(tmp_path)) == len(SUFFIXES)
    assert len(read(f"{tmp_path}/*.gz")) == 3


def test_both_forms_of_arrow(tmp_path):
    file = write_arrow(tmp_path / "a.arrow", [A, B] * 200, pa.ipc.new_file)
    assert [row.value for row in found(file)] == [A, B] * 200


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_in_upper_case(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix}", [A, B]).rename(tmp_path / f"ROWS{suffix.upper()}")
    assert [row.value for row in found(file)] == [A, B]
    assert [row.value for row in read(tmp_path)] == [A, B]


@pytest.mark.parametrize("text", ['[{"a": 1},\n{"b": [\n]}]\n', '\n\r\n {"a": 1}\n{"b": []}'])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_list_is_told_from_lines_by_its_bracket(tmp_path, text, start):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(start + text.encode())
        assert [row.value for row in found(tmp_path / name)] == [{"a": 1}, {"b": []}]


def test_a_key_that_is_there_twice_is_an_error_of_its_row(tmp_path):
    text = '[{"a": 1}, {"b": [{"a": 1, "a": 1}]}, {"a": 2}]'
    (tmp_path / "a.json").write_text(text)
    one, broken, other = found(tmp_path / "a.json")
    assert (one.value, other.value) == ({"a": 1}, {"a": 2})
    assert broken.where == f"{tmp_path}/a.json[1]"
    assert str(broken.value) == "broken JSON: the key 'a' is there twice"


def test_csv_as_spreadsheets_write_it(tmp_path):
    text = '\r\nquestion,answer,""\r\n"a ""b""",c,\r\n\r\n d ,e,f\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [(row.where.rsplit(":")[-1], row.value) for row in found(tmp_path / "a.csv")] == [
        ("3", {"question": 'a "b"', "answer": "c", "": ""}),
        ("5", {"question": " d ", "answer": "e", "": "f"}),
    ]


def test_csv_cells_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    file = write(tmp_path / "a.csv", [A | {"answer": "x" * (limit + 1)}])
    assert len(found(file)[0].value["answer"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_csv_row_of_another_length(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\nc\nd,e,f\n")
    assert [f"{row.where}: {row.value}" for row in found(tmp_path / "a.csv")[1:]] == [
        f"{tmp_path}/a.csv:3: the row has 1 cells, the header has 2",
        f"{tmp_path}/a.csv:4: the row has 3 cells, the header has 2",
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b'q,a\nx,"y', r"a\.csv:2 is broken CSV: unexpected end of data\. "),
        ("a.csv", b'q,a\nx,"y"z\n', r"a\.csv:2 is broken CSV: .* expected after"),
        ("a.csv", b"q,a,q\n1,2,3\n", r"a\.csv: the header names q more than once"),
        ("a.csv", b"\xff\xfe", r"a\.csv is not UTF-8 text"),
        ("a.csv", b"q;a\n1;2\n", r"a\.csv: .* not by ';'\. Write it again with commas"),
        ("a.csv", b"q\ta\n1\t2\n", r"a\.csv: .* not by tabs\. Write it again with commas"),
        ("a.json", b'{\n"a": 1\n}\n', r"a\.json: .* over several lines\. Expected one list"),
        (
            "a.json",
            b'\n [{"a": 1},\n\n{"a" 1}]',
            r"a\.json is broken JSON: .* \(line 4\)\. Expected one",
        ),
        ("a.JSONL", b"[1, 2", r"a\.JSONL is broken JSON"),
        ("a.json", b"[" * 10**5, r"a\.json is broken JSON: nested too deeply \(line 1\)"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json is not UTF-8 text"),
        ("a.csv", b"q,a\n", r"a\.csv has no rows"),
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.parquet", b"", r"a\.parquet cannot be read as Parquet: .*\. Write it again"),
        ("a.parquet", b"PAR1 x PAR1", r"a\.parquet cannot be read as Parquet: "),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz is not a whole gzip file: "),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz is not a whole gzip file",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 99, mtime=0)[:12] + b"\xff" * 20,
            "not a whole gzip file",
        ),
        ("a.arrow", b"", r"a\.arrow cannot be read as Arrow: .*\. Write it again"),
        ("a.arrow", b"ARROW1 x", r"a\.arrow cannot be read as Arrow: "),
        ("a.parquet.gz", b"", r"a\.parquet\.gz must end in \.json, .* or \.parquet\."),
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
            found(tmp_path / name)


def test_a_damaged_parquet_page(tmp_path):
    file = write(tmp_path / "a.parquet", [A] * 50)
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        found(file)


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_cut_off(tmp_path, form):
    file = write_arrow(tmp_path / "a.arrow", [A] * 500, form)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        found(file)


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .*directory"):
        found(tmp_path / "a.jsonl")


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
