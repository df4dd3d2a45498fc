import json

import pytest

from tests.data.rows import A, B


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of two files with rows and one without, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in (A, B))
    (folder / "b.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (folder / "a.json").write_text("\ufeff " + json.dumps([B]), encoding="utf-8")
    (folder / "notes.txt").write_text("no data")
    return folder
