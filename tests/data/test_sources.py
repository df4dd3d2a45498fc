"""Rows of sources: filtered, cut short, and from the hub."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phi3_plugin.data.sources import Source, read_rows, read_sources
from phi3_plugin.data.template import FilterFailed
from phi3_plugin.errors import DataError
from tests.data.rows import A, B, ids, streamed


def rows(source, **options):
    return read_rows(source, **({"split": "train", "subset": None} | options))


@pytest.fixture
def rated(tmp_path):
    file = tmp_path / "rated.jsonl"
    lines = [json.dumps({"n": n, "rating": n % 3, "la ng": "en"}) for n in range(9)]
    file.write_text("\n".join([*lines[:4], "{", *lines[4:]]))
    return file


def test_filter(rated):
    left_out = []
    (source,) = read_sources(rated, filter="rating >= 1 and row['la ng'] in ['en', 'de']")
    rows = list(source.rows(left_out.append))
    assert [row.value["n"] for row in rows if isinstance(row.value, dict)] == [1, 2, 4, 5, 7, 8]
    assert [row.where.rsplit(":")[-1] for row in rows if not isinstance(row.value, dict)] == ["5"]
    assert [where.rsplit(":")[-1] for where in left_out] == ["1", "4", "8"]
    assert [row.where for row in source.rows()] == [row.where for row in rows]


def test_a_filter_that_fails_on_a_row_is_that_rows_error(rated):
    rows = streamed(rated, filter="n < 3 or rating.size > 0 or missing")
    errors = [row for row in rows if isinstance(row.value, DataError)]
    assert [row.where.rsplit(":")[-1] for row in errors] == ["4", "5", *"6789", "10"]
    unread = [row for row in errors if not isinstance(row.value, FilterFailed)]
    assert [row.where.rsplit(":")[-1] for row in unread] == ["5"]
    assert "dataset.filter 'n < 3 or rating.size > 0 or missing' failed" in str(errors[0].value)


def test_a_filter_that_nothing_passes(rated):
    rated.write_text(rated.read_text().replace("{\n", ""))
    with pytest.raises(DataError, match=r"no row of .*rated\.jsonl passes the filter 'n > 99'"):
        streamed(rated, filter="n > 99")


def test_max_samples_counts_what_passes(rated):
    rows = streamed(rated, filter="rating == 0", max_samples=2)
    assert [getattr(row.value, "get", lambda _: None)("n") for row in rows] == [0, 3]
    rows = streamed(rated, max_samples=5)
    assert [row.where.rsplit(":")[-1] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert len(streamed(rated, max_samples=99)) == 10


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
    assert rows("org/set", split="test", subset="main") == [("org/set[0]", A), ("org/set[1]", B)]
    assert hub == [(("org/set", "main"), {"split": "test"})]
    assert rows("gsm8k")[0].where == "gsm8k[0]"


def test_nulls_that_the_hub_adds_to_tools(hub):
    source = Source("x")
    source.__dict__["_hub"] = [{"tools": [{"name": "f", "b": None}], "n": None}]
    assert [row.value for row in source.rows()] == [{"tools": [{"name": "f"}], "n": None}]


def test_hub_failure(hub):
    with pytest.raises(DataError, match=r"'gone' is no local file and could not .*: no network"):
        rows("gone")


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


def test_hub_that_breaks_off(hub):
    (source,) = read_sources("lost", streaming=True)
    rows = source.rows()
    assert next(rows).value == A
    with pytest.raises(DataError, match=r"'lost' .* could not be read to its end .*: cut off"):
        next(rows)


def test_a_hub_set_of_no_known_print():
    source = Source("x")
    source.__dict__["_hub"] = [A]
    assert source.fingerprint() is None


def test_files_that_were_there_when_checked(data):
    (source,) = read_sources("data/b.jsonl")
    Path("data/b.jsonl").unlink()
    for use in (lambda: list(source.rows()), source.fingerprint):
        with pytest.raises(DataError, match=r"b\.jsonl cannot be read: "):
            use()


def test_only_what_is_needed_is_read(tmp_path):
    packed = gzip.compress(f"{json.dumps(B)}\n".encode() * 10**5, mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-9])
    assert ids(tmp_path / "a.jsonl.gz", max_samples=3) == [2, 2, 2]
