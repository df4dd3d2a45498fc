"""Every kind of local file, the place of each row in it, and what a broken file says."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi3_plugin.data import chat_dataset
from phi3_plugin.data.files import SUFFIXES, file_rows
from phi3_plugin.errors import DataError

A, B = {"question": "007", "answer": "x, y\r\n\u2028z"}, {"question": "é", "answer": ""}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(file, rows):
    """Write rows as the file's suffix says."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
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


def found(file):
    return list(file_rows(file))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_kind_of_file_holds_the_same(tmp_path, tokenizer, suffix):
    file = write(tmp_path / f"rows{suffix}", [A, B])
    assert [row.value for row in found(file)] == [A, B]
    same = chat_dataset(tokenizer, write(tmp_path / "same.json", [A, B]))
    assert list(chat_dataset(tokenizer, file)) == list(same)


def test_places(tmp_path):
    where = {s: [r.where for r in found(write(tmp_path / f"a{s}", [A, B]))] for s in SUFFIXES}
    listed, lines = [f"a{{}}[{i}]" for i in (0, 1)], [f"a{{}}:{n}" for n in (1, 2)]
    # A's answer spans two lines of the CSV file, whose header is line 1
    expected = {".json": listed, ".jsonl": lines, ".csv": ["a{}:2", "a{}:4"], ".parquet": listed}
    for suffix, places in where.items():
        kind = expected[suffix.removesuffix(".gz")]
        assert places == [f"{tmp_path}/{place.format(suffix)}" for place in kind]


def test_parquet_holds_messages(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", [{"messages": MESSAGES, "id": 1}] * 2)
    same = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 2)
    assert list(chat_dataset(tokenizer, file)) == list(chat_dataset(tokenizer, same))


def test_folders_and_globs_mix_kinds(tmp_path, tokenizer):
    for suffix in SUFFIXES:
        write(tmp_path / f"rows{suffix}", [A])
    (tmp_path / "notes.txt").write_text("no data")
    assert len(chat_dataset(tokenizer, tmp_path)) == len(SUFFIXES)
    assert len(chat_dataset(tokenizer, f"{tmp_path}/*.gz")) == 3


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


def test_csv_row_of_another_length(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("question,answer\na,b\nc\nd,e,f\n")
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as error:
        chat_dataset(tokenizer, tmp_path / "a.csv")
    assert str(error.value).split("\n")[1:] == [
        f"  {tmp_path}/a.csv:3: the row has 1 cells, the header has 2",
        f"  {tmp_path}/a.csv:4: the row has 3 cells, the header has 2",
    ]


def test_parquet_null(tmp_path, tokenizer):
    file = write(tmp_path / "a.parquet", [A, A | {"answer": None}])
    with pytest.raises(DataError, match=r"a\.parquet\[1\]: the assistant content is null"):
        chat_dataset(tokenizer, file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b'q,a\nx,"y', r"a\.csv:2 is broken CSV: unexpected end of data\. "),
        ("a.csv", b'q,a\nx,"y"z\n', r"a\.csv:2 is broken CSV: .* expected after"),
        ("a.csv", b"q,a,q\n1,2,3\n", r"a\.csv: the header names q more than once"),
        ("a.csv", b"\xff\xfe", r"a\.csv is not UTF-8 text"),
        ("a.csv", b"q,a\n", r"a\.csv has no rows"),
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.parquet", b"", r"a\.parquet cannot be read as Parquet: .*\. Write it again"),
        ("a.parquet", b"PAR1 x PAR1", r"a\.parquet cannot be read as Parquet: "),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz is not a whole gzip file: "),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:12] + b"\xff" * 20, "not a whole gzip file"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz must end in \.json, .* or \.parquet\."),
    ],
)
def test_broken_files(tmp_path, tokenizer, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        chat_dataset(tokenizer, tmp_path / name)


def test_parquet_with_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["q", "q"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the header names q more than once"):
        found(tmp_path / "a.parquet")


def test_a_damaged_parquet_page(tmp_path):
    file = write(tmp_path / "a.parquet", [A] * 50)
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        found(file)
