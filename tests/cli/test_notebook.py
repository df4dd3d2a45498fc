"""The notebook, executed on a tiny checkpoint."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune.ipynb"


def test_the_notebook_runs(inputs, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="needs the extra 'notebook'")
    import nbformat
    from nbclient import NotebookClient

    told = {"INSTALL": "no", "BASE": inputs / "base", "DATA": inputs / "rows.jsonl"}
    for key, value in {**told, "SAMPLES": 2, "OUTPUT": tmp_path / "out"}.items():
        monkeypatch.setenv(f"PHI3_{key}", str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()
    printed = json.dumps(notebook.cells)
    assert "loss" in printed


def test_the_notebook_is_kept_without_its_output():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
