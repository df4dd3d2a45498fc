"""From sources to a store: what is said of rows that are none, and of files that change."""

import json

import pytest

from phi3_plugin.data import chat_dataset
from phi3_plugin.data import formats as f
from phi3_plugin.data.dataset import Reading
from phi3_plugin.errors import DataError


def test_a_filter_that_fails_is_told_from_a_row_that_cannot_be_read(tmp_path, tokenizer):
    file = tmp_path / "rated.jsonl"
    rows = [{"question": "u", "answer": "a", "rating": n} for n in (1, 5, "5", None)]
    file.write_text("\n".join(["{", *map(json.dumps, rows)]))
    options = {"filter": "rating >= 4", "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match="3 of 5 rows cannot be used"):
        chat_dataset(tokenizer, file, **options)
    data = chat_dataset(tokenizer, file, bad_rows="drop", **options)
    assert len(data) == 1
    assert data.findings.counts == {f.BROKEN: 1, f.UNUSABLE: 2, f.FILTERED: 1}


def test_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, monkeypatch):
    file, row = tmp_path / "pairs.jsonl", {"question": "u", "answer": "a"}
    file.write_text(json.dumps(row))
    rows = Reading.rows

    def changed(reading, number, source):
        yield from rows(reading, number, source)
        file.write_text(json.dumps({**row, "answer": "b"}))

    monkeypatch.setattr(Reading, "rows", changed)
    with pytest.raises(DataError, match="changed while they were read"):
        chat_dataset(tokenizer, file, cache_dir=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
