"""A folder is whole or absent."""

import pytest

from phi3_plugin.checkpoint.folder import check_writable, whole_folder
from phi3_plugin.errors import OutputError


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    def write():
        with whole_folder(tmp_path / "epoch_0") as folder:
            (folder / "adapter_model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"epoch_0 could not be written: .*No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_there_under_the_final_name(tmp_path):
    with whole_folder(tmp_path / "out" / "epoch_0") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out" / "epoch_0").exists()
    assert (tmp_path / "out" / "epoch_0" / "a").read_text() == "1"


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "epoch_0").mkdir()
    with (
        pytest.raises(OutputError, match="epoch_0 exists and would be overwritten"),
        whole_folder(tmp_path / "epoch_0"),
    ):
        pass


def test_writable_is_checked_without_a_trace(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list(tmp_path.iterdir()) == []
