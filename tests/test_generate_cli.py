"""What can be typed after `phi3-tune generate` and `phi3-tune chat`."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin import cli as generate_cli
from phi3_plugin.generate import Sampling

CONFIG = Path(__file__).parents[1] / "configs" / "phi3_generate.yaml"


def test_words_become_keys_in_any_order():
    words = ["generate", "--base", "b", "2 + 2?", "--temperature", "0", "--stop", "a", "3 + 3?"]
    assert generate_cli.parse_generate([*words, "--stop", "b", "--raw"]) == {
        "checkpoint_dir": "b",
        "prompt": ["2 + 2?", "3 + 3?"],
        "temperature": 0.0,
        "stop": ["a", "b"],
        "raw": True,
    }
    words = ["generate", "--base", "b", "--file", "-", "-o", "out.jsonl", "--quantize"]
    expected = {"checkpoint_dir": "b", "prompts": "-", "output": "out.jsonl", "quantize": True}
    assert generate_cli.parse_generate(words) == expected
    expected = {"checkpoint_dir": "b", "prompts": "-"}
    assert generate_cli.parse_generate(["generate", "-", "--base", "b"]) == expected
    chat = ["chat", "--base", "b", "--adapter", "a", "--system", "Be brief", "--top-k", "5"]
    expected = {"checkpoint_dir": "b", "adapter": "a", "system": "Be brief", "top_k": 5}
    assert generate_cli.parse_generate(chat) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "Hello"], "the following arguments are required: --base"),
        (["generate", "--base", "b", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["generate", "--base", "b", "--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["chat", "--base", "b", "Hello there"], "unrecognized arguments: Hello there"),
        (["chat", "--base", "b", "-o", "x"], "unrecognized arguments: -o x"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate_cli.parse_generate(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_all_of_sampling_can_be_said():
    assert set(generate_cli.SAMPLING) == {field.name for field in fields(Sampling)}


def test_the_shipped_config_has_every_key():
    keys = OmegaConf.load(CONFIG)
    assert set(keys) == set(generate_cli.RECIPE)
    assert all(value is None for value in keys.values())


@pytest.mark.parametrize("verb", generate_cli.GENERATE_VERBS)
def test_help_needs_the_standard_library_alone(fresh_python, verb):
    out = fresh_python(f"""
import sys
from phi3_plugin.cli import main
sys.argv = ["phi3-tune", {verb!r}, "--help"]
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 0
assert not {{"torch", "torchtune", "omegaconf"}} & set(sys.modules)
""")
    assert out.startswith(f"usage: phi3-tune {verb} ")
    assert all(generate_cli.GENERATE_OPTIONS[key].flags[0] in out for key in generate_cli.CHAT)
