"""No answer is lost, and no file that is not ours: interrupts, repeats, odd places."""

import fcntl
import io
import json
import os
import sys
from pathlib import Path

import pytest
from phi3_plugin.recipes import phi3_generate

from phi3_plugin.errors import DataError, MissingFileError, OutputError
from phi3_plugin.prompts import as_line, safe
from tests.commands import generate as run
from tests.recipes.prompted import ROWS, keys, of_file, read, stop_after, write


@pytest.fixture
def here(cwd, monkeypatch):
    """A folder with a checkpoint, in which paths are short."""
    monkeypatch.chdir(cwd)
    write("prompts.jsonl", ROWS)
    return cwd


def test_what_is_there_is_not_overwritten_unasked(here):
    Path("out.jsonl").write_text("precious")
    with pytest.raises(OutputError, match=r"out.jsonl exists. .* add --overwrite"):
        run(of_file())
    assert Path("out.jsonl").read_text() == "precious"
    assert run(of_file(overwrite=True)) == 0 and len(read("out.jsonl")) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupt_keeps_answers_and_the_same_command_goes_on(
    here, capsys, monkeypatch, temperature
):
    asked, undo = of_file(temperature=temperature), stop_after(monkeypatch, 2)
    assert run({**asked, "batch_size": 1}) == 130
    said = "Stopped after 2 of 3 prompts; their answers are in out.jsonl.part. Repeat the command"
    assert said in capsys.readouterr().err and not Path("out.jsonl").exists()
    with open("out.jsonl.part", "ab") as file:
        file.write(b'{"number": 2, "ro')  # as a killed process leaves it
    undo()
    assert run({**asked, "batch_size": 3}) == 0
    assert "2 of 3 prompts are answered. Going on." in capsys.readouterr().err
    resumed = read("out.jsonl")
    assert not Path("out.jsonl.part").exists()
    run({**asked, "overwrite": True})
    assert read("out.jsonl") == resumed


def test_answers_of_another_run_are_kept_and_told(here, monkeypatch):
    undo = stop_after(monkeypatch, 1)
    run(of_file())
    before = Path("out.jsonl.part").read_bytes()
    undo()
    with pytest.raises(
        OutputError, match="holds 1 answer of a run that differs in temperature, se"
    ):
        run(of_file(temperature=1.0, seed=3))
    write("prompts.jsonl", ROWS[::-1])
    with pytest.raises(OutputError, match=r"of a run that differs in prompts. Repeat that command"):
        run(of_file())
    assert Path("out.jsonl.part").read_bytes() == before


@pytest.mark.parametrize("data", [b"mine\n", b"[]\n", b'{"phi3_generate": 3}\n', b"mine"])
def test_a_file_of_somebody_elses_is_left_alone(here, data):
    Path("out.jsonl.part").write_bytes(data)
    with pytest.raises(OutputError, match=r"was not written by this command. Move it."):
        run(of_file())
    assert Path("out.jsonl.part").read_bytes() == data


def test_two_processes_do_not_write_one_file(here):
    with open("out.jsonl.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is being written by another process"):
            run(of_file())


def test_nothing_is_left_of_a_run_without_answers(here, capsys, monkeypatch):
    stop_after(monkeypatch, 0)
    assert run(of_file()) == 130
    assert "Stopped before the first answer." in capsys.readouterr().err
    with pytest.raises(MissingFileError):
        run(of_file(adapter="absent"))
    assert not list(here.glob("out*"))


def test_an_interrupt_prints_what_is_there(here, capsys, monkeypatch):
    stop_after(monkeypatch, 2)
    assert run(keys(prompts="prompts.jsonl", batch_size=1)) == 130
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert said.err.splitlines()[-1].startswith("Stopped after 2 of 3 prompts; their answers are")


def test_a_disk_that_is_full_at_once_is_told(here, monkeypatch):
    class Full(io.RawIOBase):
        readable = writable = seekable = lambda self: True
        fileno, seek, truncate = lambda self: 2**20, lambda self, *_: 0, lambda self, *_: 0

        def readinto(self, buffer):
            return 0

        def write(self, data):
            raise OSError(28, "No space left on device")

    stock = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", **how: (
            io.BufferedRandom(Full()) if self.suffix == ".part" else stock(self, mode, **how)
        ),
    )
    with pytest.raises(OutputError, match=r"out.jsonl cannot be written: No space left on device"):
        run(of_file())


def test_a_file_that_came_meanwhile_is_not_replaced(here, monkeypatch):
    stock = phi3_generate.generator

    def slow(*arguments):
        Path("out.jsonl").write_text("precious")
        return stock(*arguments)

    monkeypatch.setattr(phi3_generate, "generator", slow)
    with pytest.raises(OutputError, match=r"it is there by now. out.jsonl.part holds 3 answers"):
        run(of_file())
    assert Path("out.jsonl").read_text() == "precious"


@pytest.mark.parametrize("what", [{"prompt": ["Add: one"]}, {"prompts": "prompts.jsonl"}])
def test_a_standard_output_that_cannot_be_written_is_told(here, monkeypatch, what):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="standard output is closed"):
        run(keys(**what))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO("/dev/full", "w")))
    with pytest.raises(OutputError, match=r"standard output cannot be written: No space left"):
        run(keys(**what))
    sys.stdout.close()  # with nothing left in it that fails again


def test_who_has_seen_enough_is_told_nothing(here, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(writing, "w")))
    assert run(keys(prompts="prompts.jsonl")) == 1
    sys.stdout.close()


def test_closed_streams_are_empty_ones(here, monkeypatch):
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(DataError, match="standard input holds no prompts"):
        run(keys(prompts="-"))
    assert run(of_file()) == 0 and len(read("out.jsonl")) == 3


def test_lines_are_lines_for_every_reader():
    row = {"a": "é\u2028\x85\ud800\n\x1b"}
    line = as_line(row)
    assert "é" in line and len(line.splitlines()) == 1 and line.encode()
    assert json.loads(line) == row


def test_a_terminal_is_not_driven():
    assert safe("a\x1b[31m\rb\x9b\u202e\tc\n👩\u200d🚀 é\u00a0") == "a[31mb\tc\n👩\u200d🚀 é\u00a0"
