"""A folder is whole or absent."""

import pytest
from safetensors import SafetensorError

from phi3_plugin.checkpoint import files as module
from phi3_plugin.checkpoint.files import check_writable, restore, sweep, whole_folder
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


def test_a_full_disk_as_safetensors_tells_it_is_the_same_error(tmp_path):
    def write():
        with whole_folder(tmp_path / "epoch_0"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputError, match=r"epoch_0 could not be written: .*No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


class Kill(BaseException):
    """What a SIGKILL is to the code that it interrupts: nothing after it runs."""


def write_until(call, monkeypatch, final, text):
    """Write the folder, killed at the call-th touch of the disk; say whether it came that far."""
    left, dead = call, False

    def counted(stock):
        def touch(*args, **kwargs):
            nonlocal left, dead
            left, dead = left - 1, dead or left == 0  # clean-up code does not run either
            if dead:
                raise Kill
            return stock(*args, **kwargs)

        return touch

    with monkeypatch.context() as patch:
        for owner, name in (
            (module.Path, "mkdir"),
            (module.Path, "rename"),
            (module.shutil, "rmtree"),
            (module, "_sync"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            with whole_folder(final, replace=True) as folder:
                (folder / "a").write_text(text)
        except Kill:
            return True
    return False


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(existing, tmp_path, monkeypatch):
    seen = []
    for call in range(100):
        final = tmp_path / str(call) / "best"
        if existing:
            with whole_folder(final) as folder:
                (folder / "a").write_text(existing)
        killed = write_until(call, monkeypatch, final, "new")
        restore(final.parent)
        seen.append((final / "a").read_text() if final.exists() else None)
        sweep(final.parent)
        assert [p.name for p in final.parent.glob("*")] == ["best"] * final.exists()
        if not killed:
            break
    assert len(seen) > 8
    assert seen == sorted(seen, key=lambda text: text == "new")  # never back from new to old
    assert set(seen) == {existing, "new"}


def test_restoring_and_sweeping_leave_files_and_whole_folders_alone(tmp_path):
    (tmp_path / ".partial-metrics.jsonl").write_text("1")
    (tmp_path / "best").mkdir()
    (tmp_path / ".partial-old-best").mkdir()
    restore(tmp_path)
    assert (tmp_path / ".partial-old-best").exists()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-metrics.jsonl", "best"]
    sweep(tmp_path / "not there")
