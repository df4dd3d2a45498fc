"""Answers in every form, from the command and from the recipe, and what mistakes are told."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from phi3_plugin.recipes import phi3_demo_checkpoint
from phi3_plugin.recipes.phi3_generate import answered
from safetensors.torch import save_file

from phi3_plugin.errors import AdapterError, ConfigError, DataError, MissingFileError, OutputError
from phi3_plugin.generate import Answer
from tests.commands import generate as run
from tests.recipes.prompted import ROWS, keys, of_file, read, without_system, write
from tests.stock import TUNE, _run


@pytest.fixture
def here(cwd, monkeypatch):
    """A folder with a checkpoint, in which paths are short."""
    monkeypatch.chdir(cwd)
    write("prompts.jsonl", ROWS)
    return cwd


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
        ({"stop": {"Answer": "x"}}, ConfigError, "stop: .* must be a text, or a list of texts"),
        ({"raw": "yes"}, ConfigError, "raw: 'yes' must be True or False"),
        ({"batch_size": 0}, ConfigError, "batch_size: 0 must be a whole number above 0"),
        ({"adapter": 3}, ConfigError, "adapter: 3 must be text; put quotes around a number"),
        ({"dtype": "fp16"}, ConfigError, "dtype: 'fp16' must be bf16 or fp32"),
        ({"system": {"a": 1}}, ConfigError, "system: .* must be text"),
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


def test_answers_of_answers_keep_all():
    row = {"prompt": "a", "answer": 1, "given_answer": 2, "id": 3}
    answer = Answer(index=0, text="x", tokens=(5, 6), reason="stop", prompt_tokens=4)
    assert answered(row, answer) == {
        **{"prompt": "a", "given_answer": 1, "given_given_answer": 2, "id": 3},
        **{"answer": "x", "reason": "stop", "tokens": 2, "prompt_tokens": 4},
    }


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_recipe_does_the_same(here):
    words = [f"{key}={value}" for key, value in of_file(temprature=1).items()]
    command = (TUNE, "run", "phi3_generate", "--config", "phi3_generate")
    done = _run(*command, *words, cwd=here)
    assert done.returncode == 1
    assert "phi3_generate has no such key. Did you mean 'temperature'?" in done.stderr
    done = _run(*command, *words[:-1], cwd=here)
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
    for layer in range(phi3_demo_checkpoint.LAYERS):
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
