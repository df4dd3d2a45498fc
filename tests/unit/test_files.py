"""Files and folders are whole or not there; tensors are read when they are used."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from phi3_plugin.checkpoint import files as module
from phi3_plugin.checkpoint.files import (
    append_whole,
    check_output,
    restore,
    save_tensors,
    stored_tensors,
    sweep,
    whole_files,
    whole_folder,
)
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import parse_config
from phi3_plugin.errors import CheckpointError, OutputError
from tests.adapters import WHOLE, adapter
from tests.oracles import MINI_4K, TINY_MHA


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
    check_output(tmp_path / "a" / "b", tmp_path / "base")
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


CONFIG = parse_config({**MINI_4K, **TINY_MHA})


@contextmanager
def small_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def to_loralib(file):
    write_loralib(file, adapter(CONFIG, WHOLE), CONFIG, merged_linear=False)


def to_torchtune(file):
    write_torchtune(file, adapter(CONFIG, WHOLE), CONFIG)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (to_loralib, "lora.pt"),
        (to_loralib, "lora.safetensors"),
        (to_torchtune, "adapter_model.pt"),
    ],
)
def test_a_full_disk_leaves_nothing(tmp_path, write, name):
    message = rf"{name} could not be written: .*File too large"
    with pytest.raises(OutputError, match=message), small_disk():
        write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(OutputError, match=r"could not be written: .*File name too long"):
        to_loralib(tmp_path / f"{'x' * 252}.pt")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match=r"lora\.pt could not be written: .*No such file"):
        to_loralib(tmp_path / "no" / "lora.pt")


def test_what_fails_elsewhere_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), whole_files(tmp_path / "a") as (partial,):
        partial.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_stays(tmp_path):
    (tmp_path / "lora.pt").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"lora\.pt exists and would be overwritten"):
        to_loralib(tmp_path / "lora.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.pt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_read_alone_and_belong_to_who_asked(tmp_path, dtype):
    tensors = {"a": torch.randn(7, 3).to(dtype), "b": torch.randn(5).to(dtype)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    opened = stored_tensors(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        for start, stop in ((0, 2), (2, 5), (4, 99), (3, 3), (9, 12), (None, -1)):
            part = opened[name][start:stop]
            assert part.dtype == dtype and torch.equal(part, value[start:stop])
            assert part.untyped_storage().nbytes() == part.nbytes  # keeps no map of the file
            part += 1
        assert torch.equal(opened[name][:], value)


def test_a_file_that_becomes_shorter_after_it_was_opened(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.randn(7, 3)})
    opened = stored_tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened["a"][:]


def test_others_may_read_what_we_write(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", {"a": torch.randn(4, 6).T}, {"about": "x"})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "about": "x"}


def test_equal_tensors_become_equal_bytes(tmp_path):
    """safetensors alone writes its metadata in an order that changes."""
    metadata = {f'{letter} é"\n': letter for letter in "phi3_plugin notes"}
    values = {"b": torch.ones(2, 3), "a": torch.arange(5, dtype=torch.bfloat16)}
    written = set()
    for n in range(8):
        save_tensors(tmp_path / f"{n}.safetensors", values, metadata)
        written.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())


@contextmanager
def full_disk(most):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.jsonl"
    append_whole(file, b"one\n")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        append_whole(file, b"two, which is too long\n")
    assert file.read_bytes() == b"one\n"
    append_whole(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"
    with pytest.raises(OSError, match="No space left"):
        append_whole(Path("/dev/full"), b"one\n")


def test_numbers_that_numpy_cannot_write_say_that_the_disk_is_full(tmp_path):
    refused = pytest.raises(OutputError, match="could not be written: the disk is full")
    with refused, whole_files(tmp_path / "a.gguf") as (partial,), full_disk(4096):
        np.zeros(10_000).tofile(partial)
    assert list(tmp_path.iterdir()) == []
