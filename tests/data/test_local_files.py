"""What a source names on this machine, and that its rows are read in order."""

import json

import pytest

from phi3_plugin.data.sources import read_rows, read_sources
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from tests.data.rows import A, B


def rows(source, **options):
    return read_rows(source, **({"split": "train", "subset": None} | options))


def values(source):
    return [row.value for row in rows(source)]


def test_lines(data):
    found = rows(data / "b.jsonl")
    assert [row.value for row in found] == [A, B]
    assert [row.where for row in found] == [f"{data}/b.jsonl:1", f"{data}/b.jsonl:2"]


def test_list(data):
    assert rows(data / "a.json") == [(f"{data}/a.json[0]", B)]


def test_lines_in_a_json_file(data):
    assert values((data / "b.jsonl").rename(data / "b.json")) == [A, B]


def test_folder_and_glob_are_read_in_order(data):
    assert values("data") == values("data/") == values("data/*.json*") == [B, A, B]
    assert values("data/[b]*") == [A, B]
    assert values("**/a.json") == [B]


def test_a_local_folder_wins_over_the_hub(data):
    assert len(values(data.name)) == 3


def test_a_path_may_hold_glob_characters(data):
    (data / "b.jsonl").rename(data / "b[1].jsonl")
    assert values("data/b[1].jsonl") == [A, B]


def test_home_is_expanded(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    assert values("~/a.json") == [B]


@pytest.mark.parametrize("source", [None, ""])
def test_not_set(source):
    with pytest.raises(ConfigError, match=r"^dataset\.source is not set\. Give a \.json"):
        rows(source)


def test_not_a_string():
    with pytest.raises(ConfigError, match=r"dataset\.source: \['a'\] must be a string"):
        rows(["a"])


@pytest.mark.parametrize(
    "source",
    [
        "./x",
        "x.jsonl",
        "org/x.json",
        "x.csv",
        "x.jsonl.gz",
        "a/x.parquet",
        "/a/b",
        "~/x",
        "a/b/c",
        "data/train",
        "..\\x",
    ],
)
def test_no_such_path(data, source):
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        rows(source)


def test_glob_and_folder_without_files(data):
    (data / "empty").mkdir()
    for source in ("data/*.jsonlines", "data/empty"):
        with pytest.raises(MissingFileError, match=r"holds no file that ends in .*\.parquet\."):
            rows(source)


def test_a_folder_named_as_a_file_is_passed_over(data):
    (data / "x.json").mkdir()
    assert values("data") == [B, A, B]


def test_no_hub_name_in_upper_case():
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        rows("org/x.JSON")


def test_broken_line_and_other_values_keep_their_place(data):
    (data / "b.jsonl").write_text('{"n": 1}\n{"n": \n[1]\nnull\n')
    found = rows(data / "b.jsonl")
    assert [row.where.rsplit(":")[-1] for row in found] == ["1", "2", "3", "4"]
    assert [str(row.value) for row in found[2:]] == [
        "the row is list, expected an object",
        "the row is null, expected an object",
    ]
    assert "broken JSON: Expecting value" in str(found[1].value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"[1, 2", r"a\.json is broken JSON: .* Expected one list"),
        ("a.jsonl", b"\xff\xfe", r"a\.jsonl is not UTF-8 text"),
        ("a.tsv", b"a,b", r"a\.tsv must end in \.json, .* or \.parquet"),
        ("a.jsonl", b"\n", r"a\.jsonl has no rows"),
        ("a.json", b"[]", r"a\.json has no rows"),
    ],
)
def test_unreadable_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        rows(tmp_path / name)


def test_old_line_ends(tmp_path):
    for end in ("\r\n", "\r"):
        (tmp_path / "a.jsonl").write_bytes(end.join(map(json.dumps, [A, B])).encode())
        assert [row.where[-1] for row in rows(tmp_path / "a.jsonl")] == ["1", "2"]
        assert values(tmp_path / "a.jsonl") == [A, B]


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
