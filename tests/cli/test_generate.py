"""`generate`: prompts from every source, answers in every form, and none of them lost."""

import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from phi3_plugin.recipes import phi3_demo_checkpoint, phi3_generate
from safetensors.torch import save_file

from phi3_plugin.errors import AdapterError, ConfigError, DataError, MissingFileError, OutputError
from tests import warm
from tests.answers import keys, without_system
from tests.commands import generate as run

ROWS = [{"prompt": f"Add: {words}", "id": n} for n, words in enumerate(["one", "two", "one two"])]


def of_file(**more):
    return keys(prompts="prompts.jsonl", output="out.jsonl", **more)


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read(name):
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


@pytest.fixture
def here(cwd, monkeypatch):
    """A folder with a checkpoint, in which paths are short."""
    monkeypatch.chdir(cwd)
    write("prompts.jsonl", ROWS)
    return cwd


# Answers.


def test_a_file_of_prompts_becomes_a_file_of_answers_in_its_order(here, capsys):
    assert run(of_file(batch_size=2)) == 0
    rows = read("out.jsonl")
    assert [{key: row[key] for key in ("prompt", "id")} for row in rows] == ROWS
    assert set(rows[0]) == {"prompt", "id", "answer", "reason", "tokens", "prompt_tokens"}
    assert sorted(file.name for file in here.glob("out*")) == ["out.jsonl"]
    said = capsys.readouterr()
    assert said.out == "" and "Wrote 3 answers to out.jsonl. Cut off: " in said.err
    run(keys(prompts="prompts.jsonl", batch_size=1))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_a_typed_prompt_is_answered_as_it_comes(here, capsys):
    assert run(keys(prompt=["Add: one"])) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "The answer was cut at 6 tokens (max_new_tokens)."
    run(keys(prompt=["Add: one", "Add: two"], output="out.jsonl"))
    first = read("out.jsonl")[0]
    assert first["prompt"] == "Add: one" and said.out == first["answer"] + "\n"
    run(keys(prompt=["Add: one", "Add: two"]))
    said = capsys.readouterr()
    assert said.out.startswith(first["answer"] + "\n") and "[2] Add: two\n" in said.err


def test_raw_text_gets_no_template(here):
    run(keys(prompt=["one two"], raw=True, output="out.jsonl"))
    assert read("out.jsonl")[0]["prompt_tokens"] == 2
    with pytest.raises(ConfigError, match="system: there is no system message without"):
        run(keys(prompt=["one"], raw=True, system="x"))
    write("prompts.jsonl", [{"messages": [{"role": "user", "content": "one"}]}])
    with pytest.raises(DataError, match="line 1: messages is list; without a chat template"):
        run(of_file(raw=True, overwrite=True))


def test_system_messages_that_the_template_leaves_out_are_told(here, caplog):
    other = {"checkpoint_dir": str(without_system(here / "base", here / "other"))}
    with pytest.raises(ConfigError, match="leaves system messages out"):
        run(keys(prompt=["one two"], system="x", **other))
    turns = [{"role": role, "content": "one"} for role in ("system", "user")]
    write("prompts.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match="line 1: the chat template leaves out the system message"):
        run(of_file(**other))
    assert run(of_file(dropped="warn", **other)) == 0
    assert "leaves out the system message (1 times)" in caplog.text


def test_stop_texts_end_an_answer(here):
    run(of_file(max_new_tokens=30))
    said = next(row["answer"] for row in read("out.jsonl") if len(row["answer"]) > 8)
    run(of_file(max_new_tokens=30, stop=[said[4:6]], overwrite=True))
    assert said[: said.index(said[4:6])] in [row["answer"] for row in read("out.jsonl")]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, ConfigError, "prompts is not set. Give a prompt in quotes"),
        ({"prompt": ["a b"], "prompts": "x"}, ConfigError, "prompt and prompts: both are given"),
        ({"prompt": ["2", "+", "2"]}, ConfigError, 'Put a prompt in quotes: "2 [+] 2"'),
        ({"prompts": "absent.jsonl"}, MissingFileError, "prompts: absent.jsonl is not there"),
        ({"prompts": "."}, DataError, "cannot be read: Is a directory"),
        ({"prompts": "a.json"}, ConfigError, "a.json must end in .jsonl, with .* or in .txt"),
        ({"output": "no/out.jsonl"}, OutputError, "output: no is no folder. Make it first."),
        ({"output": "."}, OutputError, "output: . is a folder"),
        ({"output": "base/x.jsonl"}, OutputError, "is inside the base model"),
        ({"prompts": "p.jsonl", "output": "./p.jsonl"}, OutputError, "holds the prompts"),
        ({"stop": ["<|ende|>"]}, ConfigError, "stop: '<.ende.>' would never be .*<.end.>"),
        ({"temprature": 1}, ConfigError, "temprature: 1 is given, .* Did you mean 'temperature'?"),
        ({"top_p": 3, "dropped": 1}, ConfigError, "(?s)top_p: 3.*dropped: 1"),
        ({"checkpoint_dir": "absent"}, MissingFileError, "checkpoint_dir: absent is not a folder"),
        ({"checkpoint_dir": None}, ConfigError, "checkpoint_dir is not set"),
    ],
)
def test_mistakes_are_told(here, given, kind, message):
    with pytest.raises(kind, match=message):
        run(keys(**given))


def test_a_folder_that_is_no_checkpoint_is_told(here):
    Path("empty").mkdir()
    with pytest.raises(MissingFileError, match=r"empty has no tokenizer.json"):
        run({**keys(prompt=["one two"]), "checkpoint_dir": "empty"})


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_recipe_does_the_same(here):
    words = [f"{key}={value}" for key, value in of_file(temprature=1).items()]
    command = ("tune", "run", "phi3_generate", "--config", "phi3_generate")
    done = warm.run(*command, *words, cwd=here)
    assert done.returncode == 1
    assert "phi3_generate has no such key. Did you mean 'temperature'?" in done.stderr
    done = warm.run(*command, *words[:-1], cwd=here)
    assert done.returncode == 0, done.stderr
    recipe = read("out.jsonl")
    run(of_file(overwrite=True))
    assert read("out.jsonl") == recipe


def test_a_dash_in_yaml_is_standard_input(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Add: one")))
    assert run(keys(prompts=[None], output="out.jsonl")) == 0
    assert read("out.jsonl")[0]["prompt"] == "Add: one"


def write_adapter(folder, width):
    """Write an adapter on o_proj of each layer, random in every value."""
    random, weights = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_"
        weights[f"{name}A.weight"] = torch.randn(4, width, generator=random)
        weights[f"{name}B.weight"] = torch.randn(width, 4, generator=random)
    keys = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["o_proj"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**keys, "task_type": "CAUSAL_LM"}))
    save_file(weights, folder / "adapter_model.safetensors")


def test_an_adapter_answers_otherwise_and_must_be_of_the_base(here):
    write_adapter(here / "adapter", phi3_demo_checkpoint.HIDDEN)
    write_adapter(here / "other", 64)
    run(of_file())
    run(of_file(adapter="adapter", overwrite=True) | {"output": "adapted.jsonl"})
    answers = [[row["answer"] for row in read(name)] for name in ("out.jsonl", "adapted.jsonl")]
    assert answers[0] != answers[1]
    with pytest.raises(AdapterError, match="o_proj"):
        run(of_file(adapter="other") | {"output": "none.jsonl"})
    with pytest.raises(MissingFileError, match="is the folder of an adapter"):
        shutil.copytree(here / "base", here / "adapter", dirs_exist_ok=True)
        run(keys(prompt=["one two"]) | {"checkpoint_dir": "adapter"})
    assert not list(here.glob("none*"))


# Prompts.


@pytest.mark.parametrize("data", ["Add: one\r\nAdd: two\r\n\r\n", "\ufeffAdd: one\nAdd: two"])
@pytest.mark.parametrize("source", ["a.txt", "-", "without_suffix"])
def test_text_is_a_prompt_a_line(here, monkeypatch, capsys, data, source):
    if source == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    else:
        Path(source).write_bytes(data.encode())
    assert run(keys(prompts=source, max_new_tokens=1)) == 0
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["prompt"] for row in rows] == ["Add: one", "Add: two"]


def test_standard_input_may_be_json_lines(here, monkeypatch):
    data = '\n{"prompt": "Add: one", "id": 7}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert run(keys(prompts="-", output="out.jsonl")) == 0
    assert read("out.jsonl")[0]["id"] == 7


def test_messages_are_asked_without_the_reference(here):
    user, reference = {"role": "user", "content": "Add: one"}, {"role": "assistant", "content": "x"}
    system = {"role": "system", "content": "two"}
    write(
        "prompts.jsonl",
        [
            {"messages": [user]},
            {"messages": [user, reference]},
            {"messages": [system, user]},
            {"conversations": None, "prompt": [user]},
        ],
    )
    run(of_file())
    bare, referenced, with_system, listed = read("out.jsonl")
    assert referenced["messages"] == [user, reference]
    assert bare["answer"] == referenced["answer"] == listed["answer"]
    assert with_system["prompt_tokens"] > bare["prompt_tokens"]
    run(keys(prompts="prompts.jsonl", output="other.jsonl", system="two"))
    given = [row["prompt_tokens"] for row in read("other.jsonl")]
    assert given == [with_system["prompt_tokens"]] * 4  # its own one, or the one for all


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": " "}], "line 2: the prompt is empty"),
        ([{"prompt": "one " * 600}], r"line 1: \d\d\d tokens, but the model has 512 positions"),
        ([{"prompts": "a"}], "line 1: there is neither .*; did you mean 'prompt' by 'prompts'?"),
        ([{"prompt": "a", "messages": []}], "line 1: there are prompt and messages"),
        ([["a"]], "line 1: list, expected an object"),
        ([{"prompt": 3}], "line 1: prompt is int, expected a text"),
        ([{"messages": []}], "line 1: messages is empty"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "line 1: nothing is said"),
        ([{"messages": [{"role": "user"}]}], "line 1: .*content"),
        ([{"prompt": "\ud800"}], "line 1: .*half a surrogate pair"),
        ([{"prompt": ""}] * 20, r"\.\.\. and 10 more\."),
        ([], "prompts.jsonl holds no prompts"),
    ],
)
def test_bad_rows_are_listed_before_a_model_is_loaded(here, monkeypatch, rows, message):
    monkeypatch.delattr(phi3_generate, "load_model")
    write("prompts.jsonl", rows)
    with pytest.raises(DataError, match=message):
        run(of_file())
    assert not list(here.glob("out*"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: broken JSON"),
        (b'{"prompt": "a"}\n\n{"prompt": "\xe9"}\n', r"is not UTF-8 \(line 3\)"),
        ("a".encode("utf-16"), r"is not UTF-8 \(line 1\)"),
        (b"", "holds no prompts"),
    ],
)
def test_broken_files_are_told(here, data, message):
    Path("prompts.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        run(of_file())


def test_an_empty_line_between_prompts_is_told(here):
    Path("a.txt").write_text("one\n\ntwo\n")
    with pytest.raises(DataError, match="line 2: the prompt is empty"):
        run(keys(prompts="a.txt"))


# No answer is lost, and no file that is not ours.


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Let what writes answers end in the middle; return how to undo that."""
    stock = phi3_generate.Generator.answers

    def answers(self, *given, **more):
        for n, answer in enumerate(stock(self, *given, **more)):
            if n == count:
                raise error
            yield answer

    monkeypatch.setattr(phi3_generate.Generator, "answers", answers)
    return lambda: monkeypatch.setattr(phi3_generate.Generator, "answers", stock)


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
    stock = phi3_generate.load_generator

    def slow(*arguments):
        Path("out.jsonl").write_text("precious")
        return stock(*arguments)

    monkeypatch.setattr(phi3_generate, "load_generator", slow)
    with pytest.raises(OutputError, match=r"it is there by now. out.jsonl.part holds 3 answers"):
        run(of_file())
    assert Path("out.jsonl").read_text() == "precious"


@pytest.mark.parametrize("what", [{"prompt": ["Add: one"]}, {"prompts": "prompts.jsonl"}])
def test_a_standard_output_that_cannot_be_written_is_told(here, monkeypatch, what):
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
