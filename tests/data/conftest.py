import json

import pytest

from phi3_plugin.data import phi3_tokenizer
from tests.assets import assets_dir
from tests.data.rows import A, B
from tests.data.tiny import write_checkpoint
from tests.data.variants import BUILT, FROM_ASSETS


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def tokenizer(folder):
    return phi3_tokenizer(folder)


@pytest.fixture(
    scope="session",
    params=[*BUILT, *(pytest.param(name, marks=pytest.mark.assets) for name in FROM_ASSETS)],
)
def supported(request, tmp_path_factory):
    """A checkpoint folder of each revision."""
    folder = tmp_path_factory.mktemp("supported") / request.param
    if request.param in BUILT:
        return BUILT[request.param](folder)
    if assets_dir() is None:
        pytest.skip("the published tokenizers are not here: set PHI3_ASSETS")
    return FROM_ASSETS[request.param](folder)


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
