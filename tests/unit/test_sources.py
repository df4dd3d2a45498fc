"""Rows of every kind of file and of the hub: the place of each, and what broken ones say."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from phi3_plugin.data.formats import MessageList
from phi3_plugin.data.sources import (
    SUFFIXES,
    Filtered,
    FilterFailed,
    Source,
    compile_filter,
    elements,
    file_rows,
    lines,
    read_sources,
    without_added,
)
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

A, B = {"question": "007", "answer": "x, y\r\n\u2028z"}, {"question": "é", "answer": ""}
C = {"question": "c\x85", "answer": "d"}


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


def read(source, **options):
    found = [row for one in read_sources(source, **options) for row in one.rows()]
    return [row for row in found if not isinstance(row.value, Filtered)]


def values(source, **options):
    return [row.value for row in read(source, **options)]


def places(rows):
    return [row.where.rsplit(":")[-1] for row in rows]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of two files with rows and one without, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in (A, C))
    (folder / "b.jsonl").write_text(text + "\n\n", encoding="utf-8")
    (folder / "a.json").write_text("\ufeff " + json.dumps([B]), encoding="utf-8")
    (folder / "notes.txt").write_text("no data")
    return folder


# What a source names on this machine


def test_folder_and_glob_are_read_in_order(data):
    for source in ("data", "data/", "data/*.json*", data, "./data"):
        assert values(source) == [B, A, C]
    assert values("data/[b]*") == [A, C]
    assert values("**/a.json") == [B]
    (data / "x.json").mkdir()
    assert values("data") == [B, A, C]
    (data / "b.jsonl").rename(data / "b[1].jsonl")
    assert values("data/b[1].jsonl") == [A, C]


def test_home_is_expanded(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    assert values("~/a.json") == [B]


@pytest.mark.parametrize(
    "source",
    [
        *("./x", "x.jsonl", "org/x.json", "org/x.JSON", "x.csv", "x.jsonl.gz", "a/x.parquet"),
        *("/a/b", "~/x", "a/b/c", "data/train", "..\\x"),
    ],
)
def test_no_such_path(data, source):
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        read_sources(source)


def test_glob_and_folder_without_files(data):
    (data / "empty").mkdir()
    for source in ("data/*.jsonlines", "data/empty"):
        with pytest.raises(MissingFileError, match=r"holds no file that ends in .*\.parquet\."):
            read_sources(source)


def test_files_that_were_there_when_checked(data):
    (source,) = read_sources("data/b.jsonl")
    Path("data/b.jsonl").unlink()
    for use in (lambda: list(source.rows()), source.fingerprint):
        with pytest.raises(DataError, match=r"b\.jsonl cannot be read: "):
            use()


def test_fingerprint_is_of_names_and_content(data):
    def prints(source):
        return [found.fingerprint() for found in read_sources(source)]

    before = prints(["data", "data/*.json*", "data/a.json"])
    assert before[0] == before[1] != before[2]
    (data / "more").mkdir()
    moved = (data / "a.json").rename(data / "more" / "a.json")
    assert prints(moved) == before[2:]
    assert prints(moved.rename(data / "c.json")) != before[2:]
    (data / "b.jsonl").write_text("{}")
    (data / "c.json").rename(data / "a.json")
    assert prints("data") != before[:1]


def test_fingerprints_do_not_take_one_file_for_another(tmp_path):
    for n, (one, other) in enumerate([("ab", "c"), ("a", "bc")]):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "a.json").write_text(one)
        (tmp_path / str(n) / "b.json").write_text(other)
    one, other = read_sources([str(tmp_path / "0"), str(tmp_path / "1")])
    assert one.fingerprint() != other.fingerprint()


# What a configuration may say about sources


def test_several_sources(data):
    both = ["data/b.jsonl", {"source": data / "a.json", "weight": 0.5}]
    assert values(both) == [A, C, B]
    assert [(s.name, s.weight) for s in read_sources(both)] == [
        ("data/b.jsonl", 1),
        (str(data / "a.json"), 0.5),
    ]
    assert values({"source": "data/b.jsonl", "max_samples": 1}) == [A]


def test_a_sources_own_options_go_first(data):
    own = {"source": "data/b.jsonl", "columns": {"user": "q", "assistant": "a"}, "max_samples": 1}
    first, second = read_sources([own, "data/a.json"], format="alpaca", filter="n", max_samples=9)
    assert (first.format, first.columns, first.max_samples) == (None, own["columns"], 1)
    assert (second.format, second.columns, second.max_samples) == ("alpaca", None, 9)
    assert first.filter == second.filter == "n"
    assert json.loads(json.dumps(first.settings()))["columns"] == own["columns"]


def test_configs_as_omegaconf_makes_them(data):
    columns = {"user": "q", "assistant": "a"}
    listed = [{"source": "data/b.jsonl", "weight": 2, "columns": columns}, "data/a.json"]
    config = OmegaConf.create({"source": listed, "columns": columns})
    assert read_sources(config.source, columns=config.columns) == read_sources(
        listed, columns=columns
    )
    assert type(read_sources(config.source)[0].columns) is dict


def test_every_wrong_option_is_named(data):
    listed = [
        {"source": "data/b.jsonl", "wight": 2, "weight": 0, "format": "chatml"},
        {"weight": True, "filter": "a b", "columns": {"user": "q"}},
        3,
        {"source": None, "max_samples": 0, "subset": 3, "streaming": "no", "split": None},
        {"source": "nowhere/x", "weight": float("nan"), "format": "text", "columns": {}},
    ]
    with pytest.raises(ConfigError) as error:
        read_sources(listed, format=3, filter="(")
    says = [
        "dataset.format: 3 is unknown. Known formats:",
        "dataset.filter: '(' is no expression: ",
        "dataset.source[0].wight is unknown. Known keys: source, format, columns, weight, ",
        "dataset.source[0].weight: 0 must be a number above 0",
        "dataset.source[0].format: 'chatml' is unknown",
        "dataset.source[1].source is not set. Give a ",
        "dataset.source[1].weight: True must be a number",
        "dataset.source[1].filter: 'a b' is no expression: ",
        "dataset.source[1].columns: {'user': 'q'} must name one column",
        "dataset.source[2]: 3 must be a string",
        "dataset.source[3].source is not set",
        "dataset.source[3].max_samples: 0 must be a whole number above 0",
        "dataset.source[3].subset: 3 must be text",
        "dataset.source[3].streaming: 'no' must be True or False",
        "dataset.source[3].split: None must be text",
        "dataset.source[4].weight: nan must be a number",
        "dataset.source[4].format and dataset.source[4].columns are both set",
    ]
    problems = [line for line in str(error.value).splitlines() if line.startswith("dataset")]
    assert len(problems) == len(says)
    for say in says:
        assert any(problem.startswith(say) for problem in problems), say


def test_every_missing_file_is_named(data):
    with pytest.raises(MissingFileError) as error:
        read_sources(["data/a.json", "data/x", "data/*.csv"])
    first, second = str(error.value).splitlines()
    assert first == "dataset.source: there is no file or folder data/x."
    assert "data/*.csv holds no file" in second


def test_a_split_is_not_passed_over(data):
    listed = ["data", {"source": "data/a.json", "split": "train"}, "data/x", "org/set"]
    with pytest.raises(ConfigError) as error:
        read_sources([*listed, {"source": "data/*.json", "split": "dev"}], split="test")
    first, second, third = str(error.value).splitlines()
    assert first.startswith("dataset.source: data is local and has no split 'test'. Remove split")
    assert second.startswith("dataset.source: data/*.json is local and has no split 'dev'. ")
    assert third == "dataset.source: there is no file or folder data/x."
    assert read_sources("org/set", split="test")[0].split == "test"


@pytest.mark.parametrize("source", [None, "", [], {}, {"weight": 1}])
def test_no_source(source):
    says = r"^dataset\.source(\.source)? is not set\. Give a \.json"
    with pytest.raises(ConfigError, match=says):
        read_sources(source)


# Filters


@pytest.mark.parametrize(
    ("expression", "row", "passes"),
    [
        ("lang == 'en' and rating >= 4", {"lang": "en", "rating": 4}, True),
        ("lang == 'en' and rating >= 4", {"lang": "de", "rating": 4}, False),
        ("text | length > 2", {"text": "abc"}, True),
        ("lang in ['en', 'de']", {"lang": "fr"}, False),
        ("rating is defined and rating", {}, False),
        ("messages[-1].role == 'assistant'", {"messages": [{"role": "assistant"}]}, True),
        ("row['a b'] is none", {"a b": None}, True),
        ("result > 1", {"result": 2}, True),
        ("row['row'] > 1 and row['a b']", {"row": 2, "a b": 3}, True),
        ("self > 1 and x.self > 2", {"self": 2, "x": {"self": 3}}, True),
        ("self == 1", {"self": 2}, False),
        ("self is defined", {}, False),
        ("lang is eq('en') and rating is ge(4)", {"lang": "en", "rating": 4}, True),
        ("text", {"text": ""}, False),
    ],
)
def test_filters(expression, row, passes):
    assert compile_filter(expression)(row) is passes


@pytest.mark.parametrize("expression", ["", "a b", "a >", "{{ a }}", "a | nothing", "(" * 2000])
def test_no_filter(expression):
    with pytest.raises(ConfigError, match=r"dataset\.filter: .* is no expression: "):
        compile_filter(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("missing", "missing > 1", "self", "text > 1", "text.__class__.__mro__", "row.clear()"),
        *("messages.append(1)", "range(3)", "lipsum()", "''.join(1)", "1 // 0"),
    ],
)
def test_a_filter_that_fails(expression):
    row = {"text": "a", "messages": []}
    with pytest.raises(FilterFailed, match=r"dataset\.filter .* failed: "):
        compile_filter(expression)(row)
    assert row == {"text": "a", "messages": []}


@pytest.fixture
def rated(tmp_path):
    file = tmp_path / "rated.jsonl"
    rows = [json.dumps({"n": n, "rating": n % 3, "la ng": "en"}) for n in range(9)]
    file.write_text("\n".join([*rows[:4], "{", *rows[4:]]))
    return file


def test_rows_that_pass_a_filter(rated):
    (source,) = read_sources(rated, filter="rating >= 1 and row['la ng'] in ['en', 'de']")
    rows = list(source.rows())
    assert [row.value["n"] for row in rows if isinstance(row.value, dict)] == [1, 2, 4, 5, 7, 8]
    assert places(row for row in rows if isinstance(row.value, Filtered)) == ["1", "4", "8"]
    errors = (DataError, Filtered)
    assert places(row for row in rows if type(row.value) is errors[0]) == ["5"]


def test_a_filter_that_fails_on_a_row_is_that_rows_error(rated):
    rows = read(rated, filter="n < 3 or rating.size > 0 or missing")
    errors = [row for row in rows if isinstance(row.value, DataError)]
    assert places(errors) == ["4", "5", *"6789", "10"]
    assert places(row for row in errors if not isinstance(row.value, FilterFailed)) == ["5"]
    assert "dataset.filter 'n < 3 or rating.size > 0 or missing' failed" in str(errors[0].value)


def test_a_filter_that_nothing_passes(rated):
    rated.write_text(rated.read_text().replace("{\n", ""))
    with pytest.raises(DataError, match=r"no row of .*rated\.jsonl passes the filter 'n > 99'"):
        read(rated, filter="n > 99")


def test_max_samples_counts_what_passes(rated):
    rows = read(rated, filter="rating == 0", max_samples=2)
    assert [row.value["n"] for row in rows] == [0, 3]
    assert places(read(rated, max_samples=5)) == ["1", "2", "3", "4", "5", "6"]
    assert len(read(rated, max_samples=99)) == 10


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    class Rows(list):
        _fingerprint = "abc"

    def lost():
        yield A
        raise ConnectionError("cut off")

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "gone":
            raise ConnectionError("no network")
        return lost() if args[0] == "lost" else Rows([A, B])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub(hub):
    rows = read("org/set", split="test", subset="main")
    assert rows == [("org/set[0]", A), ("org/set[1]", B)]
    assert hub == [(("org/set", "main"), {"split": "test"})]
    assert read("gsm8k")[0].where == "gsm8k[0]"


def test_hub_is_loaded_once(hub):
    (source,) = read_sources("org/set")
    assert source.fingerprint() == source.fingerprint()
    assert [row.value for row in source.rows()] == [row.value for row in source.rows()] == [A, B]
    assert len(hub) == 1
    (other,) = read_sources("org/set", subset="b")
    assert other.fingerprint() != source.fingerprint()


def test_hub_as_a_stream(hub):
    (source,) = read_sources("org/set", streaming=True, max_samples=1)
    assert source.fingerprint() is None
    assert not hub
    assert [row.value for row in source.rows()] == [A]
    assert hub == [(("org/set", None), {"split": "train", "streaming": True})]


def test_hub_that_fails(hub):
    with pytest.raises(DataError, match=r"'gone' is no local file and could not .*: no network"):
        read("gone")
    (source,) = read_sources("lost", streaming=True)
    rows = source.rows()
    assert next(rows).value == A
    with pytest.raises(DataError, match=r"'lost' .* could not be read to its end .*: cut off"):
        next(rows)


def test_a_hub_set_of_no_known_print():
    source = Source("x")
    source.__dict__["_hub"] = [{"tools": [{"name": "f", "b": None}], "n": None}]
    assert source.fingerprint() is None
    # Nulls that the hub's tables add to tools
    assert [row.value for row in source.rows()] == [{"tools": [{"name": "f"}], "n": None}]


# Folders that `datasets` saved


def save(folder, *shards):
    """Write a data set as `save_to_disk` does, and a cache as its `map` does."""
    folder.mkdir(parents=True)
    files = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for file, rows in zip(files, shards, strict=True):
        write_arrow(folder / file, rows)
    write_arrow(folder / "cache-8508cc043eb35038.arrow", [C])
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": file} for file in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def save_parts(folder, **parts):
    for name, rows in parts.items():
        save(folder / name, rows)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    return folder


def test_caches_and_notes_are_no_data(tmp_path):
    folder = save(tmp_path / "saved", [A], [B])
    assert values(folder) == [A, B]
    (folder / "more.jsonl").write_text(json.dumps(C))  # read as in any folder
    assert values(folder) == [A, B, C]
    (tmp_path / "state.json").write_text(json.dumps([A]))
    assert values(tmp_path) == [A]


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([A, B])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "parts")
    saved = datasets.load_from_disk(tmp_path / "parts")
    saved["train"].map(lambda row: {"question": "changed"})
    assert [file.name for file in (tmp_path / "parts" / "train").glob("cache-*.arrow")]
    assert values(tmp_path / "parts") == [A, B]
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    assert values(tmp_path / "saved") == [A, B]


def test_a_split_is_a_folder(tmp_path):
    parts = str(save_parts(tmp_path / "parts", train=[A, B], test=[C]))
    assert values(parts) == values(f"{parts}/train") == [A, B]
    assert values([parts, {"source": parts, "split": "train"}], split="test") == [C, A, B]
    train, test = read_sources([parts, {"source": parts, "split": "test"}])
    assert train.fingerprint() != test.fingerprint()


@pytest.mark.parametrize("split", ["dev", "train[:1]", "..", "x/../train"])
def test_no_such_split(tmp_path, split):
    parts = save_parts(tmp_path / "parts", train=[A], test=[C])
    with pytest.raises(ConfigError, match=r"^dataset\.source: .*parts has no split '.*'\. It has:"):
        read_sources(parts, split=split)


def test_saved_files_that_are_lost(tmp_path):
    parts = save_parts(tmp_path / "parts", train=[A])
    (parts / "train").rename(parts / "moved")
    with pytest.raises(MissingFileError, match=r"there is no file or folder .*parts/train\."):
        read_sources(parts)
    folder = save(tmp_path / "saved", [A], [B])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(MissingFileError, match=r"state\.json names data-00001-of-00002\.arrow, wh"):
        read_sources(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', "\xff", "[" * 10**5]
)
def test_notes_that_are_damaged(tmp_path, text):
    folder = save(tmp_path / "saved", [A])
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"state\.json cannot be read as .*, or name its files"):
        read_sources(folder)
    parts = save_parts(tmp_path / "parts", train=[A])
    (parts / "dataset_dict.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"dataset_dict\.json cannot be read as "):
        read_sources(parts)


# The rows of one file


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
    expected = {".json": listed, ".jsonl": numbered, ".csv": [":2", ":4"]}
    expected |= {".parquet": listed, ".arrow": listed}
    for suffix in SUFFIXES:
        file = write(tmp_path / f"a{suffix}", [A, B])
        ends = expected[suffix.removesuffix(".gz")]
        assert [row.where for row in file_rows(file)] == [f"{file}{end}" for end in ends]


def test_folders_and_globs_mix_kinds(tmp_path):
    for suffix in SUFFIXES:
        write(tmp_path / f"rows{suffix}", [A])
    assert len(read(tmp_path)) == len(SUFFIXES)
    assert len(read(f"{tmp_path}/*.gz")) == 3


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


PACKED = gzip.compress(b"{}" * 99, mtime=0)


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
        ("a.json", b'\n [{"a": 1},\n\n{"a" 1}]', r"a\.json is broken JSON: .* \(line 4\)\. Expec"),
        ("a.JSONL", b"[1, 2", r"a\.JSONL is broken JSON"),
        ("a.json", b"[" * 10**5, r"a\.json is broken JSON: nested too deeply \(line 1\)"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json is not UTF-8 text"),
        ("a.json", b"[]", r"a\.json has no rows"),
        ("a.jsonl", b"\n", r"a\.jsonl has no rows"),
        ("a.csv", b"q,a\n", r"a\.csv has no rows"),
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.parquet", b"", r"a\.parquet cannot be read as Parquet: .*\. Write it again"),
        ("a.parquet", b"PAR1 x PAR1", r"a\.parquet cannot be read as Parquet: "),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz is not a whole gzip file: "),
        ("a.jsonl.gz", PACKED[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", PACKED[:12] + b"\xff" * 20, "not a whole gzip file"),
        ("a.arrow", b"", r"a\.arrow cannot be read as Arrow: .*\. Write it again"),
        ("a.arrow", b"ARROW1 x", r"a\.arrow cannot be read as Arrow: "),
        ("a.parquet.gz", b"", r"a\.parquet\.gz must end in \.json, .* or \.parquet\."),
        ("a.tsv", b"a,b", r"a\.tsv must end in \.json, .* or \.parquet"),
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
    found = [*elements(f"[1, {text}, 2]"), *(value for _, value in lines(["1", text, "2"]))]
    assert found[0::3] == [1, 1]
    assert found[2::3] == [2, 2]
    assert all(isinstance(value, DataError) and says in str(value) for value in found[1::3])


@pytest.mark.parametrize("line", [DEEP, '{"a": ' + DEEP + "}", '{"a"', "{'a': 1}", "\ufeff{}", "]"])
def test_a_broken_line_is_one_rows_error(line):
    (_, first), (_, error), (_, last) = lines(["1", line, "2"])
    assert (first, last) == (1, 2)
    assert isinstance(error, DataError)
    assert str(error).startswith("broken JSON: ")


def test_what_python_reads_though_json_has_it_not():
    (_, found) = next(lines(['[NaN, -Infinity, 1e999, "\\ud800"]']))
    assert str(found) == "[nan, -inf, inf, '\\ud800']"


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
