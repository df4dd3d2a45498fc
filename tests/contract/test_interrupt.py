"""Signals, kills and full disks: the run can always go on, and ends in the same bits."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from phi3_plugin.recipes import lora_finetune

from benchmarks import kills
from phi3_plugin.launch import STOPPED
from phi3_plugin.lock import FolderLock
from phi3_plugin.train import checkpoints as run
from tests import warm
from tests.chosen import some
from tests.own import RUN, assert_same_end, lines, own_run, same, state, train
from tests.stock import TUNE

pytestmark = pytest.mark.slow

RARELY = ("save_every_n_steps=4", "save_every_epoch=False")
OF_TWO = ("gradient_accumulation_steps=1", "epochs=2")
"""So that two processes make the steps of one."""


def at_call(count, stock, action):
    """Do something within the count-th call of a function."""
    left = count

    def function(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            action()
        return stock(*args, **kwargs)

    return function


SIGNALS = [
    pytest.param(signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("where", "call", "step"),
    some(
        [
            ("train_step", 1, 1),
            ("train_step", 5, 5),
            ("train_step", 9, 9),  # the last: the run is simply finished
            ("validate", 2, 4),
            ("export_adapter", 3, 4),  # after the two bests of steps 2 and 4
        ],
        quick={("train_step", 5, 5), ("train_step", 9, 9), ("export_adapter", 3, 4)},
    ),
)
def test_a_signal_ends_the_run_after_its_step(
    where, call, step, number, whole, cwd, monkeypatch, capsys
):
    stock = getattr(lora_finetune, where)
    send = at_call(call, stock, lambda: os.kill(os.getpid(), number))
    with monkeypatch.context() as patch:
        patch.setattr(lora_finetune, where, send)
        stopped = train(cwd, *RARELY)
    assert stopped.state.step == step
    assert stopped.exit_code == (0 if step == 9 else 128 + number)
    last = capsys.readouterr().out.splitlines()[-1].strip()
    if step == 9:
        assert last == f"Saved {cwd / 'out' / 'final'}."
    else:
        folder = cwd / "out" / run.step_name(step)
        assert last == f"Saved {folder}. Repeat the command with resume=auto to go on."
        assert train(cwd, *RARELY, "resume=auto").last.folder == folder
    assert_same_end(cwd / "out", whole)


def test_a_signal_before_the_first_step_leaves_nothing_and_the_run_starts_anew(
    whole, cwd, monkeypatch
):
    stock = lora_finetune.Finetune.setup_model
    send = at_call(1, stock, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(lora_finetune.Finetune, "setup_model", send)
        with pytest.raises(SystemExit) as end:
            train(cwd, *RARELY)
    assert end.value.code == STOPPED
    assert not (cwd / "out").exists()
    assert train(cwd, *RARELY, "resume=auto").last.folder is None
    assert_same_end(cwd / "out", whole)


def signalled(number, *settings, cwd, processes):
    """Run from the command line, send a signal after the second step, and return how it ended."""
    many = ("--nproc_per_node", str(processes)) if processes > 1 else ()
    command = ("tune", "run", *many, "phi3_lora_finetune", "--config", "phi3_mini_lora", *settings)
    process = warm.begin(*command, cwd=cwd)
    while process.poll() is None and kills.last_step(cwd / "out") < 2:
        time.sleep(0.01)
    process.send_signal(number)
    said, error = process.communicate(timeout=120)
    return process.returncode, error + said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_from_the_command_line_the_exit_code_names_the_signal(number, whole, cwd):
    """The run has saved; a command that waits for its result must not go on."""
    code, said = signalled(number, *RUN, *RARELY, cwd=cwd, processes=1)
    assert code == 128 + number, said
    assert said.splitlines()[-1].endswith("Repeat the command with resume=auto to go on.")
    train(cwd, *RARELY, "resume=auto")
    assert_same_end(cwd / "out", whole)


@pytest.fixture(scope="module")
def whole_of_two(inputs):
    done = own_run(*RUN, *RARELY, *OF_TWO, "output_dir=whole_of_two", cwd=inputs, processes=2)
    assert done.returncode == 0, done.stderr
    return inputs / "whole_of_two"


@pytest.mark.parametrize("number", SIGNALS)
def test_two_processes_whose_launcher_gets_a_signal_end_in_the_same_bits_too(
    number, whole_of_two, cwd
):
    settings = (*RUN, *RARELY, *OF_TWO)
    code, said = signalled(number, *settings, cwd=cwd, processes=2)
    assert code == 128 + number, said
    assert "Repeat the command with resume=auto to go on." in said
    assert "Traceback" not in said and "SignalException" not in said, said
    done = own_run(*settings, "resume=auto", cwd=cwd, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_end(cwd / "out", whole_of_two)


def test_workers_end_with_a_launcher_that_is_killed(cwd):
    command = [TUNE, "run", "--nproc_per_node", "2", "phi3_lora_finetune", "--config"]
    command += ["phi3_mini_lora", *RUN, *RARELY, *OF_TWO, "epochs=200"]
    launcher = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while launcher.poll() is None and kills.last_step(cwd / "out") < 2:
        time.sleep(0.01)
    workers = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.read_text().rpartition(")")[2].split()[1] == str(launcher.pid)
    ]
    assert len(workers) == 2
    launcher.kill()
    said, _ = launcher.communicate(timeout=60)  # ends when the last worker has closed the pipe
    # They saved what they had, as for any SIGTERM, and nobody holds the folder any more.
    assert b"Repeat the command with resume=auto to go on." in said
    FolderLock(cwd / "out", "output_dir").release()


@pytest.mark.exhaustive
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    kills.prepare(tmp_path, rows=80)
    rows = list(kills.kill_and_resume(tmp_path, 3, random.Random(0), epochs=8))
    kills.undisturbed(tmp_path, epochs=8)
    assert [row.skipped for row in rows] == [""] * 4
    assert kills.compare(tmp_path / "killed", tmp_path / "whole") == dict.fromkeys(
        ("final adapter", "optimizer, schedule, random numbers", "metrics"), True
    )


@pytest.fixture
def small_disk(cwd):
    """A disk with room for the first checkpoint, but not for the second."""
    (cwd / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(cwd / "disk")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield cwd / "disk"
    subprocess.run(["umount", str(cwd / "disk")], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(whole, cwd, small_disk):
    settings = (*RUN, *RARELY, "keep_best=False", "output_dir=disk/out")
    done = own_run(*settings, cwd=cwd)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("phi3_plugin: OutputError: disk/out/step_000008 could not be written:")
    assert "No space left on device" in last
    assert "Traceback" not in done.stderr
    assert run.find(small_disk / "out", "auto") == (small_disk / "out" / "step_000004", {})
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    done = own_run(*settings, "resume=auto", cwd=cwd)
    assert done.returncode == 0, done.stderr
    expected = state(whole / "final")
    assert same(state(small_disk / "out" / "final"), expected)
    assert lines(small_disk / "out") == lines(whole)
