"""One process at a time in a folder."""

import errno
import fcntl
import multiprocessing
import os
from contextlib import suppress

import pytest
from phi3_plugin.recipes.lora_finetune import Finetune

from phi3_plugin.checkpoint.files import sweep, whole_folder
from phi3_plugin.errors import OutputError
from phi3_plugin.lock import HOLDER, LOCK, FolderLock
from tests.own import TINY, merged

FORK = multiprocessing.get_context("fork")  # a new Python would import torch first


def hold(path, held, end):
    """Have a folder until told to end."""
    with FolderLock(path, "output_dir"):
        held.set()
        end.wait()


def write(path, held, end):
    """Be writing a folder until told to end."""
    with whole_folder(path) as partial:
        (partial / "file").write_text("half")
        held.set()
        end.wait()


def contend(path, inside, taken, failed):
    """Take and release a folder over and over; two that have it at once find each other."""
    for _ in range(150):
        with suppress(OutputError), FolderLock(path, "output_dir"):
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                failed.value += 1
                continue
            taken.value += 1
            os.unlink(inside)


@pytest.mark.parametrize("is_new", [True, False])
def test_of_many_processes_one_has_it_at_a_time(is_new, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_plugin.lock.WAIT", 0.0)
    folder = tmp_path / "run"
    if not is_new:  # else whoever lets go removes the folder too
        folder.mkdir()
        (folder / "file").touch()
    taken, failed = FORK.Value("i"), FORK.Value("i")
    args = (folder, tmp_path / "inside", taken, failed)
    processes = [FORK.Process(target=contend, args=args) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert failed.value == 0
    assert taken.value > 100
    assert {path.name for path in folder.glob("*")} == (set() if is_new else {"file"})


@pytest.fixture
def other():
    """Start another process, and return it once it has what it wants, with what ends it."""
    started = []

    def start(work, path):
        held, end = FORK.Event(), FORK.Event()
        started.append(FORK.Process(target=work, args=(path, held, end)))
        started[-1].start()
        assert held.wait(60)
        return started[-1], end

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path, other):
    first, _ = other(hold, tmp_path)
    with pytest.raises(OutputError, match=rf"output_dir: .*process {first.pid} on host"):
        FolderLock(tmp_path, "output_dir")


def test_a_killed_process_leaves_no_lock(tmp_path, other):
    first, _ = other(hold, tmp_path)
    first.kill()
    first.join()
    assert (tmp_path / HOLDER).exists()  # it had no time to remove it
    FolderLock(tmp_path, "output_dir").release()


@pytest.fixture
def without_flock(monkeypatch):
    """A network file system that passes no locks on."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize(
    ("host", "pid", "is_stale"),
    [
        (None, None, True),  # of a process that is gone
        (None, os.getppid(), True),  # whose number another has by now
        ("another", None, False),
    ],
)
def test_without_the_system_a_lock_is_stale_once_its_process_is_gone(
    host, pid, is_stale, tmp_path, other, without_flock
):
    first, _ = other(hold, tmp_path)
    first.kill()
    first.join()
    lines = (tmp_path / LOCK).read_text().splitlines()
    lines[:2] = [str(pid or lines[0]), host or lines[1]]
    (tmp_path / LOCK).write_text("\n".join(lines) + "\n")
    if is_stale:
        FolderLock(tmp_path, "output_dir").release()
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(OutputError, match=rf"process {first.pid} on .*remove .*{LOCK}"):
            FolderLock(tmp_path, "output_dir")


def test_a_process_may_take_its_own_folder_again_and_leaves_nothing(tmp_path):
    first, second = FolderLock(tmp_path, "a"), FolderLock(tmp_path, "b")
    first.release()
    assert (tmp_path / HOLDER).exists()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(KeyError), FolderLock(tmp_path / "new" / "eval", "output_dir"):
        raise KeyError
    with FolderLock(tmp_path / "old", "output_dir"):
        (tmp_path / "old" / "file").touch()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["file"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "host": 1, "since": 2}'])
def test_a_damaged_note_of_the_holder_is_said_to_tell_nothing(tmp_path, other, text):
    other(hold, tmp_path)
    (tmp_path / HOLDER).write_text(text)
    with pytest.raises(OutputError, match=HOLDER):
        FolderLock(tmp_path, "output_dir")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output_dir: .*file"):
        FolderLock(tmp_path / "file" / "run", "output_dir")


def test_what_another_process_is_writing_is_neither_swept_nor_replaced(tmp_path, other):
    writer, end = other(write, tmp_path / "merged")
    sweep(tmp_path)
    refused = pytest.raises(OutputError, match="being written by another process")
    with refused, whole_folder(tmp_path / "merged"):
        pass
    end.set()
    writer.join()
    assert (tmp_path / "merged" / "file").read_text() == "half"


def test_what_a_killed_process_was_writing_is_swept(tmp_path, other):
    writer, _ = other(write, tmp_path / "merged")
    writer.kill()
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == [".partial-merged"]
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_a_folder_ends_before_it_reads_data(cwd, other):
    first, _ = other(hold, cwd / "out")
    with pytest.raises(OutputError, match=f"output_dir: .*process {first.pid}"):
        Finetune(merged(*TINY, "output_dir=out", cwd=cwd))


def test_a_run_that_has_ended_lets_the_folder_go(whole):
    assert not (whole / HOLDER).exists()
